/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Iterators: what user space runs over sockets that already are. They arm listeners, list, drain. */
#ifndef UNDERPASS_WALK_H
#define UNDERPASS_WALK_H

#include "stuck.h"
#include "watch.h"

#define TCP_BPF_SOCK_OPS_CB_FLAGS 1008

static __always_inline bool set_flags(struct tcp_sock *tp, int flags)
{
	return !bpf_setsockopt(tp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof(flags));
}

static __always_inline void fill(struct up_record *r, const struct sock *sk, const struct endpoint *ep)
{
	const struct sock_common *skc = &sk->__sk_common;

	read_sock_ends(sk, &r->local, &r->remote);
	r->netns = BPF_CORE_READ(skc, skc_net.net, ns.inum);
	r->netns_cookie = BPF_CORE_READ(skc, skc_net.net, net_cookie);
	r->inode = BPF_CORE_READ(sk, sk_socket, file, f_inode, i_ino);
	r->state = BPF_CORE_READ(skc, skc_state);
	r->covered = covered(sk);
	r->cookie = BPF_CORE_READ(skc, skc_cookie.counter);
	r->program = ep && ep->program ? ep->program : caller_of(r->cookie);
	if (!ep)
		return;
	r->peer = ep->peer.cookie;
	r->shortcut_bytes = ep->shortcut_bytes;
	r->shortcut_messages = ep->shortcut_messages;
	r->tcp_messages = ep->tcp_messages;
	r->role = ep->role;
	r->reason = ep->reason;
	r->armed = ep->watched;
	if (ep->watched && bpf_sk_storage_get(&shared_listeners, (struct sock *)sk, 0, 0))
		r->armed = 2;
}

/* Is the callback on a listener set because the generation before us set it? */
static __always_inline bool adopting(void)
{
	struct up_control *ctl = controls();

	return ctl && ctl->adopting;
}

/* A listener that nobody saw begin: whose it is, user space finds out. */
static __always_inline void stood_before(const struct sock *sk)
{
	struct up_owner owner = {}, *known;
	struct up_place place = {};

	read_place(sk, &place);
	known = bpf_map_lookup_elem(&owners, &place);
	if (known && stands(known))
		return;
	note_listener(&owner, sk);
	bpf_map_update_elem(&owners, &place, &owner, BPF_ANY);
}

static __always_inline void arm(struct bpf_iter__tcp *ctx, bool on)
{
	struct sock_common *skc = ctx->sk_common;
	struct up_record r = {};
	struct endpoint *ep;
	struct tcp_sock *tp;
	int flags;

	if (!skc || skc->skc_state != BPF_TCP_LISTEN)
		return;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp || !covered((const struct sock *)tp))
		return;
	flags = tp->bpf_sock_ops_cb_flags;
	ep = bpf_sk_storage_get(&endpoints, (struct sock *)tp, 0, on ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	fill(&r, (const struct sock *)tp, ep);
	if (on)
		stood_before((const struct sock *)tp);
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r)); /* user space finds its owner */
	if (!ep || ep->watched == on)
		return;
	if (on && (flags & BUILD_FLAG) && !adopting())
		bpf_sk_storage_get(&shared_listeners, (struct sock *)tp, 0,
				   BPF_SK_STORAGE_GET_F_CREATE);
	else if (!on && bpf_sk_storage_get(&shared_listeners, (struct sock *)tp, 0, 0))
		bpf_sk_storage_delete(&shared_listeners, (struct sock *)tp);
	else if (!set_flags(tp, on ? flags | BUILD_FLAG : flags & ~BUILD_FLAG))
		return;
	ep->watched = on;
}

/* Whoever is out of the map gets back what we had set on it, and is woken if TCP bytes wait that it may have
 * missed (stuck.h). */
static __always_inline void put_back(struct tcp_sock *tp, struct endpoint *ep)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	int wide = wide_size(sk), lowat, flags;

	ep->observed = 0;
	if (ep->role == UP_CLIENT)
		bpf_map_delete_elem(&handshakes, &ep->numbers); /* its end will not be told of */
	flags = tp->bpf_sock_ops_cb_flags & ~CLOSE_FLAG;
	if (ep->told_at)
		flags &= ~LEAVING_FLAG;
	if (!bpf_sk_storage_get(&shared_listeners, (struct sock *)tp, 0, 0))
		flags &= ~BUILD_FLAG;
	set_flags(tp, flags);
	if (ep->ticking)
		STOP_TICKING(tp, ep);
	if (tight(ep) && buffer_is_ours(ep, sk)) {
		bpf_setsockopt(tp, SOL_SOCKET, SO_SNDBUF, &wide, sizeof(wide));
		ep->buffer_is = BUFFER_UNTOUCHED;
	}
	lowat = tp->inet_conn.icsk_inet.sk.sk_rcvlowat;
	if (tp->rcv_nxt != tp->copied_seq)
		bpf_setsockopt(tp, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
}

/* After a drain. */
static __always_inline void release(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct endpoint *ep;
	struct tcp_sock *tp;

	tp = skc ? bpf_skc_to_tcp_sock(skc) : 0;
	ep = tp ? bpf_sk_storage_get(&endpoints, (struct sock *)tp, 0, 0) : 0;
	if (!ep || (!ep->role && !ep->observed))
		return;
	if (!psock_of((const struct sock *)tp))
		return put_back(tp, ep);
	/* A thread is still inside, or it is another generation's by now: what we announced is over, and so is our timer. */
	if (ep->told_at)
		set_flags(tp, tp->bpf_sock_ops_cb_flags & ~LEAVING_FLAG);
	if (ep->ticking)
		STOP_TICKING(tp, ep);
}

static __always_inline void record(struct bpf_iter__sockmap *ctx, struct sock *sk)
{
	struct up_record r = {};

	fill(&r, sk, bpf_sk_storage_get(&endpoints, sk, 0, 0));
	r.in_map = 1;
	if (has_unread(sk)) /* at least 1, should the charge not show it */
		r.unread = BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter) ?: 1;
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
}

#endif
