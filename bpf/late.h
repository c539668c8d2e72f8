/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* An end of file that comes too early, and one whose acknowledgement does, as packets arrive.
 *
 * A recv takes from one queue, so at the border between redirected bytes and TCP bytes behind them it is short. Programs
 * that were told of the end of file (EPOLLRDHUP, POLLHUP) take a short read for the last: HAProxy, libuv. Others ask
 * FIONREAD and take 0 for it: stunnel. Native TCP has one queue and counts all of it, so they are right there.
 *
 * So a FIN waits until such a reader has come past the border: its packet is dropped, as a network may, and comes again
 * by the sender's timer, as a rule 0.2 s later. What the reader sends meanwhile waits, too: a sender that reads no more would
 * answer it with a reset, and take with it what comes with the FIN.
 *
 * The other way round, the ACK of a FIN wakes whoever sleeps on the socket that sent it (tcp_rcv_state_process), and a
 * reader that is woken with nothing there returns EAGAIN (tcp_msg_wait_data). So that ACK waits for as long as one
 * sleeps; the FIN comes again by our own timer, and nobody waits for it: its peer has had it. */
#ifndef UNDERPASS_LATE_H
#define UNDERPASS_LATE_H

#include "guard.h"

/* A closed sender gives up some 100 s after its FIN was first dropped, by default. */
#define HOLD_FIN_NS 20000000000ull
/* Of an ACK: while our FIN is out, our own keepalive timer does not work, nor would an early end of the tries be seen. */
#define HOLD_ACK_NS 5000000000ull
#define RTO_MIN_NS 200000000ull

#define EPOLLRDHUP 0x2000
#define EPOLLONESHOT (1u << 30)

#define ETH_P_IP 0x0800
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
#define TCP_HEADER 20
#define IP6_HEADER 40

/* What arrives. */
struct segment {
	__u32 from, end; /* what it carries, as numbers of the stream */
	__u32 ack;
	__u8 flags;
};

/* False if the packet is none of TCP's, or does not say. */
static __always_inline bool segment_of(const struct __sk_buff *skb, struct segment *seg)
{
	const __u8 *ip = (const __u8 *)(long)skb->data, *stop = (const __u8 *)(long)skb->data_end, *tcp;
	__u32 header;

	if (ip + IP6_HEADER > stop)
		return false;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (ip[9] != IPPROTO_TCP)
			return false;
		header = (ip[0] & 15) * 4;
	} else {
		if (ip[6] != IPPROTO_TCP) /* or options come first */
			return false;
		header = IP6_HEADER;
	}
	tcp = ip + header;
	if (tcp + TCP_HEADER > stop)
		return false;
	seg->flags = tcp[13] & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK);
	seg->from = bpf_ntohl(*(const __u32 *)(tcp + 4));
	seg->end = seg->from + skb->len - header - (tcp[12] >> 4) * 4;
	seg->ack = bpf_ntohl(*(const __u32 *)(tcp + 8));
	return true;
}

/* A quarter of the time after which the sender of a FIN gives up, but at most `most`: after TCP_USER_TIMEOUT, or after as
 * many tries as its namespace says, each twice as late as the one before. After a quarter of that one more try is left. */
static __always_inline __u64 patience_of(const struct tcp_sock *tp, bool closed, __u64 most)
{
	const struct net *net = READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_net.net);
	__u32 timeout = READ(tp, inet_conn.icsk_user_timeout);
	__u32 tries = READ(net, ipv4.sysctl_tcp_retries2), orphan;
	__u64 least = timeout * 250000ull; /* ms */

	if (timeout && least < most)
		most = least;
	if (closed) {
		orphan = READ(net, ipv4.sysctl_tcp_orphan_retries) ?: 8;
		if (orphan < tries)
			tries = orphan;
		/* Since 6.15: who is closed gives up as its timer comes to its longest, about twice that after the first try.
		 * In jiffies, of 1 ms at least. */
		if (bpf_core_field_exists(tp->inet_conn.icsk_rto_max)) {
			least = READ(tp, inet_conn.icsk_rto_max) * 500000ull;
			if (least < most)
				most = least;
		}
	}
	least = (RTO_MIN_NS / 2) << (tries & 15);
	return tries < 16 && least < most ? least : most;
}

