/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Looking into sockets that are not ours to lock. */
#ifndef UNDERPASS_PEEK_H
#define UNDERPASS_PEEK_H

#include "maps.h"

/* What a sender may know of its reader. */
struct reader {
	__u64 cookie;
	const void *ulp;
	__u32 copied_seq, rcv_nxt;
	__u32 unread; /* bytes charged to its receive memory */
	int lowat, peek_off, buffer;
	__u8 shutdown;
	__u8 leaving;
};

/* On a socket: it is about to leave the map, redirect nothing to it any more. A flag that sock_ops may set and
 * everybody read; if another program sets it for itself, the pair is plain TCP. */
#define LEAVING_FLAG BPF_SOCK_OPS_RTO_CB_FLAG

#define RCV_SHUTDOWN 1
#define SEND_SHUTDOWN 2

#define READER_SOCK(tp) (tp)->inet_conn.icsk_inet.sk

/* What is seen of it, and where it stands. The cookie is read last: if it is the peer's, all before it was the peer's. */
#define SEEN(see)                                                                                  \
	see(copied_seq, copied_seq);                                                               \
	see(rcv_nxt, rcv_nxt);                                                                     \
	see(unread, inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter);                         \
	see(ulp, inet_conn.icsk_ulp_ops);                                                          \
	see(lowat, inet_conn.icsk_inet.sk.sk_rcvlowat);                                            \
	see(peek_off, inet_conn.icsk_inet.sk.sk_peek_off);                                         \
	see(buffer, inet_conn.icsk_inet.sk.sk_rcvbuf);                                             \
	see(shutdown, inet_conn.icsk_inet.sk.sk_shutdown);                                         \
	see(leaving, bpf_sock_ops_cb_flags);                                                       \
	barrier();                                                                                 \
	see(cookie, inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter)
#define SEE_DIRECTLY(what, field) r->what = tp->field
#define SEE_BY_READ(what, field) r->what = READ(tp, field)

/* Reads through a stored address: never faults, may read a socket that took the same memory since. One cast serves all,
 * where READ has one for each: this is for every message. */
static __always_inline void look(__u64 sock, struct reader *r)
{
	const struct tcp_sock *tp = (const void *)sock;

	if (knobs.rdonly_cast) {
		tp = bpf_rdonly_cast(tp, bpf_core_type_id_kernel(struct tcp_sock));
		SEEN(SEE_DIRECTLY);
	} else {
		SEEN(SEE_BY_READ);
	}
	r->leaving &= LEAVING_FLAG;
}

#define PSOCK_TAG 4ull /* SK_USER_DATA_PSOCK */

/* What makes it a socket of a map; 0 = it is in none. */
static __always_inline const struct sk_psock *psock_of(const struct sock *sk)
{
	__u64 data = (__u64)READ(sk, sk_user_data);

	return (const void *)(data & PSOCK_TAG ? data & ~7ull : 0);
}

/* In our map, in another's, or used by the kernel itself. */
static __always_inline bool taken(const struct sock *sk)
{
	return READ(sk, sk_user_data) != 0;
}

#define GFP_KERNEL 0xcc0 /* may wait for memory that has to be written back: what the sockets of programs allocate with */

/* Does the kernel itself use this socket, where it must not wait for its own writing: under a disk or a file system? */
#define SPARES_WAITING(allocation) (((allocation) & GFP_KERNEL) != GFP_KERNEL)

/* Has the kernel made this socket for itself, as CIFS and NVMe over TCP do? Then no program has a file of it, or (NVMe since
 * 6.7) it has one that no program knows. (Nor need one of MPTCP's have one that is a
 * program's; what such a listener accepts from plain TCP is as any other.) */
static __always_inline bool kernels_own(const struct sock *sk)
{
	const struct tcp_sock *tp = (const void *)sk;
	const struct socket *socket = READ(sk, sk_socket);

	if (!socket || fault(UP_FAULT_KERNEL_ENDS))
		return false;
	if (bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ_BITFIELD_PROBED(tp, is_mptcp))
		return false;
	return !READ(socket, file) || SPARES_WAITING(READ(sk, sk_allocation));
}

