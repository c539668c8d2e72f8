/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Rule 1, prove, then pair. Three callbacks see one handshake, always in this order:
 *
 *   listener's SYN-ACK    notes the client's initial number and how the listener sees both ends (the
 *                         request before the SYN-ACK does it where the listener is not armed)
 *   client ESTABLISHED    finds its own SYN there, enters the map, leaves its two numbers behind
 *   server ESTABLISHED    finds the mirrored numbers and the same view, enters the map, is paired
 *
 * The client's callback runs before its handshake ACK leaves (tcp_finish_connect), so the server's
 * always finds what the client wrote. Every doubt is counted, and the connection is plain TCP. */
#ifndef UNDERPASS_PAIR_H
#define UNDERPASS_PAIR_H

#include "holds.h"
#include "peek.h"

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

static __always_inline struct endpoint *enter(struct bpf_sock_ops *ctx, __u8 role,
					      struct numbers numbers, enum up_reason *why)
{
	struct endpoint *ep = 0;
	struct bpf_sock *sk = ctx->sk;
	long error;

	*why = UP_NO_MEMORY;
	if (!sk)
		return 0;
	ep = bpf_sk_storage_get(&endpoints, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!ep)
		return 0;
	__builtin_memset(ep, 0, sizeof(*ep)); /* the socket may have had a connection before */
	ep->self.cookie = bpf_get_socket_cookie(ctx);
	ep->self.numbers = ep->numbers = numbers;
	if (fault(UP_FAULT_STALE_PEER))
		ep->self = (struct key){(__u64)bpf_skc_to_tcp_sock(sk), {}};
	error = bpf_sock_hash_update(ctx, &sockets, &ep->self, BPF_NOEXIST);
	if (error) {
		*why = ep->reason = why_not_inserted(error); /* kept for `explain` */
		return 0;
	}
	ep->role = role;
	ep->reason = UP_NO_MESSAGE;
	bpf_sock_ops_cb_flags_set(ctx, CTX(bpf_sock_ops_cb_flags) | BUILD_FLAG | CLOSE_FLAG);
	return ep;
}

/* A socket begins to listen: let it tell us of each SYN that it answers. */
static __always_inline void on_listen(struct bpf_sock_ops *ctx)
{
	__u32 flags = CTX(bpf_sock_ops_cb_flags);
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *ep;

	ep = sk ? bpf_sk_storage_get(&endpoints, sk, 0, BPF_SK_STORAGE_GET_F_CREATE) : 0;
	if (!ep || ep->watched)
		return;
	ep->watched = 1;
	if (flags & BUILD_FLAG)
		bpf_sk_storage_get(&shared_listeners, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	else
		bpf_sock_ops_cb_flags_set(ctx, flags | BUILD_FLAG);
}

/* A listener answers a SYN of this number: remember it for the client's own callback. */
static __always_inline void note_syn(struct bpf_sock_ops *ctx, __u32 number)
{
	struct syn syn = {}, *known;

	read_view(ctx, &syn.view);
	known = bpf_map_lookup_elem(&syns, &number);
	if (known && !same_view(&known->view, &syn.view))
		known->ambiguous = 1;
	if (!known && bpf_map_update_elem(&syns, &number, &syn, BPF_ANY))
		count_socket(UP_NO_MEMORY);
}

/* An armed listener builds its SYN-ACK. */
static __always_inline void on_syn_ack(struct bpf_sock_ops *ctx)
{
	struct { __u32 ports, number; } head = {};
	long got;

	got = bpf_getsockopt(ctx, SOL_TCP, TCP_BPF_SYN, &head, sizeof(head));
	if (got < 0 && got != -ENOSPC) /* ENOSPC: the buffer is filled, the header is longer */
		return;
	note_syn(ctx, bpf_ntohl(head.number));
}

/* Any listener is about to answer a SYN (not with a cookie). For those that stood before us and that
 * an iterator could not arm (kernels before 6.12); the others call on_syn_ack a moment later. */
static __always_inline void on_request(struct bpf_sock_ops *ctx)
{
	const struct bpf_sock_ops_kern *kern = (const void *)ctx;
	const struct tcp_request_sock *req = (const void *)BPF_CORE_READ(kern, sk);
	const struct tcp_sock *listener;

	listener = (const void *)BPF_CORE_READ(req, req.req.__req_common.skc_listener);
	if (!(BPF_CORE_READ(listener, bpf_sock_ops_cb_flags) & BUILD_FLAG))
		note_syn(ctx, BPF_CORE_READ(req, rcv_isn));
}

static __always_inline void on_client(struct bpf_sock_ops *ctx)
{
	__u32 snd = CTX(snd_nxt), rcv = CTX(rcv_nxt), number = snd - 1;
	struct numbers key = {snd, rcv};
	struct up_address local, remote;
	struct handshake shake = {}, *twin;
	const struct tcp_sock *tp;
	enum up_reason why;
	struct endpoint *ep;
	struct bpf_sock *sk;
	struct syn *syn;
	long error;

	if (draining())
		return;
	syn = bpf_map_lookup_elem(&syns, &number);
	if (!syn && !fault(UP_FAULT_NO_PROOF | UP_FAULT_ADDRESS_KEYS))
		return count_socket(UP_NOT_LOCAL);
	if (syn && syn->ambiguous)
		return count_socket(UP_AMBIGUOUS);
	if (snd == rcv)
		return count_socket(UP_SELF_CONNECT);
	sk = ctx->sk;
	if (!sk)
		return;
	read_ends(ctx, &local, &remote);
	if (syn) {
		shake.view = syn->view;
		bpf_map_delete_elem(&syns, &number);
		if ((!same_ip(&local, &shake.view.client) || local.port != shake.view.client.port)) {
			tp = bpf_skc_to_tcp_sock(sk);
			if (!tp || !node_holds(BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_net.net),
					       shake.view.client.ip))
				return count_socket(UP_ADDRESS_MISMATCH);
		}
	}
	if (fault(UP_FAULT_ADDRESS_KEYS))
		key = address_key(&local, &remote);
	ep = enter(ctx, UP_CLIENT, key, &why);
	if (!ep)
		return count_socket(why);
	ep->redirect_seq = snd;
	shake.client = ep->self.cookie;
	tp = bpf_skc_to_tcp_sock(sk);
	shake.client_sock = (__u64)tp;
	shake.early = !tp || sleepers((const struct sock *)tp) != 0;
	error = bpf_map_update_elem(&handshakes, &key, &shake,
				    fault(UP_FAULT_ADDRESS_KEYS) ? BPF_ANY : BPF_NOEXIST);
	if (error) {
		twin = bpf_map_lookup_elem(&handshakes, &key);
		if (twin)
			twin->ambiguous = 1;
		ep->role = 0;
		ep->reason = error == -EEXIST ? UP_AMBIGUOUS : UP_NO_MEMORY;
		bpf_map_delete_elem(&sockets, &ep->self);
		clear_flags(ctx, BUILD_FLAG | CLOSE_FLAG);
		return count_socket(ep->reason);
	}
}