/* For how long a FIN may be held; 0 = its sender is not known, or gone. If it gives up, neither the FIN nor what that
 * carries ever comes. */
static __always_inline __u64 patience_of_sender(const struct endpoint *ep)
{
	const struct handshake *shake = ep->peer_sock ? 0 : bpf_map_lookup_elem(&handshakes, &ep->numbers);
	const struct tcp_sock *peer = (const void *)(shake ? shake->server_sock : ep->peer_sock);
	__u64 cookie = shake ? shake->server : ep->peer.cookie, patience;

	patience = patience_of(peer, true, HOLD_FIN_NS);
	if (!cookie || READ(peer, inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter) != (__s64)cookie)
		return 0;
	return patience;
}

/* True as long as a FIN may be kept from its reader. */
static __always_inline bool held_back(struct endpoint *ep)
{
	__u64 now = bpf_ktime_get_ns();

	if (!ep->fin_at)
		ep->fin_at = now;
	return now - ep->fin_at < patience_of_sender(ep);
}

/* Is the reader told of the end of file by an event? Either by EPOLLRDHUP, or, once it has shut down its own side, by
 * EPOLLHUP, for which nobody needs to ask. Others see it by reading, behind all bytes: they must not depend on a
 * sender that may be gone before its FIN comes again. What epoll was asked for stands in the socket's wait queue. */
static __always_inline bool told_of_end(const struct endpoint *ep, const struct reader *r, __u32 looks)
{
	const struct sock *sk = (const void *)ep->sock;
	const struct wait_queue_entry *entry;
	const struct list_head *head, *at;
	const struct eppoll_entry *epoll;
	int i;

	if ((looks & UP_TOLD) || (r->shutdown & SEND_SHUTDOWN) || !knobs.epoll_wake || !bpf_core_type_exists(struct eppoll_entry))
		return true;
	head = (const void *)READ(sk, sk_wq);
	if (!head)
		return true;
	head = (const void *)head + bpf_core_field_offset(struct socket_wq, wait.head);
	at = READ(head, next);
	for (i = 0; i < 8 && at != head; i++) {
		entry = (const void *)at - bpf_core_field_offset(struct wait_queue_entry, entry);
		epoll = (const void *)entry - bpf_core_field_offset(struct eppoll_entry, wait);
		if ((__u64)READ(entry, func) == knobs.epoll_wake &&
		    BPF_CORE_READ(epoll, base, event.events) & (EPOLLRDHUP | EPOLLONESHOT))
			return true;
		at = READ(at, next);
	}
	return at != head;
}

/* Would a thread that sleeps in a read of ours, or is about to, be woken for nothing? One that waits in close() for this
 * ACK (SO_LINGER) sleeps in none. */
static __always_inline bool sleeps_in_ours(const struct endpoint *ep)
{
	if (!knobs.recv_code[0] || !knobs.recv_wake)
		return false;
	return waiters(ep->sock, knobs.recv_wake, IN_OUR_RECV) > 0 || (psock_of((const struct sock *)ep->sock) && in_use(ep->sock));
}

/* Is this the ACK of our FIN, and would it wake a reader for nothing? What carries bytes, or the peer's own end, is
 * something. A keepalive probe, which says nothing new, wakes nobody and has to be answered. */
