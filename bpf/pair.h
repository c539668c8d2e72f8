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
#include "listen.h"

/* Its server is on this node, but it is not clear which: `explain` tells. */
static __noinline int refuse_client(struct bpf_sock_ops *ctx, enum up_reason why)
{
	keep_out(ctx, caller_of(bpf_get_socket_cookie(ctx)), why, false);
	count_socket(why);
	return 0;
}

/* Test twin: see address_key(). */
static __noinline void take_address_key(struct bpf_sock_ops *ctx, struct numbers *key)
{
	struct up_address local, remote;

	read_ends(ctx, &local, &remote);
	*key = address_key(&local, &remote);
}

/* Is this the calling socket's own end? */
static __noinline int is_own_end(struct bpf_sock_ops *ctx, const struct up_address *at)
{
	struct up_address local, remote;

	read_ends(ctx, &local, &remote);
	return same_ip(&local, at) && local.port == at->port;
}

/* Is the client's end, as the listener sees it, the client's own, or an address of this node? In frames of their own:
 * the stack is short, and Linux 6.1 counts what bpf_loop calls, too. */
static __noinline int seen_as(struct bpf_sock_ops *ctx, const struct up_address *client)
{
	struct bpf_sock *sk = ctx->sk;
	const struct tcp_sock *tp;

	if (is_own_end(ctx, client))
		return 1;
	tp = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	return tp && node_holds(READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_net.net), client->ip);
}

