/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Rules 2 and 3, for each message of an endpoint in the map: switch only when drained, bound what waits (budget.h).
 * Runs under the sender's socket lock, so its own numbers stand still. */
#ifndef UNDERPASS_STEER_H
#define UNDERPASS_STEER_H

#include "budget.h"
#include "options.h"
#include "small.h"

#define LATE 4 /* messages in a row by TCP before the reader is waited for, with this and each power of two, and in each spell */
#define SMALL_PROOF 4096 /* fills no send buffer */

/* Could a reader be inside native tcp_recvmsg, where it never sees a redirected byte (MSG_WAITALL, one
 * of several readers, one that slept since before the handshake)? Asked once per switch from TCP, after
 * the gate has opened: whoever copied the last TCP byte then still owns the socket, or sleeps in its wait
 * queue, or is gone. */
static __always_inline bool reader_waits_for_tcp(__u64 sock)
{
	return in_use(sock) || native_readers(sock) != 0;
}

/* May this message turn to TCP though none has to? Not where one would not be told of it: a reader that counts what this
 * kernel does not, or peeks for the rest of a record behind what waits. Nor where a thread asleep in a read of the
 * sender's own socket would be woken for nothing (tcp_msg_wait_data) by the room that TCP makes, if it ran out of that. */
static __always_inline bool may_turn(const struct endpoint *ep, const struct tcp_sock *tp, __u32 unread, __u32 size)
{
	__u32 looks = looks_at(ep->peer_program, ep->peer.cookie);

	if ((knobs.fionread_broken && looks & UP_COUNTS) || (unread && looks & UP_PEEKS))
		return false;
	return (size <= SMALL_PROOF && tp->snd_una == tp->write_seq) || !sleepers(ep->sock);
}

/* As held_for_long(), while the other end can see that we look on. Who may not turn sleeps. */
static __always_inline bool reader_busy(struct endpoint *ep, const struct tcp_sock *tp, __u32 unread, __u32 size)
{
	bool held;

	if (!in_use(ep->peer_sock) || fault(UP_FAULT_SLEEPY) || order_at_stake(ep))
		return false;
	*(volatile __u8 *)&ep->waits = 1;
	held = held_for_long(ep->peer_sock, ep->peer_state, unread);
	*(volatile __u8 *)&ep->waits = 0;
	return held && may_turn(ep, tp, unread, size);
}

/* While the other end can see it. */
static __always_inline void wait_for_reader(struct endpoint *ep, __u32 written)
{
	*(volatile __u8 *)&ep->waits = 1;
	let_catch_up(ep->peer_sock, written);
	*(volatile __u8 *)&ep->waits = 0;
}

/* The gate: has the reader consumed all that ever went by TCP? */
static __always_inline bool all_consumed(const struct endpoint *ep, const struct tcp_sock *tp,
					 const struct reader *r, __u32 written)
{
	if (r->copied_seq == written || fault(UP_FAULT_NO_GATE | UP_FAULT_ADDRESS_KEYS))
		return true;
	if (fault(UP_FAULT_ACKED_GATE))
		return tp->snd_una == written;
	return fault(UP_FAULT_STALE_PEER) && ep->redirect_seq == written; /* it was open, and we have sent nothing by TCP since */
}

/* Has the reader received more than we sent? Then NAT rewrites the stream, and the gate would compare in vain. The
 * twins that are not sure of their peer would be saved by this. */
static __always_inline bool rewritten(const struct reader *r, __u32 written)
{
	return (__s32)(r->rcv_nxt - written) > 0 &&
	       !fault(UP_FAULT_SHIFTED | UP_FAULT_ADDRESS_KEYS | UP_FAULT_STALE_PEER | UP_FAULT_NO_PROOF);
}

/* Shall this message meet the network path, so that a rule that drops it by now stops the stream, and conntrack sees
 * that it lives? At best while nothing waits for the reader: bytes that come by TCP behind others have no edge of
 * their own (stuck.h), and one that peeks for a whole record would never see its rest. At the end of the interval also
 * else, if the reader has taken meanwhile what waited before. */
