/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Does a network namespace of this node hold an address? Asked for SNAT only: the address that the
 * server sees is then not the client's own, and must at least be one of ours, else a remote relay
 * that copies handshake numbers could join two strangers. Walks namespaces -> devices -> addresses
 * with fault-safe reads; the kernel frees all three only after a grace period, we hold one. */
#ifndef UNDERPASS_HOLDS_H
#define UNDERPASS_HOLDS_H

#include "maps.h"

#define MAX_NAMESPACES 1024
#define MAX_DEVICES 256
#define MAX_ADDRESSES 64
#define HOLD_NS 1000000000ull

struct walk {
	__u32 ip[4];
	const void *netns_ops; /* tells a real namespace from the list's head */
	union {
		struct {
			const struct list_head *first, *at;
		};
		struct holder fresh;
	};
	const struct list_head *device_head, *device;
	union {
		const struct in_ifaddr *v4;
		const struct list_head *v6;
	};
	const struct list_head *v6_head;
	__u64 found;
};

/* The macros relocate every field they are given, so the walk's own fields pass through a local. */
static __always_inline const struct list_head *after(const struct list_head *at)
{
	return READ(at, next);
}

static long each_v4(__u32 i __attribute__((unused)), struct walk *w)
{
	const struct in_ifaddr *a = w->v4;

	if (!a)
		return 1;
	if (READ(a, ifa_local) == w->ip[3]) {
		w->found = 1;
		return 1;
	}
	w->v4 = READ(a, ifa_next);
	return 0;
}

static long each_v6(__u32 i __attribute__((unused)), struct walk *w)
{
	const struct inet6_ifaddr *a;
	struct in6_addr addr;

	if (!w->v6 || w->v6 == w->v6_head)
		return 1;
	a = (const void *)w->v6 - bpf_core_field_offset(struct inet6_ifaddr, if_list);
	BPF_CORE_READ_INTO(&addr, a, addr);
	if (addr.in6_u.u6_addr32[0] == w->ip[0] && addr.in6_u.u6_addr32[1] == w->ip[1] &&
	    addr.in6_u.u6_addr32[2] == w->ip[2] && addr.in6_u.u6_addr32[3] == w->ip[3]) {
		w->found = 1;
		return 1;
	}
	w->v6 = after(w->v6);
	return 0;
}

static long each_device(__u32 i __attribute__((unused)), struct walk *w)
{
	const struct net_device *dev;
	const struct inet6_dev *v6;

	if (!w->device || w->device == w->device_head)
		return 1;
	dev = (const void *)w->device - bpf_core_field_offset(struct net_device, dev_list);
	if (w->ip[2] == bpf_htonl(0xffff)) {
		w->v4 = BPF_CORE_READ(dev, ip_ptr, ifa_list);
		bpf_loop(MAX_ADDRESSES, each_v4, w, 0);
	} else {
		v6 = READ(dev, ip6_ptr);
		w->v6_head = v6 ? (const void *)v6 + bpf_core_field_offset(struct inet6_dev, addr_list) : 0;
		w->v6 = v6 ? READ(v6, addr_list.next) : 0;
		bpf_loop(MAX_ADDRESSES, each_v6, w, 0);
	}
	w->device = after(w->device);
	return w->found != 0;
}

static long each_namespace(__u32 i __attribute__((unused)), struct walk *w)
{
	const struct net *net = (const void *)w->at - bpf_core_field_offset(struct net, list);

	if (READ(net, ns.ops) == w->netns_ops) {
		w->device_head = (const void *)net + bpf_core_field_offset(struct net, dev_base_head);
		w->device = READ(net, dev_base_head.next);
		bpf_loop(MAX_DEVICES, each_device, w, 0);
	}
	w->at = after(w->at);
	return w->found || !w->at || w->at == w->first;
}

/* True if some namespace of this node has `ip` on a device; `net` is any live namespace. */
static __always_inline bool node_holds(const struct net *net, const __u32 *ip)
{
	__u64 now = bpf_ktime_get_ns();
	struct holder *known;
	struct walk w = {};

	__builtin_memcpy(w.ip, ip, sizeof(w.ip));
	known = bpf_map_lookup_elem(&holders, w.ip);
	if (known && now < known->until)
		return known->held;
	w.netns_ops = READ(net, ns.ops);
	w.first = w.at = (const void *)net + bpf_core_field_offset(struct net, list);
	bpf_loop(MAX_NAMESPACES, each_namespace, &w, 0);
	w.fresh.held = w.found; /* the walk is over: its place serves, the stack is short */
	w.fresh.until = now + HOLD_NS;
	bpf_map_update_elem(&holders, w.ip, &w.fresh, BPF_ANY);
	return w.fresh.held;
}

#endif
