// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A yardstick for `underpass bench --naive` and nothing else: the bypass that everyone writes first. It is
 * wrong on purpose in all that costs something, so that its column shows what the promise costs. Hooks:
 *
 *   sock_ops   naive_pair       every established IPv4 socket of the benchmark's own cgroup enters the map
 *   sk_msg     naive_redirect   each message goes to whatever socket has the mirrored addresses
 *
 * No proof (addresses are the key: equal ones in two namespaces are one), no gate (a message may overtake
 * bytes that are still in TCP), no budget (nothing holds a writer), no guard, no drain. Never pinned: it is
 * gone with the process that loaded it. */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET	 2
#define AF_INET6 10
#define MAPPED	 bpf_htonl(0xffff) /* the third word of ::ffff:a.b.c.d, which dual-stack sockets have */

/* As one end sees the connection; ports in host order. */
struct tuple {
	__u32 local_address, remote_address;
	__u32 local_port, remote_port;
};

struct counters {
	__u64 messages, bytes;
};

/* Written by naive_pair, read by naive_redirect. Full: the socket stays on TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 131072);
	__type(key, struct tuple);
	__type(value, __u64);
} naive_sockets SEC(".maps");

/* What was redirected, so that the benchmark can tell that its naive runs were. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} naive_counters SEC(".maps");

SEC("sockops")
int naive_pair(struct bpf_sock_ops *ctx)
{
	struct tuple own = {};

	if (ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	if (ctx->family != AF_INET && !(ctx->family == AF_INET6 && ctx->remote_ip6[2] == MAPPED))
		return 1;
	own.local_address = ctx->local_ip4;
	own.remote_address = ctx->remote_ip4;
	own.local_port = ctx->local_port;
	own.remote_port = bpf_ntohl(ctx->remote_port);
	bpf_sock_hash_update(ctx, &naive_sockets, &own, BPF_ANY);
	return 1;
}

SEC("sk_msg")
int naive_redirect(struct sk_msg_md *msg)
{
	struct tuple peer = {
		.local_address = msg->remote_ip4,
		.remote_address = msg->local_ip4,
		.local_port = bpf_ntohl(msg->remote_port),
		.remote_port = msg->local_port,
	};
	struct counters *counters;
	__u32 only = 0, size = msg->size;

	if (bpf_msg_redirect_hash(msg, &naive_sockets, &peer, BPF_F_INGRESS) != SK_PASS)
		return SK_PASS; /* the peer is not in the map: TCP */
	counters = bpf_map_lookup_elem(&naive_counters, &only);
	if (counters) {
		counters->messages++;
		counters->bytes += size;
	}
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
