/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Rule 4, never slower. TCP joins the small messages of a stream into segments; the shortcut allocates, locks and
 * wakes for each. So a direction that streams them leaves the map (stuck.h), and its sends and the reads at the
 * other end are native again.
 *
 * How small is small depends on the road, and on whether the reader shares the sender's core: on another one it
 * takes TCP's segments while the next is filled. A core that is shared switches between the two all the time.
 *
 * What is no stream: messages that a reader takes one by one (it holds nothing unread as the next comes), and
 * requests, however many are under way at once: their answers come back. So a run of small messages to a busy
 * reader counts, large ones outweigh it, and what the peer has sent meanwhile acquits it. */
#ifndef UNDERPASS_SMALL_H
#define UNDERPASS_SMALL_H

#include "pair.h"

#define RUN 256             /* small messages before a direction is judged */
#define PER_ANSWER 32       /* of them for each answer, or more, are a stream */
#define ANSWER_SHIFT 12     /* this many bytes of an answer count as another one */
#define OUTWEIGH_SHIFT 11   /* and of a large message as a small one that was not sent */
#define PER_SWITCH 32       /* of them, or fewer, for each time that the sender is made to yield: to the reader */
#define RUNS_ALIKE 4        /* runs before it is believed where the reader runs */
#define TCP_NAGLE_OFF 1

/* How much the peer has sent so far: its messages, and the larger the more. ~0 = cannot tell. The storage lives
 * as long as its socket, and the cookie in it tells whose it is. */
static __always_inline __u64 answers(const struct endpoint *ep)
{
	const struct endpoint *at = (const void *)ep->peer_state;
	struct { __u64 bytes, messages, by_tcp; } sent;
	__u64 cookie = 0;

	if (bpf_probe_read_kernel(&sent, sizeof(sent), &at->shortcut_bytes) ||
	    bpf_probe_read_kernel(&cookie, sizeof(cookie), &at->self.cookie) || cookie != ep->peer.cookie)
		return ~0ull;
	return sent.messages + sent.by_tcp + (sent.bytes >> ANSWER_SHIFT);
}

static __always_inline enum up_road road(const struct endpoint *ep, const struct tcp_sock *tp)
{
	bool nodelay = BPF_CORE_READ_BITFIELD(tp, nonagle) & TCP_NAGLE_OFF;

	if (ep->loopback)
		return nodelay ? UP_LOOPBACK_NODELAY : UP_LOOPBACK;
	return nodelay ? UP_VIRTUAL_NODELAY : UP_VIRTUAL;
}

/* How often the sender has been taken off its core. That it sleeps, for a lock that the reader holds, tells nothing. */
static __always_inline __u32 switches(void)
{
	return bpf_get_current_task_btf()->nivcsw;
}

/* Did the reader take what was sent in this run while the sender's core was left to the sender? */
static __always_inline bool ran_beside(const struct endpoint *ep, __u32 sent, __u32 taken)
{
	__s32 left = (sent - ep->sent) / 4 - (taken - ep->taken); /* of a quarter of it; wraps as the numbers do */

	return left <= 0 && switches() - ep->switches < RUN / PER_SWITCH;
}

/* Runs in a row that were alike: above 0 beside, below 0 not. */
static __always_inline void note_side(struct endpoint *ep, bool beside)
{
	if (beside)
		ep->side = ep->side < 0 ? 1 : ep->side + (ep->side < RUNS_ALIKE);
	else
		ep->side = ep->side > 0 ? -1 : ep->side - (ep->side > -RUNS_ALIKE);
}

/* The reader has taken all, so that nothing is overtaken, and a reader of both kinds of bytes, one that peeks or one
 * that is told of edges, meets each by itself. A thread that sleeps in a read of this very socket would be woken for
 * nothing by the room that TCP makes (tcp_msg_wait_data), and keep it in tcp_bpf: then the stream stays. */
static __always_inline bool goes_now(struct endpoint *ep)
{
	ep->emptying = 0;
	if (ep->leave || sleepers(ep->sock))
		return false;
	wants_out(ep, UP_SMALL_STREAM);
	ep->hasty = 1;
	return true;
}

/* Called for each message; true = this direction streams small ones. */
static __always_inline bool streams_small(struct endpoint *ep, const struct up_control *ctl,
					  const struct tcp_sock *tp, __u32 size, const struct reader *r)
{
	__u32 bound, beside, sent, taken, less = 1, at;
	__u64 now;

	if (!r->unread && !ep->small)
		return false;
	at = 2 * road(ep, tp);
	bound = ctl->small[at & (2 * UP_ROADS - 1)];
	beside = ctl->small[(at + 1) & (2 * UP_ROADS - 1)];
	if (size >= bound && size >= beside)
		less += size >> OUTWEIGH_SHIFT;
	else if (r->unread)
		less = 0;
	if (less) {
		ep->small -= less < ep->small ? less : ep->small;
		return false;
	}
	if (ep->small && ep->small < RUN - 1) {
		ep->small++;
		return false;
	}
	sent = (__u32)ep->shortcut_bytes + tp->write_seq;
	taken = (__u32)ep->shortcut_bytes - r->unread + r->copied_seq;
	now = answers(ep);
	if (ep->small) { /* the run ends */
		note_side(ep, ran_beside(ep, sent, taken));
		if (ep->side == -RUNS_ALIKE || (ep->side != RUNS_ALIKE && bound < beside))
			beside = bound; /* while it is not clear where the reader runs, what is small on any core counts */
		if (size < beside && now != ~0ull && ep->answered != ~0ull && !sleepers(ep->sock) &&
		    (now - ep->answered < RUN / PER_ANSWER || fault(UP_FAULT_DEAF)))
			return true;
	}
	ep->small = 1;
	ep->answered = now;
	ep->sent = sent;
	ep->taken = taken;
	ep->switches = switches();
	return false;
}

#endif
