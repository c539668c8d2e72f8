/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Looking into sockets that are not ours to lock. */
#ifndef UNDERPASS_PEEK_H
#define UNDERPASS_PEEK_H

#include "maps.h"

/* What a sender may know of its reader. */
struct reader {
	__u64 cookie;
	const void *ulp;
	__u32 copied_seq;
	__u32 unread; /* bytes charged to its receive memory */
	int lowat, peek_off;
	__u8 shutdown;
	__u8 leaving;
};

/* On a socket: it is about to leave the map, redirect nothing to it any more. A flag that sock_ops may set and
 * everybody read; if another program sets it for itself, the pair is plain TCP. */
#define LEAVING_FLAG BPF_SOCK_OPS_RTO_CB_FLAG

#define READER_SOCK(tp) (tp)->inet_conn.icsk_inet.sk

/* Reads through a stored address: never faults, may read a socket that took the same memory since.
 * The cookie is read last: if it is the peer's, all before it was the peer's. */
static __always_inline void look(__u64 sock, struct reader *r)
{
	if (knobs.rdonly_cast) {
		const struct tcp_sock *tp =
			bpf_rdonly_cast((const void *)sock, bpf_core_type_id_kernel(struct tcp_sock));

		r->copied_seq = *(volatile const __u32 *)&tp->copied_seq;
		r->unread = *(volatile const int *)&READER_SOCK(tp).sk_backlog.rmem_alloc.counter;
		r->ulp = tp->inet_conn.icsk_ulp_ops;
		r->lowat = READER_SOCK(tp).sk_rcvlowat;
		r->peek_off = READER_SOCK(tp).sk_peek_off;
		r->shutdown = READER_SOCK(tp).sk_shutdown;
		r->leaving = tp->bpf_sock_ops_cb_flags & LEAVING_FLAG;
		r->cookie = *(volatile const __s64 *)&READER_SOCK(tp).__sk_common.skc_cookie.counter;
	} else {
		const struct tcp_sock *tp = (const void *)sock;

		r->copied_seq = BPF_CORE_READ(tp, copied_seq);
		r->unread = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter);
		r->ulp = BPF_CORE_READ(tp, inet_conn.icsk_ulp_ops);
		r->lowat = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_rcvlowat);
		r->peek_off = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_peek_off);
		r->shutdown = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_shutdown);
		r->leaving = BPF_CORE_READ(tp, bpf_sock_ops_cb_flags) & LEAVING_FLAG;
		r->cookie = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter);
	}
}

static __always_inline const struct sk_psock *psock_of(const struct sock *sk)
{
	return (const void *)((__u64)BPF_CORE_READ(sk, sk_user_data) & ~7ull);
}

/* Do redirected bytes wait for this socket's reader? */
static __always_inline bool has_unread(const struct sock *sk)
{
	const struct sk_psock *psock = psock_of(sk);
	const void *head = (const void *)psock + bpf_core_field_offset(struct sk_psock, ingress_msg);

	return BPF_CORE_READ(psock, ingress_msg.next) != head;
}

/* Threads asleep in a read or write of this socket; -1 = cannot tell. Poll and epoll do not count. */
static __always_inline int sleepers(const struct sock *sk)
{
	const struct wait_queue_entry *entry;
	const struct list_head *head, *at;
	int i, count = 0;

	head = (const void *)BPF_CORE_READ(sk, sk_wq);
	if (!head)
		return -1;
	head = (const void *)head + bpf_core_field_offset(struct socket_wq, wait.head);
	at = BPF_CORE_READ(head, next);
	for (i = 0; i < 8 && at != head; i++) {
		entry = (const void *)at - bpf_core_field_offset(struct wait_queue_entry, entry);
		if (!knobs.recv_wake || (__u64)BPF_CORE_READ(entry, func) == knobs.recv_wake)
			count++;
		at = BPF_CORE_READ(at, next);
	}
	return at == head ? count : -1;
}

