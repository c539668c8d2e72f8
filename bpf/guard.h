/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The guard: programs that use what the shortcut cannot serve (splice from a socket, MSG_WAITALL and
 * so on) stay on TCP. A program is watched on TCP before any of its connections may take the shortcut,
 * and for as long as it lives: what it does is seen at the entry of its system calls (up_watch) and in
 * the state of its sockets, and is remembered under the program's identity. */
#ifndef UNDERPASS_GUARD_H
#define UNDERPASS_GUARD_H

#include "policy.h"
#include "programs.h"

#define PAUSE_NS 1000000000ull /* a longer silence counts as this much of running */

/* Where a program listens -> who serves there. Written by LISTEN, by up_arm and user space for listeners that
 * stood before, and by up_watch if another program accepts. LRU: the owner is then unknown. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct up_place);
	__type(value, struct up_owner);
} owners SEC(".maps");

/* Cookies of sockets in the map that were used as they must not be, whoever owns them. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u32); /* enum up_sign */
} marked SEC(".maps");

/* What was done with sockets in the map, by whatever program; by cookie. LRU: how the program looks in general still
 * counts. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, __u32); /* enum up_use */
} uses SEC(".maps");

/* Endpoints look their verdicts up again when this has changed. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct up_news);
} news SEC(".maps");

static __always_inline struct up_news *latest(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&news, &zero);
}

static __always_inline void tell(void)
{
	struct up_news *n = latest();

	if (n)
		__sync_fetch_and_add(&n->epoch, 1);
}

/* Is who asks FIONREAD told too little, since redirected bytes do not count? */
static __always_inline bool miscounts(void)
{
	return !knobs.counts_redirected && !fault(UP_FAULT_MISCOUNTED);
}

/* The signs that a program of this name would show too late; which they are says knobs.py. */
static __always_inline __u32 known_signs(const struct up_program *p)
{
	__u64 first = *(const __u64 *)p->name;
	__u32 signs = 0;
	int i;

	for (i = 0; i < UP_KNOWN_NAMES; i++)
		if (knobs.known[i].bits && (first & knobs.known[i].bits) == knobs.known[i].name)
			signs |= knobs.known[i].signs;
	return signs;
}

/* May its connections take the shortcut? UP_SHORTCUT, UP_OBSERVED or UP_GUARDED. One that had to make
 * room in the list waits until it is met again: there may be a rule for it. No rule allows what the kernel would answer
 * with a socket that it never closes. */
static __always_inline enum up_reason verdict_on(__u64 program, const struct up_program *p)
{
	__u32 signs = p ? p->signs | known_signs(p) : 0;

	if (signs & UP_SIGN_IN_KERNEL)
		return UP_GUARDED;
	if (p && p->rule == UP_ALLOW)
		return UP_SHORTCUT;
	if (p && (signs || p->rule == UP_DENY))
		return UP_GUARDED;
	if (program && !p)
		return UP_OBSERVED;
	if (knobs.observe_ns && (!p || p->active_ns < knobs.observe_ns))
		return UP_OBSERVED;
	return UP_SHORTCUT;
}

static __always_inline enum up_reason admitted(__u64 program)
{
	return verdict_on(program, program ? bpf_map_lookup_elem(&programs, &program) : 0);
}

/* The same, for an endpoint that enters the map: `epoch` becomes that of the news which this verdict knows, or ~0 if
 * it has to look again since an allowed program may show signs. Read first: what comes after is looked up later. */
static __always_inline enum up_reason admitted_now(__u64 program, __u64 *epoch)
{
	struct up_news *n = latest();
	struct up_program *p;

	*epoch = n ? *(volatile __u64 *)&n->epoch : ~0ull;
	p = program ? bpf_map_lookup_elem(&programs, &program) : 0;
	if (p && p->rule == UP_ALLOW)
		*epoch = ~0ull;
	return verdict_on(program, p);
}

static __always_inline bool allowed(__u64 program)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;

	return p && p->rule == UP_ALLOW;
}

