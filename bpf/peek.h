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
	int lowat;
	__u8 shutdown;
};

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
		r->shutdown = READER_SOCK(tp).sk_shutdown;
		r->cookie = *(volatile const __s64 *)&READER_SOCK(tp).__sk_common.skc_cookie.counter;
	} else {
		const struct tcp_sock *tp = (const void *)sock;

		r->copied_seq = BPF_CORE_READ(tp, copied_seq);
		r->unread = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter);
		r->ulp = BPF_CORE_READ(tp, inet_conn.icsk_ulp_ops);
		r->lowat = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_rcvlowat);
		r->shutdown = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_shutdown);
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

#endif
