// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* underpass, the kernel side. Hooks, in the order in which a connection meets them:
 *
 *   sock_ops      up_handshake   proves that both ends of a connection are here, pairs them (pair.h),
 *                                frees readers that got stuck between the paths (stuck.h)
 *   sk_msg        up_steer       each message: shortcut or TCP, and why (steer.h)
 *   sys_enter     up_watch       system calls that tell of a program which has to stay on TCP (watch.h)
 *   cgroup_skb    up_late        each packet that arrives: an end of file, or its ACK, that has to wait (late.h)
 *   io_uring      up_uring       requests that tell the same of one that makes no calls (uring.h)
 *   iter/tcp      up_arm         listeners that stood before: answer SYNs with the proof callback
 *   iter/tcp      up_disarm      takes that back
 *   iter/tcp      up_release     after a drain: puts back what we set on sockets, wakes their readers
 *   iter/tcp      up_sockets     lists the TCP sockets of a namespace, for `explain`
 *   iter/tcp      up_standing    lists the ends of open connections that are in no map (adopt.h)
 *   sys_enter     up_awake       threads that are seen to begin a call while that is done
 *   iter/tcp      up_adopt       takes in those that user space has ordered, step by step
 *   iter/sockmap  up_list        lists the endpoints in the map (walk.h)
 *   iter/sockmap  up_drain       takes the endpoints out that hold nothing unread, lists the others
 *
 * Whatever is in doubt is plain TCP: every program lets the kernel go on as if it were not there. */
#include "steer.h"
#include "stuck.h"
#include "walk.h"
#include "adopt.h"
#include "uring.h"
#include "late.h"

SEC("sockops")
int up_handshake(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		if (ctx->is_fullsock)
			on_packet(ctx);
		else /* a request: this is its SYN-ACK */
			on_syn_ack(ctx);
		break;
	case BPF_SOCK_OPS_TIMEOUT_INIT: /* also of connecting sockets, which are full ones */
		if (!ctx->is_fullsock)
			on_request(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		on_client(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_server(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		on_state(ctx);
		break;
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		start_afresh(ctx);
		on_connect(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		start_afresh(ctx);
		on_listen(ctx);
		break;
	}
	return 1;
}

SEC("sk_msg")
int up_steer(struct sk_msg_md *msg)
{
	return steer(msg);
}

SEC("tp_btf/sys_enter")
int up_watch(__u64 *ctx)
{
	watch((const void *)ctx[0], ctx[1]);
	return 0;
}

SEC("cgroup_skb/ingress")
int up_late(struct __sk_buff *skb)
{
	return !too_early(skb);
}

/* Its tracepoint has two names; user space looks for it, and does without where the kernel has no io_uring. */
SEC("tp_btf")
int up_uring(__u64 *ctx)
{
	watch_ring((const void *)ctx[0]);
	return 0;
}

SEC("iter/tcp")
int up_arm(struct bpf_iter__tcp *ctx)
{
	arm(ctx, true);
	return 0;
}

SEC("iter/tcp")
int up_disarm(struct bpf_iter__tcp *ctx)
{
	arm(ctx, false);
	return 0;
}

SEC("iter/tcp")
int up_sockets(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct up_record r = {};
	struct endpoint *ep;
	struct tcp_sock *tp;

	tp = skc ? bpf_skc_to_tcp_sock(skc) : 0;
	if (!tp)
		return 0;
	ep = bpf_sk_storage_get(&endpoints, (struct sock *)tp, 0, 0);
	fill(&r, (const struct sock *)tp, ep);
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	return 0;
}

SEC("iter/tcp")
int up_release(struct bpf_iter__tcp *ctx)
{
	release(ctx);
	return 0;
}

SEC("iter/tcp")
int up_standing(struct bpf_iter__tcp *ctx)
{
	standing(ctx);
	return 0;
}

SEC("iter/tcp")
int up_adopt(struct bpf_iter__tcp *ctx)
{
	adopt(ctx);
	return 0;
}

/* Attached only while a pass waits for threads that never sleep. */
SEC("tp_btf/sys_enter")
int up_awake(__u64 *ctx)
{
	(void)ctx;
	note_awake();
	return 0;
}

SEC("iter/sockmap")
int up_list(struct bpf_iter__sockmap *ctx)
{
	struct sock *sk = ctx->sk;

	if (sk)
		record(ctx, sk);
	return 0;
}

/* Deleting an endpoint throws its unread bytes away (sk_psock_drop), so only drained ones go. User
 * space has set UP_DRAINING and waited out redirects in flight before it runs this. */
SEC("iter/sockmap")
int up_drain(struct bpf_iter__sockmap *ctx)
{
	const struct key *at = ctx->key;
	struct sock *sk = ctx->sk;
	struct endpoint *ep;
	struct key key;

	if (!sk || !at)
		return 0;
	key = *at;
	ep = bpf_sk_storage_get(&endpoints, sk, 0, 0);
	if (ep && !settled(ep, sk, 0) && !fault(UP_FAULT_DRAIN_UNREAD)) {
		record(ctx, sk);
		return 0;
	}
	bpf_map_delete_elem(&sockets, &key);
	if (ep)
		ep->left = 1; /* no packet sets anything on it any more */
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