/* That this socket is used so (`is`), and not so any more (`not`). */
static __always_inline void note_use(const struct sock *sk, __u32 is, __u32 not)
{
	__u64 cookie = READ(sk, __sk_common.skc_cookie.counter);
	__u32 *seen = bpf_map_lookup_elem(&uses, &cookie), all = is | (seen ? *seen & ~not : 0);

	if (cookie && (seen ? *seen : 0) != all && psock_of(sk))
		bpf_map_update_elem(&uses, &cookie, &all, BPF_ANY);
}

static __always_inline bool used(__u64 cookie, __u32 so)
{
	__u32 *seen = bpf_map_lookup_elem(&uses, &cookie);

	return seen && *seen & so;
}

static __always_inline void note_looks(__u64 program, const struct sock *sk, __u32 looks)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;

	if (p && (p->looks & looks) != looks)
		p->looks |= looks;
	note_use(sk, looks, 0);
}

/* How does this program look at what waits at this socket, or whoever else has it? */
static __always_inline __u32 looks_at(__u64 program, __u64 cookie)
{
	struct up_program *p = bpf_map_lookup_elem(&programs, &program);
	__u32 *seen = bpf_map_lookup_elem(&uses, &cookie);

	return (p ? p->looks : 0) | (seen ? *seen : 0);
}

static __always_inline void note_sign(__u64 program, __u32 sign)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;

	if (!p || (p->signs & sign) == sign)
		return;
	__sync_fetch_and_or(&p->signs, sign);
	tell();
}

/* Does a callback of the kernel's read it (iscsi_sw_tcp_conn_set_callbacks), or a thread of its own (nbd)? */
static __always_inline bool handed_over(const struct tcp_sock *tp)
{
	__u64 data = (__u64)READER_SOCK(tp).sk_user_data;

	return ((data && !(data & PSOCK_TAG)) || SPARES_WAITING(READER_SOCK(tp).sk_allocation)) && !fault(UP_FAULT_KERNEL_ENDS);
}

/* What the state of a socket says about its program. */
static __always_inline __u32 signs_of(const struct tcp_sock *tp)
{
	__u32 signs = READER_SOCK(tp).sk_rcvlowat > 1 ? UP_SIGN_RCVLOWAT : 0;

	if (handed_over(tp))
		signs |= UP_SIGN_IN_KERNEL;
	if (tp->inet_conn.icsk_ulp_ops)
		signs |= UP_SIGN_ULP;
	return uses_error_queue(tp) ? signs | UP_SIGN_ZEROCOPY : signs;
}

/* An observed program has sent a TCP packet on a local connection: it runs. True while it is to be
 * watched further. */
static __always_inline bool ran(__u64 program, const struct tcp_sock *tp)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;
	__u64 now = bpf_ktime_get_ns(), before;
	__u32 signs;

	if (!p)
		return false;
	signs = signs_of(tp);
	if (signs)
		note_sign(program, signs);
	before = __sync_lock_test_and_set(&p->last_seen, now);
	if (before && before < now)
		__sync_fetch_and_add(&p->active_ns, now - before < PAUSE_NS ? now - before : PAUSE_NS);
	return admitted(program) == UP_OBSERVED;
}

/* The same, and may the socket at this address by the policy? */
static __always_inline enum up_reason welcome(__u64 program, __u64 sock, __u32 role, __u64 *epoch)
{
	enum up_reason why = admitted_now(program, epoch);

	return why == UP_SHORTCUT && !permitted(sock, role) ? UP_POLICY : why;
}

/* Has the policy become another, or has a sign been seen at one of the ends, since this endpoint looked last? */
static __always_inline bool guarded(struct endpoint *ep)
{
	struct up_news *n = latest();
	struct up_program *p;
	__u32 *use;

	if (!n || ep->epoch == n->epoch)
		return ep->guarded;
	ep->epoch = n->epoch;
	ep->barred = !permitted(ep->sock, ep->role) ||
		     (!permitted(ep->peer_sock, UP_CLIENT + UP_SERVER - ep->role) && !fault(UP_FAULT_ONE_END));
	use = bpf_map_lookup_elem(&marked, &ep->peer.cookie);
	p = bpf_map_lookup_elem(&programs, &ep->peer_program);
	if ((use && *use & UP_SIGN_SPLICE) || (p && p->signs & UP_SIGN_SPLICE))
		ep->spliced = 1;
	if (use || admitted(ep->program) == UP_GUARDED || admitted(ep->peer_program) == UP_GUARDED ||
	    bpf_map_lookup_elem(&marked, &ep->self.cookie))
		ep->guarded = 1;
	return ep->guarded;
}