static __always_inline bool rouses(struct bpf_sock *sk, const struct segment *seg)
{
	struct endpoint *ep = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	const struct tcp_sock *tp;
	__u64 now;

	if (!ep || !ep->role || !ep->sock || fault(UP_FAULT_EARLY_ACK))
		return false;
	tp = (const void *)ep->sock;
	if (READ(tp, write_seq) != seg->ack || (__s32)(seg->from - READ(tp, rcv_nxt)) < 0 || !sleeps_in_ours(ep))
		return false;
	now = bpf_ktime_get_ns();
	if (!ep->ack_at)
		ep->ack_at = now;
	return now - ep->ack_at < patience_of(tp, false, HOLD_ACK_NS);
}

/* Is this a FIN that its reader must not be told of yet? */
static __always_inline bool ends_too_early(struct bpf_sock *sk, const struct segment *seg)
{
	struct endpoint *ep = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	struct reader r = {};
	bool redirected, by_tcp, miscounted, asks;
	__u32 looks;

	if (!ep || !ep->role || ep->left || !ep->sock || fault(UP_FAULT_EARLY_FIN))
		return false;
	look(ep->sock, &r);
	if (!psock_of((const struct sock *)ep->sock) || (__s32)(seg->end - r.rcv_nxt) < 0) /* out of the map, or in already */
		return false;
	/* Another thread of the sender's is inside send, and its bytes come before the end. Who cannot tell lets it come. */
	if (ep->peer_sock && sleepers(ep->peer_sock) >= 0 && more_may_come(ep))
		return held_back(ep);
	redirected = has_unread((const struct sock *)ep->sock);
	/* What comes with the FIN itself never comes without it: then the reader leaves the map (end_of_file). */
	by_tcp = r.rcv_nxt != r.copied_seq ||
		 (seg->end != r.rcv_nxt && (redirected || (__s32)(seg->from - r.rcv_nxt) > 0));
	miscounted = (redirected && !knobs.counts_redirected) || (by_tcp && knobs.fionread_broken);
	if (!miscounted && !(redirected && by_tcp))
		return false;
	looks = looks_at(ep->program, ep->self.cookie);
	/* Who is told of an end asks how much waits before it believes that (stunnel), perhaps for the first time. */
	asks = looks & UP_COUNTS || (by_tcp && knobs.fionread_broken && looks & UP_TOLD);
	if (!(miscounted && asks) && !(redirected && by_tcp && told_of_end(ep, &r, looks)))
		return false;
	return held_back(ep);
}

/* Would these bytes be answered with a reset by one that has sent its end and reads no more (tcp_rcv_state_process), while
 * that end is kept from who sent them? Natively it is in by then. */
static __always_inline bool resets_too_early(struct bpf_sock *sk)
{
	struct endpoint *ep = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	const struct tcp_sock *tp, *peer;
	const struct endpoint *at;
	__u64 held = 0;

	if (!ep || !ep->role || !ep->sock || !ep->peer_sock || fault(UP_FAULT_EARLY_RESET))
		return false;
	tp = (const void *)ep->sock;
	peer = (const void *)ep->peer_sock;
	at = (const void *)ep->peer_state;
	if (!(READ(tp, inet_conn.icsk_inet.sk.sk_shutdown) & RCV_SHUTDOWN))
		return false;
	bpf_probe_read_kernel(&held, sizeof(held), &at->fin_at);
	return held && READ(peer, rcv_nxt) != READ(tp, write_seq) && still_peer(ep);
}

/* Shall this packet not have come yet? */
static __always_inline bool too_early(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct segment seg;
	bool ends, answers, brings;

	if (!sk || !segment_of(skb, &seg))
		return false;
	ends = (seg.flags & (TCP_FIN | TCP_RST)) == TCP_FIN;
	answers = seg.flags == TCP_ACK && seg.from == seg.end && sk->state == BPF_TCP_FIN_WAIT1;
	brings = !(seg.flags & TCP_RST) && seg.from != seg.end && sk->state == BPF_TCP_FIN_WAIT1;
	if (!ends && !answers && !brings)
		return false;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return false;
	if (brings && resets_too_early(sk))
		return true;
	return ends ? ends_too_early(sk, &seg) : answers && rouses(sk, &seg);
}

#endif