static __always_inline bool proof_due(struct endpoint *ep, const struct tcp_sock *tp, __u32 size, __u64 interval,
				      const struct reader *r)
{
	__u64 now, age;

	if (ep->tick == bpf_jiffies64())
		return false;
	ep->tick = bpf_jiffies64();
	now = bpf_ktime_get_coarse_ns();
	age = now - ep->proved_at;
	if (!ep->proved_at) {
		ep->proved_at = now;
		ep->proof_mark = 0;
		return false;
	}
	if (age < interval - interval / 4)
		return false;
	if (r->unread) {
		if (!ep->proof_mark)
			ep->proof_mark = ep->shortcut_bytes;
		if (age < interval || ep->shortcut_bytes - r->unread < ep->proof_mark)
			return false;
	}
	if (fault(UP_FAULT_RASH_PROOF) || may_turn(ep, tp, r->unread, size))
		return true;
	ep->proved_at = now - (interval - interval / 4) + interval / 16; /* not with every message from now on */
	return false;
}

/* The sender itself: without a call into the kernel where that can be saved. */
static __always_inline const struct tcp_sock *own_sock(const struct endpoint *ep, struct bpf_sock *sk)
{
	if (knobs.rdonly_cast)
		return bpf_rdonly_cast((const void *)ep->sock, bpf_core_type_id_kernel(struct tcp_sock));
	return bpf_skc_to_tcp_sock(sk);
}

/* Why this direction redirects no more, whatever its reader does; 0 = it still may. */
static __always_inline enum up_reason turned_away(struct endpoint *ep)
{
	enum up_reason why = 0;

	if (guarded(ep))
		why = UP_MARKED;
	else if (ep->barred)
		why = UP_POLICY;
	else if (ep->leave == UP_SMALL_STREAM)
		why = UP_LEAVING;
	else if (ep->leave == UP_AMBIGUOUS)
		return UP_TCP_UNREAD;
	return why && order_at_stake(ep) ? 0 : why;
}

static __always_inline enum up_reason decide(struct sk_msg_md *msg, struct bpf_sock *sk,
					     struct endpoint *ep)
{
	const struct tcp_sock *tp;
	struct up_control *ctl = controls();
	enum up_reason reason;
	struct reader r = {};
	__u32 written;

	if (unlikely(!ctl))
		return UP_NO_STATE;
	if (unlikely(ctl->stop))
		return ctl->stop == UP_PAUSED ? UP_PAUSED : UP_DRAINING;
	if (unlikely(!ep->peer.cookie && !meet_server(ep)))
		return UP_UNPAIRED;
	reason = turned_away(ep);
	if (unlikely(reason))
		return reason;
	if (unlikely(sk->state != BPF_TCP_ESTABLISHED && sk->state != BPF_TCP_CLOSE_WAIT))
		return UP_CLOSING;
	tp = own_sock(ep, sk);
	if (unlikely(!tp))
		return UP_NO_STATE;
	if (unlikely(ep->unread_row >= LATE &&
		     (!(ep->unread_row & (ep->unread_row - 1)) || ep->unread_row % SPELLS == SPELL / 2)))
		wait_for_reader(ep, tp->write_seq);
	look(ep->peer_sock, &r);
	if (unlikely(r.cookie != ep->peer.cookie && !fault(UP_FAULT_STALE_PEER)))
		return UP_PEER_GONE;
	if (unlikely(r.leaving && !r.unread && !order_at_stake(ep))) /* what waits there is read before it leaves */
		return UP_PEER_GONE;
	if (unlikely(!server_accepted(ep)))
		return UP_UNPAIRED;
	if (unlikely(r.shutdown)) /* one that has shut down its own side leaves the map: see half_close() */
		return UP_CLOSING;
	if (unlikely(r.ulp))
		return UP_ULP;
	barrier(); /* or clang joins the two pointers with |, which the verifier refuses */
	if (unlikely(tp->inet_conn.icsk_ulp_ops))
		return UP_ULP;
	if (unlikely(uses_error_queue(tp)))
		return UP_ZEROCOPY;
	if (unlikely(r.lowat > 1))
		return UP_RCVLOWAT;
	if (unlikely(r.peek_off >= 0))
		return UP_PEEK_OFF;
	if (!ep->leave && !ep->emptying && streams_small(ep, ctl, tp, msg->size, &r))
		ep->emptying = 1;
	if (unlikely(ep->emptying && !r.unread && goes_now(ep)))
		return UP_LEAVING;
	if (unlikely(ctl->reproof_ns && proof_due(ep, tp, msg->size, ctl->reproof_ns, &r) && !order_at_stake(ep)))
		return UP_REPROOF;
	if (unlikely(ctl->forced && (bpf_get_prandom_u32() & 0xffff) < ctl->forced))
		return UP_FORCED;
	written = tp->write_seq;
	if (rewritten(&r, written)) {
		if (!ep->leave)
			wants_out(ep, UP_AMBIGUOUS);
		return UP_TCP_UNREAD;
	}
	if (unlikely(!all_consumed(ep, tp, &r, written)))
		return UP_TCP_UNREAD;
	if (ep->redirect_seq != written)
		ep->ask = 1;
	if (ep->ask && !fault(UP_FAULT_NO_GATE | UP_FAULT_BLIND_READER)) {
		if (!psock_of((const struct sock *)ep->peer_sock))
			return UP_PEER_GONE; /* it has left the map */
		if (reader_waits_for_tcp(ep->peer_sock))
			return UP_READER_WAITS;
	}
	reason = over_budget(ep, tp, &r, msg->size);
	if (fault(UP_FAULT_NO_BUDGET))
		reason = UP_SHORTCUT;
	if (reason == UP_SHORTCUT && unlikely(reader_busy(ep, tp, r.unread, msg->size)))
		reason = UP_READER_BUSY;
	if (unlikely(reason != UP_SHORTCUT)) {
		ep->held = r.unread >= knobs.shallow_bytes ? msg->size : 0;
		return reason;
	}
	if (unlikely(bpf_msg_redirect_hash(msg, &sockets, &ep->peer, BPF_F_INGRESS) != SK_PASS))
		return UP_PEER_GONE;
	ep->redirect_seq = written;
	ep->ask = 0;
	return UP_SHORTCUT;
}

