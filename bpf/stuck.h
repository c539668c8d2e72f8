/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Readers that would sleep for ever, or wake for nothing: endpoints that leave the map in time.
 *
 * TCP bytes that arrive behind unread redirected ones have had their wake-up before the reader gets to
 * them: an edge-triggered reader that takes a short read for the end (as epoll(7) allows), or asks
 * FIONREAD on a kernel that does not count them, then waits for an event that does not come. nginx does
 * both.
 *
 * So an endpoint in the map that sends a TCP packet (an ACK, a probe) looks at itself: TCP bytes that
 * have waited for PATIENCE_NS, with nothing redirected ahead of them, mean a reader that missed them (or
 * gets at a few with every event). It leaves the map for good and is woken. The keepalive timer makes
 * sure that a packet comes. */
#ifndef UNDERPASS_STUCK_H
#define UNDERPASS_STUCK_H

#include "options.h"

#define PATIENCE_NS 150000000ull /* shorter than the shortest probe interval, 200 ms */
#define LONG_PATIENCE_NS 2000000000ull
#define GRACE_NS 3000000ull      /* for those that know that nobody sends to them any more */
#define FIRST_READ 512           /* a first message up to this is read in one go */

/* Takes the calling socket out of the map, for good. The caller knows that no redirected byte waits
 * for it or is on its way. Setting SO_RCVLOWAT wakes whoever has bytes to read (tcp_set_rcvlowat). */
static __noinline void leave(struct bpf_sock_ops *ctx, struct endpoint *ep,
				  const struct tcp_sock *tp, enum up_reason reason)
{
	struct handshake *shake;
	int lowat = 0;

	if (ep->role == UP_SERVER) {
		shake = bpf_map_lookup_elem(&handshakes, &ep->numbers);
		if (shake && !ep->shortcut_messages)
			shake->server = 0; /* nothing of ours is on its way: the client may go at once */
		if (shake)
			*(volatile __u32 *)&shake->refused = reason;
	} else {
		bpf_map_delete_elem(&handshakes, &ep->numbers);
	}
	bpf_map_delete_elem(&sockets, &ep->self);
	note_left(ep);
	ep->reason = reason;
	count_socket(reason);
	set_buffer(ctx, ep, tp, BUFFER_WIDE);
	clear_flags(ctx, tight(ep) ? CLOSE_FLAG : BUILD_FLAG | CLOSE_FLAG); /* a reader sleeps: on_packet() tries again */
	if (ep->ticking)
		STOP_TICKING(ctx, ep);
	if (tp->rcv_nxt != tp->copied_seq && !bpf_getsockopt(ctx, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat)))
		bpf_setsockopt(ctx, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
}

/* The client has spoken by TCP and knows of no server yet that was accepted: it has redirected nothing to us. */
static __always_inline bool tcp_came_first(const struct endpoint *ep)
{
	return ep->role == UP_SERVER && bpf_map_lookup_elem(&handshakes, &ep->numbers);
}

/* Nothing redirected waits or is under way, either way: a thread of ours would be hidden from the peer once
 * our psock is gone. Asked at both ends: a thread that brings something holds both psocks, but a reader asleep
 * in native recv hides it at the peer, and so does the peer's having left. `here` of the threads inside are
 * the one that asks. If not, a later packet is the moment to leave. */
static __always_inline bool settled(const struct endpoint *ep, const struct sock *sk, int here)
{
	if (has_unread(sk) || order_at_stake(ep))
		return false;
	return fault(UP_FAULT_UNSETTLED) || (!awake_inside(ep->sock, here) && !more_may_come(ep));
}

/* Our side is shut down; the other may go on. A thread asleep in tcp_bpf_recvmsg takes the wake-up that
 * the FIN's ACK brings for "nothing there" and returns EAGAIN, also from a blocking read
 * (tcp_msg_wait_data waits once). So the socket goes back to native reads now, before its reader
 * sleeps - unless bytes wait for it, or a sender that saw no shutdown flag is on its way into its
 * queue. Who shuts us down holds no psock. */
static __always_inline void half_close(struct bpf_sock_ops *ctx, struct endpoint *ep)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp;

	tp = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (tp && psock_of((const struct sock *)tp) && settled(ep, (const struct sock *)tp, 0))
		leave(ctx, ep, tp, UP_HALF_CLOSED);
}

/* Whoever holds the lock, if anybody does, is the one that builds the packet, or takes it in. */
static __always_inline bool settled_here(const struct endpoint *ep, const struct tcp_sock *tp)
{
	const struct sock *sk = (const struct sock *)tp;

	return settled(ep, sk, in_use((__u64)sk) ? 1 : 0);
}

