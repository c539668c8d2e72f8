/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Connections that already are: opened before us, while their programs were watched, or gone from the map. User
 * space finds the two ends and orders, step by step, what is done here under each socket's lock.
 *
 * Proof: how many bytes a socket has had acknowledged and received tells at any time from which number it began. The two
 * numbers mirror at the two ends as they do in the handshake (pair.h), and the server's view of the client agrees.
 *
 * The danger is a thread that chose native recv before the socket entered and goes to sleep there after the pair was
 * made: redirected bytes never wake it. So entering and pairing lie apart. From entering on, new calls take the other
 * recv. A thread of a holder that has begun another call since then is out of it. One that has been seen asleep, and
 * not for a socket's lock, is either elsewhere or asleep on this socket, where `reader_waits_for_tcp` sees it. Who the
 * holders are is known when every reference to the file is explained (check). */
#ifndef UNDERPASS_ADOPT_H
#define UNDERPASS_ADOPT_H

#include "walk.h"

/* Threads that have begun a system call since `up_awake` was attached, by their number. Emptied by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, __u32);
	__type(value, __u32);
} awake SEC(".maps");

static __always_inline void note_awake(void)
{
	__u32 thread = bpf_get_current_pid_tgid(), one = 1;

	if (!bpf_map_lookup_elem(&awake, &thread))
		bpf_map_update_elem(&awake, &thread, &one, BPF_ANY);
}

/* A client's number is that of its SYN, which counts among the acknowledged bytes (tcp_rcv_synsent_state_process). */
static __always_inline __u32 sent_from(const struct tcp_sock *tp)
{
	return tp->snd_una - (__u32)tp->bytes_acked;
}

static __always_inline __u32 received_from(const struct tcp_sock *tp)
{
	return tp->rcv_nxt - (__u32)tp->bytes_received;
}

static __always_inline void standing(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct up_standing r = {};
	struct endpoint *ep;
	struct tcp_sock *tp;
	struct sock *sk;

	if (!skc || skc->skc_state != BPF_TCP_ESTABLISHED)
		return;
	tp = bpf_skc_to_tcp_sock(skc);
	sk = (struct sock *)tp;
	if (!tp || taken(sk) || !covered(sk))
		return;
	r.cookie = bpf_get_socket_cookie(tp);
	r.inode = BPF_CORE_READ(sk, sk_socket, file, f_inode, i_ino);
	r.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	r.sent_from = sent_from(tp);
	r.received_from = received_from(tp);
	read_sock_ends(sk, &r.local, &r.remote);
	ep = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	if (ep) {
		r.peer = ep->peer.cookie;
		r.left_at = ep->left_at;
		r.leaves = ep->leaves;
		r.reason = ep->reason;
	}
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
}

/* References to the socket's file: descriptors, and calls of threads that share theirs. */
static __always_inline __u64 references(const struct sock *sk)
{
	const struct file *file = BPF_CORE_READ(sk, sk_socket, file);
	const struct file___v613 *v613 = (const void *)file;
	const struct file___v61 *v61 = (const void *)file;

	if (!file)
		return 0;
	if (bpf_core_field_exists(v613->f_ref))
		return READ(v613, f_ref.refcnt.counter) + 1;
	return READ(v61, f_count.counter);
}

/* Have numbers been rewritten on the way, as by a NAT helper that made a line longer? While our lock is held, the other
 * end cannot have received more than we sent, nor less than what it has acknowledged. */
static __always_inline bool shifted(const struct up_order *order, const struct tcp_sock *tp)
{
	const struct up_order *other = bpf_map_lookup_elem(&orders, &order->peer);
	const struct tcp_sock *peer = other ? (const void *)other->sock : 0;
	__u32 received;

	if (!peer)
		return true;
	received = READ(peer, rcv_nxt);
	return (__s32)(received - tp->write_seq) > 0 || (__s32)(tp->snd_una - received) > 0;
}

/* Is it held by those alone that user space has seen, and all that are inside a call on it where we see them? A call
 * of a thread among several holds a reference to the file, and so does whoever waits in poll or select. Inside our recv
 * a call holds one to the psock, too; asleep inside the native one it shows in the wait queue. What is beyond is
 * explained by nobody. Calls come and go while we count: then the references are others afterwards, and a later look
 * may be luckier. */