/* Do redirected bytes wait for this socket's reader? */
static __always_inline bool has_unread(const struct sock *sk)
{
	const struct sk_psock *psock = psock_of(sk);
	const void *head = (const void *)psock + bpf_core_field_offset(struct sk_psock, ingress_msg);

	return psock && READ(psock, ingress_msg.next) != head;
}

/* Threads inside tcp_bpf_sendmsg or tcp_bpf_recvmsg of this socket, asleep or not: each holds a
 * reference to the psock. Those inside native tcp_recvmsg do not. */
static __always_inline int inside(const struct sock *sk)
{
	return READ(psock_of(sk), refcnt.refs.counter) - 1;
}

#define FRAME_WORDS 32 /* from a wait queue entry to the return address of the function that has it on its stack */

enum recv { IN_NO_RECV, IN_NATIVE_RECV, IN_OUR_RECV, IN_SOME_RECV };

/* Inside which recv is the thread that has the wait queue entry at this address on its stack? An enum recv. sk_wait_data()
 * keeps it in its frame, right above which stands an address in tcp_recvmsg_locked() to return to; tcp_msg_wait_data() has
 * one in ours there, or is part of it. The first that is found decides: what stands farther up may be left from calls that
 * are over. Global, as all that loops here, so that the verifier looks at it once and not at each of its calls. */
__noinline int waits_in(__u64 entry)
{
	const __u64 *at = (const void *)entry;
	__u64 word;
	int i, part;

	for (i = 0; i < FRAME_WORDS; i++) {
		if (bpf_probe_read_kernel(&word, sizeof(word), at + i))
			return IN_SOME_RECV; /* cannot tell */
		for (part = 0; part < UP_RECV_PARTS; part++)
			if (word >= knobs.recv_code[2 * part] && word < knobs.recv_code[2 * part + 1])
				return part < UP_RECV_NATIVE ? IN_NATIVE_RECV : IN_OUR_RECV;
	}
	return IN_NO_RECV;
}

#define WAITERS 8 /* epoll instances and threads: of more it is not known who sleeps */

/* How many wait on the socket at this address to be woken by the function at `wake`, 0 = any, and may do so inside this
 * enum recv, 0 = anywhere; -1 = cannot tell. */
__noinline int waiters(__u64 sock, __u64 wake, int inside)
{
	const struct sock *sk = (const void *)sock;
	const struct wait_queue_entry *entry;
	const struct list_head *head, *at;
	int i, count = 0;

	head = (const void *)READ(sk, sk_wq);
	if (!head) /* not accepted yet, or closed: nobody can */
		return 0;
	head = (const void *)head + bpf_core_field_offset(struct socket_wq, wait.head);
	at = READ(head, next);
	for (i = 0; i < WAITERS && at != head; i++) {
		entry = (const void *)at - bpf_core_field_offset(struct wait_queue_entry, entry);
		if ((!wake || (__u64)READ(entry, func) == wake) && (!inside || waits_in((__u64)entry) & inside))
			count++;
		at = READ(at, next);
	}
	return at == head ? count : -1;
}

/* Threads asleep in a read or write of the socket at this address; -1 = cannot tell. Poll and epoll do not count. */
static __always_inline int sleepers(__u64 sock)
{
	return waiters(sock, knobs.recv_wake, 0);
}

/* May a thread be asleep in a read of it? One that waits for room to write is counted by the kernel. */
static __always_inline bool reader_sleeps(__u64 sock)
{
	return sleepers(sock) != READ((const struct sock *)sock, sk_write_pending);
}

/* Threads asleep in native recv of the socket at this address, where redirected bytes do not wake them; -1 = cannot
 * tell. Where the kernel does not say where that code is, as many as cannot be inside ours. Global, so that the
 * verifier looks at it once. */
__noinline int native_readers(__u64 sock)
{
	const struct sock *sk = (const void *)sock;
	int ours, asleep;

	if (knobs.recv_code[0] && knobs.recv_wake)
		return waiters(sock, knobs.recv_wake, IN_NATIVE_RECV);
	asleep = sleepers(sock);
	ours = inside(sk);
	return asleep > ours ? asleep - ours : asleep < 0 ? -1 : 0;
}

