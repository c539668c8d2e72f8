/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is set on a program's sockets while they are in the map, and put back: a keepalive timer that ticks for us, the
 * size of the send buffer, the mark that a send waits for room. */
#ifndef UNDERPASS_OPTIONS_H
#define UNDERPASS_OPTIONS_H

#include "pair.h"
#include "room.h"

#define KEEP_MOST 127
#define ENDS_LATE 924601 /* ms, for TCP_USER_TIMEOUT: what tcp_retries2 comes to; no value that a program would ask for */
#define NARROW_LEAST 8190 /* no size that a program would ask for */
#define MOST_BUFFER (4 << 20)
#define ROOMY_LEAST (512 << 10) /* what a stream of one node may need; the kernel doubles it */
#define SEGMENT 81920 /* one of 64 KiB, and what the kernel needs for it */
#define SOCK_SNDBUF_LOCK 1
#define SOCK_NOSPACE 2
#define TCP_NOTSENT_LOWAT 25
#define O_NONBLOCK 04000

/* Let the keepalive timer send a packet at every second of silence. Its count is raised, and TCP_USER_TIMEOUT set aside:
 * on a path that has begun to drop packets the program's connection must not end sooner for our sake. */
static __noinline void start_ticking(struct bpf_sock_ops *ctx, struct endpoint *ep)
{
	int on = 0, one = 1, most = KEEP_MOST, late = ENDS_LATE;

	if (bpf_getsockopt(ctx, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)) ||
	    bpf_getsockopt(ctx, SOL_TCP, TCP_KEEPIDLE, &ep->keep_idle, sizeof(int)) ||
	    bpf_getsockopt(ctx, SOL_TCP, TCP_KEEPINTVL, &ep->keep_interval, sizeof(int)) ||
	    bpf_getsockopt(ctx, SOL_TCP, TCP_KEEPCNT, &ep->keep_count, sizeof(int)) ||
	    bpf_getsockopt(ctx, SOL_TCP, TCP_USER_TIMEOUT, &ep->user_timeout, sizeof(int)))
		return;
	ep->ticking = on ? 2 : 1;
	if (ep->user_timeout)
		bpf_setsockopt(ctx, SOL_TCP, TCP_USER_TIMEOUT, &late, sizeof(late));
	bpf_setsockopt(ctx, SOL_TCP, TCP_KEEPCNT, &most, sizeof(most));
	bpf_setsockopt(ctx, SOL_TCP, TCP_KEEPINTVL, &one, sizeof(one));
	bpf_setsockopt(ctx, SOL_TCP, TCP_KEEPIDLE, &one, sizeof(one));
	if (!on)
		bpf_setsockopt(ctx, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
}

/* Sets an option back to what it was, unless the program has changed it meanwhile.
 * `sk` is what bpf_setsockopt takes in the calling program: its context, or the socket. */
#define PUT_BACK(sk, option, ours, was)                                                            \
	({                                                                                         \
		int now = 0;                                                                       \
		if (!bpf_getsockopt(sk, SOL_TCP, option, &now, sizeof(now)) && now == (ours))       \
			bpf_setsockopt(sk, SOL_TCP, option, was, sizeof(int));                     \
	})

#define STOP_TICKING(sk, ep)                                                                       \
	({                                                                                         \
		int off = 0;                                                                       \
		PUT_BACK(sk, TCP_KEEPIDLE, 1, &(ep)->keep_idle);                                   \
		if ((ep)->user_timeout)                                                            \
			PUT_BACK(sk, TCP_USER_TIMEOUT, ENDS_LATE, &(ep)->user_timeout);            \
		PUT_BACK(sk, TCP_KEEPINTVL, 1, &(ep)->keep_interval);                              \
		PUT_BACK(sk, TCP_KEEPCNT, KEEP_MOST, &(ep)->keep_count);                           \
		if ((ep)->ticking == 1 && !used((ep)->self.cookie, UP_KEEPS))                      \
			bpf_setsockopt(sk, SOL_SOCKET, SO_KEEPALIVE, &off, sizeof(off));           \
		(ep)->ticking = 0;                                                                 \
	})

static __always_inline bool sndbuf_locked(const struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_SNDBUF_LOCK;
}

/* Two segments, and the kernel doubles it: fewer than four would wait for delayed ACKs. Or half a message: what does not fit of one
 * that may not wait, the kernel has copied in vain. Odd: no size that a program would ask for. */
static __always_inline int narrow_size(const struct tcp_sock *tp, __u32 message)
{
	__u32 size = 2 * tp->advmss;

	if (size < message >> 1)
		size = message >> 1 | 1;
	return size < NARROW_LEAST ? NARROW_LEAST : size;
}

/* A sender that runs beside its reader, or waits in poll, may never find all consumed: then it has the narrow buffer for a
 * spell only, and again from time to time, and else the speed of TCP. */
#define SPELL 64 /* messages */
#define SPELLS 1024
static __always_inline bool in_spell(const struct endpoint *ep)
{
	return ep->unread_row % SPELLS < SPELL;
}

/* As far as TCP would widen it by itself, if we may; the kernel doubles it. Odd, as above. */
static __always_inline int wide_size(const struct sock *sk)
{
	const struct net *net = READ(sk, __sk_common.skc_net.net);
	__u32 size = (__u32)READ(net, ipv4.sysctl_tcp_wmem[2]) >> 1;

	if (size > knobs.buffer_most)
		size = knobs.buffer_most;
	return (size - 1) | 1;
}