/* Reasons that are over when the reader has read. */
#define SOON_OVER                                                                                  \
	(1ull << UP_BUDGET_BYTES | 1ull << UP_BUDGET_MESSAGES | 1ull << UP_NODE_BUDGET |           \
	 1ull << UP_NODE_MEMORY | 1ull << UP_CGROUP_MEMORY | 1ull << UP_TCP_UNREAD |               \
	 1ull << UP_READER_WAITS | 1ull << UP_READER_BUSY | 1ull << UP_REPROOF)

/* What the state of a socket in the map says of its program: the other connections stay on TCP, too. */
static __always_inline void learn(const struct endpoint *ep, struct bpf_sock *sk, enum up_reason reason)
{
	const struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	if (reason == UP_RCVLOWAT)
		note_sign(ep->peer_program, UP_SIGN_RCVLOWAT);
	else if (reason == UP_ZEROCOPY)
		note_sign(ep->program, UP_SIGN_ZEROCOPY);
	else if (reason == UP_ULP)
		note_sign(tp && tp->inet_conn.icsk_ulp_ops ? ep->program : ep->peer_program, UP_SIGN_ULP);
}

static __always_inline int steer(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct up_counters *c = count();
	struct endpoint *ep = sk ? bpf_sk_storage_get(&endpoints, sk, 0, 0) : 0;
	enum up_reason reason = ep ? decide(msg, sk, ep) : UP_NO_STATE;

	if (c) {
		c->messages[reason]++;
		if (reason == UP_SHORTCUT)
			c->shortcut_bytes += msg->size;
	}
	if (unlikely(!ep))
		return SK_PASS;
	if (unlikely(reason != ep->reason))
		learn(ep, sk, reason);
	ep->reason = reason;
	if (reason == UP_SHORTCUT) {
		ep->held = 0;
		ep->unread_row = 0;
		ep->shortcut_bytes += msg->size;
		ep->shortcut_messages++;
		ep->newer++;
	} else {
		ep->emptying = 0;
		ep->proved_at = 0;
		ep->tcp_messages++;
		ep->unread_row = reason == UP_TCP_UNREAD ? ep->unread_row + 1 : 0;
		if (!(SOON_OVER >> reason & 1)) /* TCP for longer: with all the room that there is */
			ep->held = 0;
		if (reason == UP_LEAVING)
			ep->sender = bpf_get_current_task();
		if (reason == UP_PEER_GONE && !ep->leave)
			follow(ep, peer_leaves(ep) ?: UP_PEER_GONE);
		if (reason == UP_MARKED && !ep->leave)
			wants_out(ep, UP_GUARDED);
		if (fault(UP_FAULT_SK_DROP))
			return SK_DROP;
	}
	return SK_PASS;
}

#endif