static __always_inline enum up_reason check(const struct up_order *order, const struct tcp_sock *tp)
{
	const struct sock *sk = (const struct sock *)tp;
	__u64 refs = references(sk);
	int calls = inside(sk), native = native_readers(order->sock), polls = knobs.poll_wake ? waiters(order->sock, knobs.poll_wake, 0) : 0;
	int beyond = (int)refs - (int)order->descriptors - polls;

	if (fault(UP_FAULT_HASTY_PAIR))
		return UP_SHORTCUT;
	if (shifted(order, tp))
		return UP_AMBIGUOUS;
	if (!order->descriptors || polls < 0 || native < 0 || refs != references(sk))
		return UP_READER_WAITS;
	if (!order->threaded)
		calls = native = 0;
	return beyond >= 0 && beyond <= calls + native ? UP_SHORTCUT : UP_READER_WAITS;
}

/* Sets the callbacks that an endpoint needs. A foreign program's are marked, so that they outlive us. */
static __always_inline bool set_callbacks(struct tcp_sock *tp, const struct endpoint *before, int wanted)
{
	int flags = tp->bpf_sock_ops_cb_flags;

	if (before->told_at)
		flags &= ~LEAVING_FLAG;
	if ((flags & BUILD_FLAG) && !before->observed && !(before->left && tight(before)) &&
	    !bpf_sk_storage_get(&shared_listeners, (struct sock *)tp, 0, BPF_SK_STORAGE_GET_F_CREATE))
		return false;
	return !(flags & LEAVING_FLAG) && set_flags(tp, flags | wanted);
}

static __always_inline enum up_reason let_in(struct up_order *order, struct tcp_sock *tp)
{
	struct sock *sk = (struct sock *)tp;
	struct endpoint *ep;
	enum up_reason why;
	__u64 kept[3], left_at;
	__u8 leaves, buffer_is;
	int buffer;
	__u32 signs;
	long error;

	if (taken(sk))
		return UP_SOCKET_BUSY;
	if (READER_SOCK(tp).sk_shutdown)
		return UP_CLOSING;
	/* Its reader may have been told of them for the last time, and where FIONREAD misses them it never asks again. */
	if (knobs.fionread_broken && tp->rcv_nxt != tp->copied_seq && !fault(UP_FAULT_LATE_EVENT))
		return UP_TCP_UNREAD;
	signs = signs_of(tp);
	if (signs)
		note_sign(order->program, signs);
	if (tp->inet_conn.icsk_ulp_ops)
		return UP_ULP;
	if (bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ_BITFIELD(tp, is_mptcp))
		return UP_NOT_SUITABLE;
	why = admitted(order->program);
	if (why != UP_SHORTCUT)
		return why;
	if (!permitted((__u64)tp, order->role))
		return UP_POLICY;
	ep = bpf_sk_storage_get(&endpoints, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!ep)
		return UP_NO_MEMORY;
	if (!set_callbacks(tp, ep, BUILD_FLAG | CLOSE_FLAG)) /* first: without them it could not leave */
		return UP_NOT_SUITABLE;
	__builtin_memcpy(kept, &ep->shortcut_bytes, sizeof(kept)); /* what went so far */
	left_at = ep->left_at;
	buffer_is = ep->buffer_is;
	buffer = ep->buffer;
	leaves = ep->leaves;
	__builtin_memset(ep, 0, sizeof(*ep));
	__builtin_memcpy(&ep->shortcut_bytes, kept, sizeof(kept));
	ep->left_at = left_at;
	ep->buffer_is = buffer_is;
	ep->buffer = buffer;
	ep->leaves = leaves;
	ep->self.cookie = bpf_get_socket_cookie(tp);
	ep->numbers = ep->self.numbers = *(const struct numbers *)&order->number;
	error = bpf_map_update_elem(&sockets, &ep->self, sk, BPF_NOEXIST);
	if (error) {
		put_back(tp, ep);
		return ep->reason = why_not_inserted(error);
	}
	ep->sock = (__u64)tp;
	ep->mark = ep->shortcut_bytes;
	ep->role = order->role;
	ep->reason = UP_NO_MESSAGE;
	ep->program = order->program;
	ep->peer_program = order->peer_program;
	ep->epoch = ~0ull; /* the first message looks at the verdicts */
	ep->loopback = order->loopback;
	ep->certain = 1; /* who holds it was looked at */
	order->sock = (__u64)tp;
	order->state = (__u64)ep;
	return UP_SHORTCUT;
}