/* What TCP has made it until now, but no narrower than a stream of one node may need, nor wider than above. */
static __always_inline int roomy_size(const struct sock *sk, int size)
{
	int wide = wide_size(sk);

	if (size < ROOMY_LEAST)
		size = ROOMY_LEAST;
	return size < wide ? size | 1 : wide;
}

static __always_inline int buffer_of(const struct sock *sk)
{
	return READ(sk, sk_sndbuf);
}

/* It has still to be made as wide as TCP would. */
static __always_inline bool tight(const struct endpoint *ep)
{
	return ep->buffer_is == BUFFER_NARROW || ep->buffer_is == BUFFER_ROOMY;
}

static __always_inline bool buffer_is_ours(const struct endpoint *ep, const struct sock *sk)
{
	return ep->buffer_is && buffer_of(sk) == ep->buffer;
}

/* The largest that we ask for. */
static __always_inline int most_buffer(void)
{
	return knobs.buffer_most < MOST_BUFFER ? (int)knobs.buffer_most : MOST_BUFFER;
}

/* The largest SO_SNDBUF that no_room_left() can do with: of twice what may be asked for, a third must be free, whatever
 * waits; and what waits can be more by one segment. */
static __always_inline int most_in_map(void)
{
	int most = (__u32)most_buffer() / 3 * 2 - SEGMENT / 2;

	return most < NARROW_LEAST ? NARROW_LEAST : most;
}

/* Can a thread sleep in a read of it? */
static __always_inline bool blocks(const struct sock *sk)
{
	const struct socket *socket = READ(sk, sk_socket);
	const struct file *file = READ(socket, file);

	return !(READ(file, f_flags) & O_NONBLOCK);
}

static __noinline void resize(struct bpf_sock_ops *ctx, struct endpoint *ep, const struct tcp_sock *tp, __u8 as,
			      int size)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	int most = most_in_map();

	if (as != BUFFER_WIDE && size > most && blocks(sk))
		size = most | 1;
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)))
		return;
	ep->buffer_is = as;
	ep->buffer = buffer_of(sk);
}

/* Over budget, TCP holds the sender - but with megabytes in its send buffer it would fill that again as
 * fast as it drains, and the gate would never see a moment at which all is consumed: on a slow path the
 * stream would stay on TCP for good. With a narrow buffer the sender stops after a message or two, the
 * reader catches up, and the shortcut is back. A size that the program chose itself is left alone. */
static __noinline void set_buffer(struct bpf_sock_ops *ctx, struct endpoint *ep, const struct tcp_sock *tp, __u8 as)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;

	if (ep->buffer_is && !buffer_is_ours(ep, sk))
		ep->buffer_is = BUFFER_UNTOUCHED;
	if (!ep->buffer_is && sndbuf_locked(sk) && buffer_of(sk) == 2 * wide_size(sk)) { /* by a generation before us */
		ep->buffer_is = BUFFER_WIDE;
		ep->buffer = buffer_of(sk);
	}
	if (as != BUFFER_NARROW && crowded(ep))
		as = BUFFER_NARROW;
	if (as == ep->buffer_is || (!ep->buffer_is && (as != BUFFER_NARROW || sndbuf_locked(sk))))
		return;
	if (psock_of(sk) && reader_sleeps(ep->sock) && !fault(UP_FAULT_ROUSING)) /* this would wake it: see no_room_left() */
		return;
	resize(ctx, ep, tp, as, as == BUFFER_NARROW ? narrow_size(tp, ep->held) : wide_size(sk));
}

static __always_inline bool waits_for_room(const struct sock *sk)
{
	const struct socket *socket = READ(sk, sk_socket);

	return READ(socket, flags) >> SOCK_NOSPACE & 1;
}

/* A send has left the mark that it waits for room, though it found some (sk_stream_wait_memory). An ACK then wakes whoever
 * sleeps on the socket, and a reader in the map that is woken for nothing returns EAGAIN (tcp_msg_wait_data). So the mark
 * is taken away while nobody sleeps: by room, which a change of the buffer's size tells of, and then that is as before.
 * False if the program has chosen a buffer in which as much waits as cannot be outgrown. */
static __noinline bool no_room_left(struct bpf_sock_ops *ctx, struct endpoint *ep, const struct tcp_sock *tp)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	int size = (__u32)buffer_of(sk) >> 1, most = most_buffer(), lowat = 0, none = -1;
	bool own = sndbuf_locked(sk) && !buffer_is_ours(ep, sk);

	if (!waits_for_room(sk) || !blocks(sk) || sleepers(ep->sock) || fault(UP_FAULT_ROUSING))
		return true;
	if (bpf_getsockopt(ctx, SOL_TCP, TCP_NOTSENT_LOWAT, &lowat, sizeof(lowat)))
		return true;
	bpf_setsockopt(ctx, SOL_TCP, TCP_NOTSENT_LOWAT, &none, sizeof(none)); /* is a third of it free as it is? */
	if (waits_for_room(sk) && !(own && size > most)) { /* that could not be put back */
		bpf_setsockopt(ctx, SOL_SOCKET, SO_SNDBUF, &most, sizeof(most));
		if (own)
			bpf_setsockopt(ctx, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
		else if (ep->buffer_is == BUFFER_NARROW)
			resize(ctx, ep, tp, BUFFER_NARROW, narrow_size(tp, ep->held));
		else
			resize(ctx, ep, tp, BUFFER_ROOMY, roomy_size(sk, size));
	}
	bpf_setsockopt(ctx, SOL_TCP, TCP_NOTSENT_LOWAT, &lowat, sizeof(lowat));
	return !own || !waits_for_room(sk);
}

#endif