/* TCP bytes came with a FIN, or waited when it came, for one that asks FIONREAD, or may as it is told of the end: here that
 * says 0 of them, which it takes for the end. Out of the map they count. */
static __always_inline bool would_miscount(const struct endpoint *ep, const struct tcp_sock *tp)
{
	return knobs.fionread_broken && !fault(UP_FAULT_EARLY_FIN) && tp->rcv_nxt - tp->copied_seq > 1 &&
	       (looks_at(ep->program, ep->self.cookie) & (UP_COUNTS | UP_TOLD)) && settled_here(ep, tp);
}

/* The peer's FIN is in; nobody has been woken for it yet (tcp_fin). Its ACK may be 40 ms away. */
static __always_inline void end_of_file(struct bpf_sock_ops *ctx, struct endpoint *ep)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp;

	tp = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (tp && would_miscount(ep, tp))
		leave(ctx, ep, tp, UP_READER_STUCK);
}

static __always_inline void on_state(struct bpf_sock_ops *ctx)
{
	__u32 state = CTX(args[1]);
	bool shuts = state == BPF_TCP_FIN_WAIT1 || state == BPF_TCP_FIN_WAIT2;
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *ep;

	if (!shuts && state != BPF_TCP_CLOSE_WAIT && state != BPF_TCP_CLOSE)
		return;
	ep = sk ? bpf_sk_storage_get(&endpoints, sk, 0, 0) : 0;
	if (!ep || !ep->role || ep->left)
		return;
	if (shuts && (ep->peer.cookie || meet_server(ep)))
		half_close(ctx, ep);
	if (state == BPF_TCP_CLOSE_WAIT)
		end_of_file(ctx, ep);
	if (state == BPF_TCP_CLOSE && ep->role == UP_CLIENT && !(ep->peer.cookie && ep->certain))
		bpf_map_delete_elem(&handshakes, &ep->numbers); /* should its server not have come */
}

/* A socket that had a connection before, was disconnected and now connects or listens: native TCP has
 * thrown away what it had not read, and so do we. */
static __always_inline void start_afresh(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *ep;
	struct tcp_sock *tp;
	__u8 watched;

	ep = sk ? bpf_sk_storage_get(&endpoints, sk, 0, 0) : 0;
	if (!ep)
		return;
	watched = ep->watched; /* the kernel keeps the callback of a listener that was shut down */
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp && ep->role && !ep->left)
		leave(ctx, ep, tp, UP_PEER_GONE);
	if (ep->told_at)
		clear_flags(ctx, LEAVING_FLAG);
	__builtin_memset(ep, 0, sizeof(*ep));
	ep->watched = watched;
}

/* May a socket that wants out go now, as far as its peer is concerned? It is told first: it redirects nothing to
 * one that is leaving. What it decided before has arrived within a moment, or shows as a thread (settled) - unless the
 * one that holds the lock here is taken for that thread: one that reads TCP bytes holds no psock. Only of one that was
 * seen to send do we know that it is not such a reader. */
static __always_inline bool told(struct bpf_sock_ops *ctx, struct endpoint *ep, const struct tcp_sock *tp,
				 __u64 now)
{
	bool owned = in_use((__u64)tp), quick;
	__u32 flags = CTX(bpf_sock_ops_cb_flags);

	if (!ep->gone_at) /* there is nobody to tell */
		return true;
	if (!(flags & LEAVING_FLAG)) {
		bpf_sock_ops_cb_flags_set(ctx, flags | LEAVING_FLAG);
		ep->told_at = now;
	}
	quick = ep->hasty && (!owned || ep->sender == bpf_get_current_task());
	return now - ep->gone_at > (quick ? GRACE_NS : PATIENCE_NS) && now - ep->told_at > GRACE_NS;
}

/* Nothing by TCP waits but the end of file: its edge comes after that of the bytes before it, as with native TCP. */
static __always_inline bool only_fin(const struct tcp_sock *tp)
{
	return (READER_SOCK(tp).sk_shutdown & RCV_SHUTDOWN) && tp->rcv_nxt - tp->copied_seq == 1;
}

/* Taken in while it was open, and not paired yet (adopt.h): no redirected byte can have been ahead of what waits. */
static __always_inline bool entering(const struct endpoint *ep)
{
	return ep->certain && !ep->peer.cookie;
}

/* Does its window hold back bytes that the peer has for it? Then the peer's probes are packets enough. One of ours would
 * tell of a window that has opened meanwhile, with a number that the peer passes over (tcp_validate_incoming); and the
 * reader, once it takes bytes by TCP, would not tell again (tcp_cleanup_rbuf). */