/* Pairs an accepted socket with its client; why not, if it does not become a pair. */
static __always_inline enum up_reason pair_server(struct bpf_sock_ops *ctx)
{
	__u32 snd = CTX(snd_nxt), rcv = CTX(rcv_nxt), number = rcv - 1;
	struct numbers key = {rcv, snd};
	struct handshake *shake;
	enum up_reason why;
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *ep;
	struct view view = {};

	if (!sk)
		return UP_NO_STATE;
	if (draining())
		return UP_DRAINING;
	read_view(ctx, &view);
	if (fault(UP_FAULT_ADDRESS_KEYS))
		key = address_key(&view.client, &view.server);
	shake = bpf_map_lookup_elem(&handshakes, &key);
	if (!shake) {
		bpf_map_delete_elem(&syns, &number);
		return UP_REMOTE_CLIENT;
	}
	if (!fault(UP_FAULT_ADDRESS_KEYS)) {
		if (shake->refused)
			return shake->refused;
		if (shake->ambiguous || shake->server) {
			shake->refused = UP_AMBIGUOUS;
			return UP_AMBIGUOUS;
		}
		if (!same_view(&view, &shake->view) && !fault(UP_FAULT_NO_PROOF)) {
			shake->refused = UP_ADDRESS_MISMATCH;
			return UP_ADDRESS_MISMATCH;
		}
	}
	ep = enter(ctx, UP_SERVER, key, &why);
	if (!ep) {
		shake->refused = why;
		return why;
	}
	ep->peer_sock = shake->client_sock;
	ep->peer.cookie = shake->client;
	ep->peer.numbers = fault(UP_FAULT_STALE_PEER) ? (struct numbers){} : key;
	ep->redirect_seq = snd;
	ep->ask = shake->early != 0;
	shake->server_sock = (__u64)bpf_skc_to_tcp_sock(sk);
	*(volatile __u64 *)&shake->server = ep->self.cookie;
	return UP_SHORTCUT;
}

static __always_inline void on_server(struct bpf_sock_ops *ctx)
{
	enum up_reason reason = pair_server(ctx);

	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : 0;

	count_socket(reason); /* UP_SHORTCUT: counts the pair */
	/* The flag is inherited from the listener. A psock means that another instance of us, attached
	 * deeper in the tree, has taken the socket and wants it. */
	if (reason != UP_SHORTCUT && tp && !psock_of((const struct sock *)tp))
		clear_flags(ctx, BUILD_FLAG);
}

/* The client's first message: has the server's socket been paired meanwhile? */
static __always_inline bool meet_server(struct endpoint *ep)
{
	struct handshake *shake;
	__u64 server, sock;

	if (ep->role != UP_CLIENT)
		return false;
	shake = bpf_map_lookup_elem(&handshakes, &ep->numbers);
	if (!shake)
		return false;
	if (shake->refused) {
		ep->leave = 1;
		return false;
	}
	server = *(volatile __u64 *)&shake->server;
	sock = *(volatile __u64 *)&shake->server_sock;
	/* An LRU entry may be reused under a reader: ours only if it still names us. (Were a stranger's
	 * cookie to slip through all the same, the gate compares 32 bits of sequence number with it.) */
	if (!server || !sock || *(volatile __u64 *)&shake->client != ep->self.cookie)
		return false;
	ep->peer_sock = sock;
	ep->peer.numbers = ep->self.numbers; /* the same two at both ends */
	ep->peer.cookie = server;
	bpf_map_delete_elem(&handshakes, &ep->numbers);
	return true;
}

#endif
