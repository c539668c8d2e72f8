/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How a socket enters the map, or is kept out of it: what all callbacks of a handshake share. */
#ifndef UNDERPASS_ENTER_H
#define UNDERPASS_ENTER_H

#include "guard.h"

/* Calls us as a socket builds a TCP packet: a listener its SYN-ACK, an endpoint any other. */
#define BUILD_FLAG BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG
#define CLOSE_FLAG BPF_SOCK_OPS_STATE_CB_FLAG

/* A context read at a fixed offset. In C, clang folds the reads of two branches into one computed
 * offset, which the verifier refuses ("dereference of modified ctx ptr"). */
#define CTX(field)                                                                                 \
	({                                                                                         \
		__u32 value;                                                                       \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                              \
			     : "=r"(value)                                                         \
			     : "r"(ctx), "i"(__builtin_offsetof(struct bpf_sock_ops, field)));     \
		value;                                                                             \
	})

static __always_inline void read_ends(struct bpf_sock_ops *ctx, struct up_address *local,
				      struct up_address *remote)
{
	local->port = CTX(local_port);
	remote->port = bpf_ntohl(CTX(remote_port));
	if (CTX(family) == AF_INET) {
		local->ip[0] = local->ip[1] = remote->ip[0] = remote->ip[1] = 0;
		local->ip[2] = remote->ip[2] = bpf_htonl(0xffff);
		local->ip[3] = CTX(local_ip4);
		remote->ip[3] = CTX(remote_ip4);
		return;
	}
	local->ip[0] = CTX(local_ip6[0]);
	local->ip[1] = CTX(local_ip6[1]);
	local->ip[2] = CTX(local_ip6[2]);
	local->ip[3] = CTX(local_ip6[3]);
	remote->ip[0] = CTX(remote_ip6[0]);
	remote->ip[1] = CTX(remote_ip6[1]);
	remote->ip[2] = CTX(remote_ip6[2]);
	remote->ip[3] = CTX(remote_ip6[3]);
}

static __always_inline bool same_ip(const struct up_address *a, const struct up_address *b)
{
	return a->ip[0] == b->ip[0] && a->ip[1] == b->ip[1] && a->ip[2] == b->ip[2] &&
	       a->ip[3] == b->ip[3];
}

static __always_inline bool same_view(const struct view *a, const struct view *b)
{
	return a->netns == b->netns && a->client.port == b->client.port &&
	       a->server.port == b->server.port && same_ip(&a->client, &b->client) &&
	       same_ip(&a->server, &b->server);
}

static __always_inline void read_view(struct bpf_sock_ops *ctx, struct view *view)
{
	view->netns = bpf_get_netns_cookie(ctx);
	read_ends(ctx, &view->server, &view->client);
}

static __always_inline void count_socket(enum up_reason reason)
{
	struct up_counters *c = count();

	if (c && (__u32)reason < UP_REASON_MAX)
		c->connections[reason]++;
}

static __always_inline enum up_reason why_not_inserted(long error)
{
	switch (error) {
	case -E2BIG:
		return UP_MAP_FULL;
	case -EBUSY:
		return UP_SOCKET_BUSY;
	case -ENOMEM:
		return UP_NO_MEMORY;
	default:
		return UP_NOT_SUITABLE;
	}
}

static __always_inline void clear_flags(struct bpf_sock_ops *ctx, __u32 ours)
{
	__u32 flags = CTX(bpf_sock_ops_cb_flags);
	struct bpf_sock *sk = ctx->sk;

	if ((ours & BUILD_FLAG) && sk && bpf_sk_storage_get(&shared_listeners, sk, 0, 0))
		ours &= ~BUILD_FLAG;
	if (flags & ours)
		bpf_sock_ops_cb_flags_set(ctx, flags & ~ours);
}

/* Test twin: what a bypass without proof does, pairing by address and port alone. */
static __always_inline struct numbers address_key(const struct up_address *client,
						  const struct up_address *server)
{
	return (struct numbers){client->ip[3] ^ (client->port << 16), server->ip[3] ^ server->port};
}

static __always_inline void note_left(struct endpoint *ep)
{
	ep->left = 1;
	ep->left_at = bpf_ktime_get_ns();
	if (ep->leaves < 255)
		ep->leaves++;
}

/* The socket's state, emptied: it may have had a connection before. */
static __always_inline struct endpoint *fresh_endpoint(struct bpf_sock *sk, __u64 program)
{
	struct endpoint *ep = bpf_sk_storage_get(&endpoints, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!ep)
		return 0;
	__builtin_memset(ep, 0, sizeof(*ep));
	ep->program = program;
	return ep;
}

static __always_inline struct endpoint *enter(struct bpf_sock_ops *ctx, __u8 role, __u64 program,
					      struct numbers numbers, enum up_reason *why)
{
	const struct tcp_sock *tp;
	struct endpoint *ep = 0;
	struct bpf_sock *sk = ctx->sk;
	long error;

	*why = UP_NO_MEMORY;
	ep = sk ? fresh_endpoint(sk, program) : 0;
	if (!ep)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp && bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ_BITFIELD(tp, is_mptcp)) {
		note_sign(program, UP_SIGN_MPTCP);
		*why = ep->reason = UP_NOT_SUITABLE;
		return 0;
	}
	/* A message to the connection that this socket had before is still under way, or another holds it. */
	if (tp && taken((const struct sock *)tp)) {
		*why = ep->reason = UP_SOCKET_BUSY;
		return 0;
	}
	ep->self.cookie = bpf_get_socket_cookie(ctx);
	ep->self.numbers = ep->numbers = numbers;
	if (fault(UP_FAULT_STALE_PEER))
		ep->self = (struct key){(__u64)bpf_skc_to_tcp_sock(sk), {}};
	error = bpf_sock_hash_update(ctx, &sockets, &ep->self, BPF_NOEXIST);
	if (error) {
		*why = ep->reason = why_not_inserted(error); /* kept for `explain` */
		return 0;
	}
	ep->sock = (__u64)tp;
	ep->role = role;
	ep->reason = UP_NO_MESSAGE;
	bpf_sock_ops_cb_flags_set(ctx, CTX(bpf_sock_ops_cb_flags) | BUILD_FLAG | CLOSE_FLAG);
	return ep;
}

/* A proven end stays on TCP for its program's sake: `explain` tells, and while the program is observed,
 * the socket's packets show that it runs. Not if it is the kernel's own (`kernels`). */
static __always_inline void keep_out(struct bpf_sock_ops *ctx, __u64 program, enum up_reason reason, bool kernels)
{
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *ep = sk ? fresh_endpoint(sk, program) : 0;

	if (!ep)
		return;
	ep->reason = reason;
	ep->observed = !kernels && admitted(program) == UP_OBSERVED;
	if (ep->observed)
		bpf_sock_ops_cb_flags_set(ctx, CTX(bpf_sock_ops_cb_flags) | BUILD_FLAG);
}

#endif
