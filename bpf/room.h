/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Rule 3, too: bytes that come by TCP behind redirected ones find room in the reader's receive buffer.
 *
 * Once what waits has outgrown that, TCP drops bytes that it has told a window for (tcp_try_rmem_schedule). Their sender
 * waits for a timer that backs off for as long as the reader stalls: no window update ends that, and a sender that has
 * closed gives up (tcp_orphan_retries). So there stays room for what may be under way: the window that was told, or what
 * fits in the send buffer; and that stays narrow as long as a wide one would be too much. */
#ifndef UNDERPASS_ROOM_H
#define UNDERPASS_ROOM_H

#include "pair.h"

#define SOCK_RCVBUF_LOCK 2

/* Would this many bytes, with what may come by TCP, outgrow the reader's buffer? An eighth is for what packets cost. */
static __noinline bool outgrows(const struct endpoint *ep, __u32 bytes, bool narrow)
{
	const struct tcp_sock *tp = (const void *)ep->peer_sock;
	const struct sock *sk = (const void *)ep->peer_sock, *own = (const void *)ep->sock;
	const struct net *net = READ(sk, __sk_common.skc_net.net);
	__s32 room = READ(sk, sk_rcvbuf), most = READ(net, ipv4.sysctl_tcp_rmem[2]), under_way, buffer;

	if (most > room && !(BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_RCVBUF_LOCK))
		room = most; /* TCP lets it grow (tcp_clamp_window) */
	net = READ(own, __sk_common.skc_net.net);
	buffer = READ(own, sk_sndbuf);
	most = READ(net, ipv4.sysctl_tcp_wmem[2]);
	if (most > buffer && !narrow)
		buffer = most;
	under_way = READ(tp, rcv_wup) + READ(tp, rcv_wnd) - READ(tp, rcv_nxt);
	if (under_way > buffer)
		under_way = buffer;
	most = room - (room >> 3) - under_way;
	if (most < room >> 3) /* or such a direction would never take the shortcut again */
		most = room >> 3;
	return (__s64)bytes > most && !fault(UP_FAULT_NO_ROOM);
}

/* Never too much, whatever comes by TCP: least of what outgrows() may answer for a receive buffer of this size. Asked first,
 * for every message and every packet. */
static __always_inline __u32 always_fits(int buffer)
{
	return (__u32)buffer >> 3;
}

/* Does so much wait redirected that a wide send buffer could be too much? */
static __always_inline bool crowded(const struct endpoint *ep)
{
	const struct sock *reader = (const void *)ep->peer_sock;
	__u32 waits;

	if (!reader)
		return false;
	waits = READ(reader, sk_backlog.rmem_alloc.counter);
	return waits > always_fits(READ(reader, sk_rcvbuf)) && has_unread(reader) && outgrows(ep, waits, false);
}

#endif
