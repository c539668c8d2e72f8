/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Rule 1, first half: who connects, who listens, and which SYNs a listener of this node answers. */
#ifndef UNDERPASS_LISTEN_H
#define UNDERPASS_LISTEN_H

#include "enter.h"

static __always_inline struct sealed *caller_slot(__u64 cookie)
{
	__u32 slot = cookie & (CALLERS - 1);

	return bpf_map_lookup_elem(&callers, &slot);
}

/* A program begins to connect: the one moment at which a client's program is known for sure. Most connections
 * leave the node, so the socket gets no state of ours yet. */
static __always_inline void on_connect(struct bpf_sock_ops *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct sealed *caller = caller_slot(cookie);

	if (caller && !draining() && !closed())
		put_sealed(caller, cookie, current_program());
}

/* The program that connected the socket of this cookie; 0 = unknown, or long ago. */
static __always_inline __u64 caller_of(__u64 cookie)
{
	return sealed_for(caller_slot(cookie), cookie);
}

/* A socket begins to listen: let it tell us of each SYN that it answers. */
static __noinline void on_listen(struct bpf_sock_ops *ctx)
{
	struct up_place place = {.netns = bpf_get_netns_cookie(ctx)};
	struct up_owner owner = {}, *before;
	__u32 flags = CTX(bpf_sock_ops_cb_flags);
	struct bpf_sock *sk = ctx->sk;
	struct up_address nobody;
	struct endpoint *ep;

	if (closed() || !sk)
		return;
	owner.program = current_program();
	owner.listener = (__u64)bpf_skc_to_tcp_sock(sk);
	owner.cookie = bpf_get_socket_cookie(ctx);
	read_ends(ctx, &place.at, &nobody);
	before = bpf_map_lookup_elem(&owners, &place);
	if (before && before->program == owner.program) {
		owner.accepts = before->accepts;
		owner.shared = before->shared;
	} else if (before && before->listener != owner.listener && stands(before)) {
		owner.shared = before->shared = 1;
	}
	/* Where several have listeners, by SO_REUSEPORT or for each device, one that is not admitted has the last word. */
	if (!before || before->program == owner.program || !owner.shared || admitted(before->program) == UP_SHORTCUT)
		bpf_map_update_elem(&owners, &place, &owner, BPF_ANY);

	ep = bpf_sk_storage_get(&endpoints, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!ep || ep->watched)
		return;
	ep->watched = 1;
	if (flags & BUILD_FLAG)
		bpf_sk_storage_get(&shared_listeners, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	else
		bpf_sock_ops_cb_flags_set(ctx, flags | BUILD_FLAG);
}

/* `listener` answers a SYN of this number: remember it for the client's own callback. */
static __noinline void note_syn(struct bpf_sock_ops *ctx, __u32 number, __u64 listener)
{
	struct syn syn = {.listener = listener}, *known;

	if (draining() || closed())
		return;
	read_view(ctx, &syn.view);
	known = bpf_map_lookup_elem(&syns, &number);
	if (known && !same_view(&known->view, &syn.view))
		known->ambiguous = 1;
	if (!known && bpf_map_update_elem(&syns, &number, &syn, BPF_ANY))
		count_socket(UP_NO_MEMORY);
}

/* The request that a SYN has made. */
static __always_inline const struct tcp_request_sock *request_of(struct bpf_sock_ops *ctx)
{
	const struct bpf_sock_ops_kern *kern = (const void *)ctx;

	return (const void *)READ(kern, sk);
}

static __always_inline const struct tcp_sock *answered_by(const struct tcp_request_sock *req)
{
	return (const void *)READ(req, req.req.__req_common.skc_listener);
}

/* An armed listener builds its SYN-ACK. */
static __always_inline void on_syn_ack(struct bpf_sock_ops *ctx)
{
	struct { __u32 ports, number; } head = {};
	long got;

	got = bpf_getsockopt(ctx, SOL_TCP, TCP_BPF_SYN, &head, sizeof(head));
	if (got < 0 && got != -ENOSPC) /* ENOSPC: the buffer is filled, the header is longer */
		return;
	note_syn(ctx, bpf_ntohl(head.number), (__u64)answered_by(request_of(ctx)));
}

/* Any listener is about to answer a SYN (not with a cookie). For those that stood before us and that
 * an iterator could not arm (kernels before 6.12); the others call on_syn_ack a moment later. */
static __always_inline void on_request(struct bpf_sock_ops *ctx)
{
	const struct tcp_request_sock *req = request_of(ctx);
	const struct tcp_sock *listener = answered_by(req);

	if (!(READ(listener, bpf_sock_ops_cb_flags) & BUILD_FLAG))
		note_syn(ctx, READ(req, rcv_isn), (__u64)listener);
}

#endif