/* Are there, besides `here`, threads inside tcp_bpf_sendmsg or tcp_bpf_recvmsg of the socket at this address that are
 * awake? */
static __always_inline bool awake_inside(__u64 sock, int here)
{
	const struct sock *sk = (const void *)sock;
	int native = native_readers(sock);

	return native < 0 || inside(sk) - here > sleepers(sock) - native;
}

/* Is the socket that this endpoint knows as its peer's still that, and not another that took its memory? Asked last. */
static __always_inline bool still_peer(const struct endpoint *ep)
{
	const struct sock *peer = (const void *)ep->peer_sock;

	return READ(peer, __sk_common.skc_cookie.counter) == (__s64)ep->peer.cookie;
}

/* May a redirect that was decided before still be on its way to this socket? Only a thread that is inside
 * tcp_bpf_sendmsg of its peer, and awake, can bring one. */
static __always_inline bool more_may_come(const struct endpoint *ep)
{
	const struct sock *peer = ep ? (const void *)ep->peer_sock : 0;

	return peer && still_peer(ep) && psock_of(peer) && awake_inside(ep->peer_sock, 0);
}

static __always_inline bool in_use(__u64 sock)
{
	return READ((const struct sock *)sock, sk_lock.owned);
}

#define COPY_LOOKS 1024
#define COPY_NS 10000      /* an idle reader's call, and then some */
#define COPY_MOST_NS 50000 /* sleeping and waking costs the sender as much */

/* Looks at a socket that a thread holds. */
struct hold {
	__u64 sock, until;
	const struct endpoint *state;
	bool on;
};

static long look_again(__u32 i __attribute__((unused)), struct hold *hold)
{
	__u8 waits = 0;

	hold->on = in_use(hold->sock);
	if (!hold->on)
		return 1;
	bpf_probe_read_kernel(&waits, sizeof(waits), &hold->state->waits);
	hold->on = !waits;
	return waits || bpf_ktime_get_ns() >= hold->until;
}

/* Does a thread hold the socket at this address, whose endpoint is at `state`, for longer than it takes to copy what
 * waits? bpf_tcp_ingress() would sleep until it lets go, whether or not the sender may sleep, and not even SIGKILL
 * would wake it; and that thread may be in a page fault, or have no processor. TCP has the backlog for this. One that
 * looks on in the same way, from the other end, lets go of its own socket next. Global: see waits_in(). */
__noinline int held_for_long(__u64 sock, __u64 state, __u32 unread)
{
	struct hold hold = {.sock = sock, .state = (const void *)state, .on = 1};
	__u64 patience = COPY_NS + unread / 4;

	if (patience > COPY_MOST_NS)
		patience = COPY_MOST_NS;
	hold.until = bpf_ktime_get_ns() + patience;
	bpf_loop(COPY_LOOKS, look_again, &hold, 0);
	return hold.on;
}

#define CATCH_UP_NS 25000 /* to wake up on another core, and to copy */

/* A reader that is waited for. */
struct wait {
	__u64 sock, until;
	__u32 written;
};

static long look_for_end(__u32 i __attribute__((unused)), struct wait *wait)
{
	const struct tcp_sock *tp = (const void *)wait->sock;

	return (READ(tp, copied_seq) == wait->written && !in_use(wait->sock)) || bpf_ktime_get_ns() >= wait->until;
}

/* Waits a moment for the reader at this address, which has received all up to `written`, to consume it. A sender that runs
 * beside its reader would hand TCP the next message before, and again and again, where the gate opens only by chance.
 * Global: see waits_in(). */
__noinline int let_catch_up(__u64 sock, __u32 written)
{
	struct wait wait = {.sock = sock, .written = written};

	if (READ((const struct tcp_sock *)sock, rcv_nxt) != written)
		return 0;
	wait.until = bpf_ktime_get_ns() + CATCH_UP_NS;
	return bpf_loop(COPY_LOOKS, look_for_end, &wait, 0);
}

#define CGROUPS_ABOVE 6
#define CGROUP_RESERVE (16 << 20) /* bytes below the limit, or an eighth of it */
#define PAGE_BYTES 4096