/* Threads inside tcp_bpf_sendmsg or tcp_bpf_recvmsg of this socket, asleep or not: each holds a
 * reference to the psock. Those inside native tcp_recvmsg do not. */
static __always_inline int inside(const struct sock *sk)
{
	return BPF_CORE_READ(psock_of(sk), refcnt.refs.counter) - 1;
}

/* May a redirect that was decided before still be on its way to this socket? Only a thread that is inside
 * tcp_bpf_sendmsg of its peer, and awake, can bring one. */
static __always_inline bool more_may_come(const struct endpoint *ep)
{
	const struct sock *peer = ep ? (const void *)ep->peer_sock : 0;

	return peer && BPF_CORE_READ(peer, __sk_common.skc_cookie.counter) == (__s64)ep->peer.cookie &&
	       psock_of(peer) && inside(peer) > sleepers(peer);
}

static __always_inline __u32 callback_flags(const struct tcp_sock *tp)
{
	if (!knobs.rdonly_cast)
		return BPF_CORE_READ(tp, bpf_sock_ops_cb_flags);
	tp = bpf_rdonly_cast(tp, bpf_core_type_id_kernel(struct tcp_sock));
	return tp->bpf_sock_ops_cb_flags;
}

/* Has the peer announced that it leaves, or left by such an announcement? Why; 0 = no. */
static __always_inline enum up_reason peer_leaves(const struct endpoint *ep)
{
	const struct tcp_sock *peer = (const void *)ep->peer_sock;
	const struct endpoint *at = (const void *)ep->peer_state;
	__u8 why = 0;

	if (!peer || !(callback_flags(peer) & LEAVING_FLAG))
		return 0;
	bpf_probe_read_kernel(&why, sizeof(why), &at->leave);
	if (BPF_CORE_READ(peer, inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter) !=
	    (__s64)ep->peer.cookie)
		return 0; /* the memory is another's by now */
	return why && why < UP_REASON_MAX ? why : UP_PEER_GONE;
}

/* Inside the subtree that sock_ops is attached to? */
static __always_inline bool covered(const struct sock *sk)
{
	const struct cgroup *cgrp = BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	const void *slot;
	const struct cgroup *at = 0;

	if (!knobs.cgroup_id)
		return true;
	if (!cgrp || BPF_CORE_READ(cgrp, level) < (int)knobs.cgroup_level)
		return false;
	slot = (const void *)cgrp + bpf_core_field_offset(struct cgroup, ancestors) +
	       knobs.cgroup_level * sizeof(void *);
	bpf_probe_read_kernel(&at, sizeof(at), slot);
	return at && BPF_CORE_READ(at, kn, id) == knobs.cgroup_id;
}

/* Both ends of a socket, as `read_ends` (pair.h) gives them; zeroed by the caller. */
static __always_inline void read_sock_ends(const struct sock *sk, struct up_address *local,
					   struct up_address *remote)
{
	const struct sock_common *skc = &sk->__sk_common;

	local->port = BPF_CORE_READ(skc, skc_num);
	remote->port = bpf_ntohs(BPF_CORE_READ(skc, skc_dport));
	if (BPF_CORE_READ(skc, skc_family) == AF_INET) {
		local->ip[0] = local->ip[1] = remote->ip[0] = remote->ip[1] = 0;
		local->ip[2] = remote->ip[2] = bpf_htonl(0xffff);
		local->ip[3] = BPF_CORE_READ(skc, skc_rcv_saddr);
		remote->ip[3] = BPF_CORE_READ(skc, skc_daddr);
	} else {
		BPF_CORE_READ_INTO(&local->ip, skc, skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&remote->ip, skc, skc_v6_daddr);
	}
}

/* Did the program ask for MSG_ZEROCOPY (SO_ZEROCOPY)? A direct read: asked with every message. */
static __always_inline bool zero_copies(const struct tcp_sock *tp)
{
	return READER_SOCK(tp).__sk_common.skc_flags >>
		       bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY) & 1;
}

#endif