/* splice does not see redirected bytes and would take TCP bytes that were sent after them: while such wait
 * at a peer that was spliced from, the shortcut alone keeps the order. */
static __always_inline bool order_at_stake(const struct endpoint *ep)
{
	const struct sock *peer = (const void *)ep->peer_sock;

	return ep->spliced && psock_of(peer) && has_unread(peer) && !fault(UP_FAULT_LATE_SPLICE);
}

/* The calling endpoint shall leave the map, once what its peer may have under way has arrived. */
static __always_inline void wants_out(struct endpoint *ep, enum up_reason reason)
{
	ep->gone_at = bpf_ktime_get_ns();
	ep->leave = reason;
}

/* Its peer leaves, or has left. One that streams small messages has told us, and sends nothing our way. */
static __always_inline void follow(struct endpoint *ep, enum up_reason why)
{
	wants_out(ep, why);
	ep->hasty = why == UP_SMALL_STREAM;
}

/* The listener that an entry tells of has not closed since. */
static __always_inline bool stands(const struct up_owner *owner)
{
	const struct sock *sk = (const void *)owner->listener;

	return READ(sk, __sk_common.skc_state) == BPF_TCP_LISTEN &&
	       (!owner->cookie || READ(sk, __sk_common.skc_cookie.counter) == (__s64)owner->cookie);
}

/* Who serves what arrives at `place`: who listens at the very address, else at any. Of those whose listener
 * has closed, one is better than none for sockets that it accepted before. Spoils `place`. */
static __always_inline struct up_owner *owner_of(struct up_place *place)
{
	struct up_owner *owner = bpf_map_lookup_elem(&owners, place), *closed;

	if (owner && stands(owner))
		return owner;
	closed = owner;
	place->at.ip[0] = place->at.ip[1] = place->at.ip[3] = 0;
	if (place->at.ip[2] == bpf_htonl(0xffff)) {
		owner = bpf_map_lookup_elem(&owners, place);
		if (owner && stands(owner))
			return owner;
		closed = closed ?: owner;
	}
	place->at.ip[2] = 0;
	owner = bpf_map_lookup_elem(&owners, place);
	return owner && stands(owner) ? owner : closed ?: owner;
}

/* The local end of `sk`, which need not be the caller's to lock; zeroed by the caller. */
static __always_inline void read_place(const struct sock *sk, struct up_place *place)
{
	const struct net *net = READ(sk, __sk_common.skc_net.net);
	struct up_address remote;

	read_sock_ends(sk, &place->at, &remote);
	place->netns = READ(net, net_cookie);
}

static __always_inline struct up_owner *owner_at(const struct sock *sk)
{
	struct up_place place = {};

	read_place(sk, &place);
	return owner_of(&place);
}

/* That `sk` is the listener at this place. */
static __always_inline void note_listener(struct up_owner *owner, const struct sock *sk)
{
	owner->cookie = READ(sk, __sk_common.skc_cookie.counter);
	owner->listener = (__u64)sk;
}

/* Is it certain that who listens accepts, too? Else the listener may have been handed to a program that was
 * never seen: as long as nobody accepted here, what the program did elsewhere counts. */
static __always_inline bool sure_to_serve(const struct up_owner *owner)
{
	struct up_program *p;

	if (!knobs.observe_ns)
		return true;
	if (owner && owner->shared)
		return false;
	if (owner && owner->accepts)
		return true;
	p = owner ? bpf_map_lookup_elem(&programs, &owner->program) : 0;
	return p && (p->rule == UP_ALLOW || (p->accepts && !p->hands_on));
}

/* Who accepts is who reads. The accepted socket `sk` was let into the map on the verdict of `listened`, who
 * may only have held the listener; may it stay? Who accepts unseen, as by io_uring, is not known. */
static __noinline enum up_reason acceptor(const struct sock *sk, __u64 *listened)
{
	struct up_owner *owner = owner_at(sk);

	if (!owner)
		return UP_OBSERVED;
	*listened = owner->program;
	return owner->accepts ? admitted(*listened) : UP_OBSERVED;
}

#endif