static __always_inline enum up_reason make_pair(const struct up_order *order, struct endpoint *ep,
						const struct tcp_sock *tp)
{
	const struct up_order *other = bpf_map_lookup_elem(&orders, &order->peer);

	if (ep && ep->peer.cookie == order->peer && !ep->left)
		return UP_SHORTCUT; /* a pass that was killed had come this far */
	if (!ep || !ep->role || ep->left || !other || !other->sock)
		return UP_PEER_REFUSED;
	ep->peer_sock = other->sock;
	ep->peer_state = other->state;
	ep->peer.numbers = ep->self.numbers;
	ep->redirect_seq = tp->write_seq;
	ep->ask = 1; /* a reader may sleep in native recv */
	ep->epoch = ~0ull; /* as packets of ours looked at the verdicts the peer was not known */
	*(volatile __u64 *)&ep->peer.cookie = order->peer;
	if (ep->role == UP_SERVER)
		count_socket(UP_SHORTCUT);
	return UP_SHORTCUT;
}

/* Nobody has redirected to one whose order did not come to pairing. */
static __always_inline enum up_reason give_up(const struct up_order *order, struct endpoint *ep,
					      struct tcp_sock *tp)
{
	if (!ep || !ep->role || ep->left || ep->peer.cookie)
		return UP_SHORTCUT;
	if (has_unread((const struct sock *)tp)) /* not to be: the other end was paired */
		return UP_READER_WAITS;
	bpf_map_delete_elem(&sockets, &ep->self);
	if (order->answer == UP_READER_WAITS)
		note_left(ep); /* it waits before it is tried again */
	ep->left = ep->role = 0;
	ep->reason = order->answer < UP_REASON_MAX ? order->answer : UP_READER_WAITS;
	ep->peer.cookie = order->peer; /* the two were proven to be one connection */
	put_back(tp, ep);
	return UP_SHORTCUT;
}

/* What keep_out() does in a handshake. */
static __always_inline enum up_reason watch_on(const struct up_order *order, struct tcp_sock *tp)
{
	struct sock *sk = (struct sock *)tp;
	struct endpoint *ep;

	if (admitted(order->program) != UP_OBSERVED || taken(sk))
		return UP_SHORTCUT;
	ep = bpf_sk_storage_get(&endpoints, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!ep || ep->observed || !set_callbacks(tp, ep, BUILD_FLAG))
		return UP_SHORTCUT;
	ep->role = ep->left = 0;
	ep->program = order->program;
	ep->reason = UP_OBSERVED;
	ep->observed = 1;
	return UP_SHORTCUT;
}

static __always_inline void adopt(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct up_order *order;
	struct endpoint *ep;
	struct tcp_sock *tp;
	__u64 cookie;

	if (!skc || skc->skc_state != BPF_TCP_ESTABLISHED)
		return;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		return;
	cookie = bpf_get_socket_cookie(tp);
	order = bpf_map_lookup_elem(&orders, &cookie);
	if (!order)
		return;
	ep = bpf_sk_storage_get(&endpoints, (struct sock *)tp, 0, 0);
	if (order->step == UP_GIVE_UP) {
		order->answer = give_up(order, ep, tp);
		return;
	}
	if (draining() || closed()) {
		order->answer = UP_DRAINING;
		return;
	}
	if (sent_from(tp) != order->sent_from || received_from(tp) != order->received_from) {
		order->answer = UP_AMBIGUOUS;
		return;
	}
	switch (order->step) {
	case UP_WATCH:
		order->answer = watch_on(order, tp);
		break;
	case UP_ENTER:
		order->answer = let_in(order, tp);
		break;
	case UP_CHECK:
		order->answer = check(order, tp);
		break;
	case UP_PAIR:
		order->answer = make_pair(order, ep, tp);
		break;
	}
}

#endif