static __noinline void on_client(struct bpf_sock_ops *ctx)
{
	__u32 snd = CTX(snd_nxt), rcv = CTX(rcv_nxt), number = snd - 1;
	struct numbers key = {snd, rcv};
	struct handshake shake = {}, *twin;
	const struct tcp_sock *tp;
	enum up_reason why;
	__u64 program;
	struct endpoint *ep;
	struct bpf_sock *sk;
	struct syn *syn;
	bool kernels;
	long error;

	if (draining() || closed()) {
		bpf_map_delete_elem(&syns, &number);
		return;
	}
	syn = bpf_map_lookup_elem(&syns, &number);
	if (!syn && !fault(UP_FAULT_NO_PROOF | UP_FAULT_ADDRESS_KEYS))
		return count_socket(UP_NOT_LOCAL);
	if (syn && syn->ambiguous) {
		refuse_client(ctx, UP_AMBIGUOUS);
		return;
	}
	if (snd == rcv)
		return count_socket(UP_SELF_CONNECT);
	sk = ctx->sk;
	if (!sk)
		return;
	if (syn) {
		shake.view = syn->view;
		shake.listener = syn->listener;
		bpf_map_delete_elem(&syns, &number);
		if (!seen_as(ctx, &shake.view.client)) {
			refuse_client(ctx, UP_ADDRESS_MISMATCH);
			return;
		}
	}
	if (fault(UP_FAULT_ADDRESS_KEYS))
		take_address_key(ctx, &key);
	program = caller_of(bpf_get_socket_cookie(ctx));
	shake.client_program = program;
	tp = bpf_skc_to_tcp_sock(sk);
	kernels = tp && kernels_own((const struct sock *)tp);
	why = kernels ? UP_KERNEL_SOCKET : welcome(program, (__u64)tp, UP_CLIENT, &shake.epoch);
	if (why != UP_SHORTCUT) {
		keep_out(ctx, program, why, kernels);
		shake.refused = why;
		shake.outside = 1;
		bpf_map_update_elem(&handshakes, &key, &shake, BPF_NOEXIST);
		return count_socket(why);
	}
	ep = enter(ctx, UP_CLIENT, program, key, &why);
	if (!ep)
		return count_socket(why);
	ep->epoch = shake.epoch;
	ep->redirect_seq = snd;
	shake.client = ep->self.cookie;
	shake.client_sock = (__u64)tp;
	shake.client_state = (__u64)ep;
	ep->loopback = shake.loopback = shake.view.netns == bpf_get_netns_cookie(ctx);
	shake.early = !tp || sleepers(ep->sock) != 0;
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

/* Who serves what `listener` (0 = unknown) has accepted at the end that `view` tells of, and whether it stands at another
 * place than that, as a transparent proxy's does, or what a program of sk_lookup has chosen. */
static __noinline struct up_owner *server_of(const struct view *view, __u64 listener, bool *elsewhere)
{
	struct up_place place = {.netns = view->netns, .at = view->server};
	struct up_owner *owner = owner_of(&place), *other;

	if (!listener || (owner && owner->listener == listener))
		return owner;
	other = owner_at((const struct sock *)listener);
	if (!other || other->listener != listener || !stands(other))
		return owner;
	*elsewhere = true;
	return other;
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
	struct up_owner *owner;
	bool elsewhere = false, kernels;
	__u64 program, epoch;

	if (!sk)
		return UP_NO_STATE;
	if (draining())
		return UP_DRAINING;
	read_view(ctx, &view);
	if (fault(UP_FAULT_ADDRESS_KEYS))
		key = address_key(&view.client, &view.server);
	shake = bpf_map_lookup_elem(&handshakes, &key);
	if (!shake) {
		if (closed()) /* the other generation's */
			return UP_NO_MESSAGE;
		bpf_map_delete_elem(&syns, &number);
		return UP_REMOTE_CLIENT;
	}
	owner = server_of(&view, shake->listener, &elsewhere);
	program = owner ? owner->program : 0;
	kernels = shake->listener && kernels_own((const struct sock *)shake->listener);
	if (!fault(UP_FAULT_ADDRESS_KEYS)) {
		if (shake->refused) {
			why = shake->refused;
			if (shake->outside)
				bpf_map_delete_elem(&handshakes, &key);
			keep_out(ctx, program, why, kernels);
			return why;
		}
		if (shake->ambiguous || shake->server) {
			shake->refused = UP_AMBIGUOUS;
			return UP_AMBIGUOUS;
		}
		if (!same_view(&view, &shake->view) && !fault(UP_FAULT_NO_PROOF)) {
			shake->refused = UP_ADDRESS_MISMATCH;
			return UP_ADDRESS_MISMATCH;
		}
	}
	why = welcome(program, fault(UP_FAULT_ONE_END) ? 0 : (__u64)bpf_skc_to_tcp_sock(sk), UP_SERVER, &epoch);
	if (kernels)
		why = UP_KERNEL_SOCKET;
	if (why == UP_SHORTCUT && elsewhere && !sure_to_serve(owner)) /* acceptor() would ask at this end */
		why = UP_OBSERVED;
	if (why != UP_SHORTCUT) {
		shake->refused = why;
		keep_out(ctx, program, why, kernels);
		return why;
	}
	ep = enter(ctx, UP_SERVER, program, key, &why);
	if (!ep) {
		shake->refused = why;
		return why;
	}
	ep->epoch = shake->epoch = shake->epoch == epoch ? epoch : ~0ull; /* else the first message looks again */
	ep->peer_program = shake->client_program;
	shake->server_program = program;
	ep->peer_sock = shake->client_sock;
	ep->peer_state = shake->client_state;
	ep->loopback = shake->loopback != 0;
	ep->peer.cookie = shake->client;
	ep->peer.numbers = fault(UP_FAULT_STALE_PEER) ? (struct numbers){} : key;
	ep->redirect_seq = snd;
	ep->ask = shake->early != 0;
	ep->certain = shake->certain = sure_to_serve(owner) || fault(UP_FAULT_LISTENER_DECIDES);
	shake->server_sock = (__u64)bpf_skc_to_tcp_sock(sk);
	shake->server_state = (__u64)ep;
	*(volatile __u64 *)&shake->server = ep->self.cookie;
	return UP_SHORTCUT;
}

static __always_inline bool observing(struct bpf_sock *sk)
{
	struct endpoint *ep = bpf_sk_storage_get(&endpoints, sk, 0, 0);

	return ep && ep->observed;
}

static __noinline void on_server(struct bpf_sock_ops *ctx)
{
	enum up_reason reason = pair_server(ctx);

	struct bpf_sock *sk = ctx->sk;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : 0;

	if (reason == UP_NO_MESSAGE)
		return;
	count_socket(reason); /* UP_SHORTCUT: counts the pair */
	/* The flag is inherited from the listener. A psock means that another instance of us, attached
	 * deeper in the tree, has taken the socket and wants it. */
	if (reason != UP_SHORTCUT && tp && !psock_of((const struct sock *)tp) && !observing(sk))
		clear_flags(ctx, BUILD_FLAG);
}

/* Why a client leaves whose server did not enter. */
static __always_inline enum up_reason refusal(__u32 of_server)
{
	return of_server == UP_OBSERVED || of_server == UP_GUARDED || of_server == UP_SMALL_STREAM ||
			       of_server == UP_POLICY || of_server == UP_KERNEL_SOCKET
		       ? of_server
		       : UP_PEER_REFUSED;
}

/* Has the server's socket stayed outside, or left before we met it? Then the client leaves, too. One
 * that was in the map may have redirected to us: that has to arrive and to be read first. */
static __always_inline bool server_refused(struct endpoint *ep)
{
	struct handshake *shake;

	if (ep->role != UP_CLIENT)
		return false;
	shake = bpf_map_lookup_elem(&handshakes, &ep->numbers);
	if (!shake || !shake->refused)
		return false;
	if (!ep->leave) {
		wants_out(ep, refusal(shake->refused));
		if (!shake->server)
			ep->gone_at = 0; /* it never was, or has redirected nothing */
	}
	return true;
}

/* The client's first message: has the server's socket been paired meanwhile? */
static __always_inline bool meet_server(struct endpoint *ep)
{
	struct handshake *shake;
	__u64 server, sock;

	if (ep->role != UP_CLIENT || server_refused(ep))
		return false;
	shake = bpf_map_lookup_elem(&handshakes, &ep->numbers);
	if (!shake)
		return false;
	server = *(volatile __u64 *)&shake->server;
	sock = *(volatile __u64 *)&shake->server_sock;
	/* An LRU entry may be reused under a reader: ours only if it still names us. (Were a stranger's
	 * cookie to slip through all the same, the gate compares 32 bits of sequence number with it.) */
	if (!server || !sock || *(volatile __u64 *)&shake->client != ep->self.cookie)
		return false;
	ep->peer_sock = sock;
	ep->peer.numbers = ep->self.numbers; /* the same two at both ends */
	ep->peer_program = shake->server_program;
	ep->peer_state = shake->server_state;
	ep->peer.cookie = server;
	ep->epoch = shake->epoch; /* of the verdicts on both */
	ep->certain = shake->certain;
	if (ep->certain)
		bpf_map_delete_elem(&handshakes, &ep->numbers);
	return true;
}

/* Where the listener's program may not be the one that serves, nothing is redirected to a server before it
 * has been accepted, and by one that may take the shortcut. */
static __always_inline bool server_accepted(struct endpoint *ep)
{
	const struct sock *server = (const void *)ep->peer_sock;
	enum up_reason why;

	if (ep->certain || ep->role != UP_CLIENT)
		return true;
	if (server_refused(ep))
		return false;
	if (!READ(server, sk_socket))
		return false;
	why = acceptor(server, &ep->peer_program);
	if (why == UP_SHORTCUT) {
		ep->certain = 1;
		bpf_map_delete_elem(&handshakes, &ep->numbers);
	} else if (!ep->leave) {
		wants_out(ep, why);
	}
	return ep->certain;
}

#endif