static __always_inline bool window_shut(const struct endpoint *ep, const struct tcp_sock *tp)
{
	const struct tcp_sock *peer = (const void *)ep->peer_sock;

	if (!peer || tp->rcv_wup + tp->rcv_wnd - tp->rcv_nxt >= tp->advmss || fault(UP_FAULT_VAIN_PROBE))
		return false;
	return READ(peer, write_seq) != tp->rcv_nxt && still_peer(ep);
}

/* How long TCP bytes may wait, with nothing redirected ahead, before their reader counts as stuck. One that asks FIONREAD,
 * and is told of none, reads once with every event, and no more when no bytes come. */
static __always_inline __u64 patience(const struct endpoint *ep)
{
	if (entering(ep))
		return LONG_PATIENCE_NS;
	if (!knobs.fionread_broken || fault(UP_FAULT_EARLY_FIN))
		return PATIENCE_NS;
	return looks_at(ep->program, ep->self.cookie) & UP_COUNTS ? GRACE_NS : PATIENCE_NS;
}

static __noinline void on_packet(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp;
	struct endpoint *ep;
	enum up_reason why;
	__u32 copied;
	bool waits, shut;
	__u64 now;

	ep = sk ? bpf_sk_storage_get(&endpoints, sk, 0, 0) : 0;
	if (!ep || (!ep->role && !ep->observed))
		return;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return;
	if (ep->left) {
		if (!tight(ep) || psock_of((const struct sock *)tp)) /* the flag may be another generation's by now */
			return;
		set_buffer(ctx, ep, tp, BUFFER_WIDE);
		if (!tight(ep))
			clear_flags(ctx, BUILD_FLAG);
		return;
	}
	if (ep->observed) {
		ep->observed = ran(ep->program, tp);
		if (!ep->observed && !psock_of((const struct sock *)tp))
			clear_flags(ctx, BUILD_FLAG);
		return;
	}
	if (handed_over(tp)) /* too late for this one; its program does it once */
		note_sign(ep->program, UP_SIGN_IN_KERNEL);
	if (!ep->certain && !ep->leave)
		server_refused(ep); /* a server that speaks first is acknowledged before we say anything */
	if (!ep->certain && ep->role == UP_SERVER && tp->inet_conn.icsk_inet.sk.sk_socket) {
		why = acceptor((const struct sock *)tp, &ep->program);
		ep->certain = 1;
		if (why != UP_SHORTCUT && !ep->leave)
			wants_out(ep, why);
	}
	if (!ep->leave && guarded(ep))
		wants_out(ep, UP_GUARDED);
	why = ep->leave ? 0 : peer_leaves(ep);
	if (why)
		follow(ep, why);
	set_buffer(ctx, ep, tp, ep->held && in_spell(ep) ? BUFFER_NARROW : BUFFER_ROOMY);
	if (!no_room_left(ctx, ep, tp)) {
		if (settled_here(ep, tp))
			return leave(ctx, ep, tp, UP_SEND_ROOM);
		if (!ep->leave)
			wants_out(ep, UP_SEND_ROOM);
	}
	if (CTX(state) == BPF_TCP_FIN_WAIT1) /* its FIN: a moment later, perhaps a better one */
		return half_close(ctx, ep);
	copied = tp->copied_seq;
	waits = tp->rcv_nxt != copied && !only_fin(tp);
	if (!ep->leave && !ep->ticking && !waits)
		return;
	now = bpf_ktime_get_ns();
	shut = window_shut(ep, tp);
	if (ep->ticking && shut)
		STOP_TICKING(ctx, ep);
	if (ep->leave && told(ctx, ep, tp, now) && settled_here(ep, tp))
		return leave(ctx, ep, tp, ep->leave);
	if (!waits) {
		if (ep->ticking && now - ep->seen_at > PATIENCE_NS)
			STOP_TICKING(ctx, ep);
		return;
	}
	if (knobs.fionread_broken && tp->rcv_nxt - copied > FIRST_READ && tcp_came_first(ep)) {
		leave(ctx, ep, tp, UP_TCP_FIRST);
		return;
	}
	if ((READER_SOCK(tp).sk_shutdown & RCV_SHUTDOWN) && would_miscount(ep, tp)) {
		leave(ctx, ep, tp, UP_READER_STUCK); /* bytes that came with a FIN: see late.h */
		return;
	}
	if (!ep->ticking && !shut)
		start_ticking(ctx, ep);
	if (!ep->seen_at || (__s32)(copied - ep->seen_end) >= 0 || has_unread((const struct sock *)tp)) {
		ep->seen_end = tp->rcv_nxt;
		ep->seen_at = now;
		return;
	}
	if (now - ep->seen_at >= patience(ep) && settled_here(ep, tp))
		leave(ctx, ep, tp, UP_READER_STUCK);
}

#endif