/* Is a memory cgroup that a socket is charged to near its limit? Redirected bytes are charged by the sender, who
 * reclaims there, and at the limit has a process of the reader's killed; TCP drops the packet instead
 * (gfp_memcg_charge). */
static __always_inline bool cgroup_short(const struct sock *sk)
{
	const struct page_counter *at;
	unsigned long most, reserve;
	__s64 used;
	int i;

	if (!bpf_core_field_exists(sk->sk_memcg))
		return false;
	at = (const void *)((__u64)READ(sk, sk_memcg) & ~7ull); /* flags, since 6.18 */
	if (!at)
		return false;
	at = (const void *)at + bpf_core_field_offset(struct mem_cgroup, memory);
	for (i = 0; i < CGROUPS_ABOVE && at; i++) {
		most = READ(at, max);
		used = READ(at, usage.counter);
		reserve = most / 8 < CGROUP_RESERVE / PAGE_BYTES ? most / 8 : CGROUP_RESERVE / PAGE_BYTES;
		if (used > 0 && (unsigned long)used + reserve > most)
			return true;
		at = READ(at, parent);
	}
	return false;
}

/* Has the peer announced that it leaves, or left by such an announcement? Why; 0 = no. */
static __always_inline enum up_reason peer_leaves(const struct endpoint *ep)
{
	const struct tcp_sock *peer = (const void *)ep->peer_sock;
	const struct endpoint *at = (const void *)ep->peer_state;
	__u8 why = 0;

	if (!peer || !(READ(peer, bpf_sock_ops_cb_flags) & LEAVING_FLAG))
		return 0;
	bpf_probe_read_kernel(&why, sizeof(why), &at->leave);
	if (!still_peer(ep))
		return 0;
	return why && why < UP_REASON_MAX ? why : UP_PEER_GONE;
}

/* Inside the subtree that sock_ops is attached to? */
static __always_inline bool covered(const struct sock *sk)
{
	const struct cgroup *cgrp, *at = 0;
	const struct kernfs_node *node;
	const void *slot;

	if (!knobs.cgroup_id)
		return true;
	cgrp = READ(sk, sk_cgrp_data.cgroup);
	if (!cgrp || READ(cgrp, level) < (int)knobs.cgroup_level)
		return false;
	slot = (const void *)cgrp + bpf_core_field_offset(struct cgroup, ancestors) +
	       knobs.cgroup_level * sizeof(void *);
	bpf_probe_read_kernel(&at, sizeof(at), slot);
	node = at ? READ(at, kn) : 0;
	return node && READ(node, id) == knobs.cgroup_id;
}

/* Both ends of a socket, as `read_ends` (pair.h) gives them; zeroed by the caller. */
static __always_inline void read_sock_ends(const struct sock *sk, struct up_address *local,
					   struct up_address *remote)
{
	const struct sock_common *skc = &sk->__sk_common;

	local->port = READ(skc, skc_num);
	remote->port = bpf_ntohs(READ(skc, skc_dport));
	if (READ(skc, skc_family) == AF_INET) {
		local->ip[0] = local->ip[1] = remote->ip[0] = remote->ip[1] = 0;
		local->ip[2] = remote->ip[2] = bpf_htonl(0xffff);
		local->ip[3] = READ(skc, skc_rcv_saddr);
		remote->ip[3] = READ(skc, skc_daddr);
	} else {
		BPF_CORE_READ_INTO(&local->ip, skc, skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&remote->ip, skc, skc_v6_daddr);
	}
}

#define TX_TIMESTAMPS (1 << 0 | 1 << 1 | 1 << 8 | 1 << 9) /* SOF_TIMESTAMPING_TX_*: by hardware, software, sched, ack */

/* Does the program wait for notes in the error queue on what it sends: did it set SO_ZEROCOPY or ask for timestamps of
 * transmission? Direct reads: asked with every message. */
static __always_inline bool uses_error_queue(const struct tcp_sock *tp)
{
	return (READER_SOCK(tp).__sk_common.skc_flags >> bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY) & 1) ||
	       READER_SOCK(tp).sk_tsflags & TX_TIMESTAMPS;
}

#endif
