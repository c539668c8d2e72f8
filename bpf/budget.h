/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Rule 3: bound what waits unread, of a direction, of the node and of the reader's memory cgroups. */
#ifndef UNDERPASS_BUDGET_H
#define UNDERPASS_BUDGET_H

#include "pair.h"
#include "room.h"

/* The node's memory is looked at with every message, but with every 16th of small ones; that of the reader's cgroups with
 * every 16th, of those that are not small with every 4th, and whenever a direction has sent another 128 KiB. */
#define MEMORY_EVERY 16
#define CGROUP_EVERY 4
#define CGROUP_SHIFT 17
#define MEMORY_ALWAYS 16384
#define CPU_PAGES 256 /* what a CPU may have taken and not told of yet (SK_MEMORY_PCPU_RESERVE) */

/* A deep queue needs one of the node's few slots. A slot whose reader has drained may be taken over. */
static __always_inline bool granted(struct endpoint *ep)
{
	__u32 base = (__u32)(ep->self.cookie * 2654435761u), slot = ep->grant & (knobs.grants - 1);
	struct grant *g = bpf_map_lookup_elem(&grants, &slot);
	struct reader r;
	__u64 owner;
	int i;

	if (g && g->owner == ep->self.cookie)
		return true;
	for (i = 0; i < 8; i++) {
		slot = (base + i) & (knobs.grants - 1);
		g = bpf_map_lookup_elem(&grants, &slot);
		if (!g)
			return false;
		owner = g->owner;
		if (owner && g->reader_sock) {
			look(g->reader_sock, &r);
			if (r.cookie == g->reader && r.unread)
				continue;
		}
		if (__sync_val_compare_and_swap(&g->owner, owner, ep->self.cookie) != owner)
			continue;
		g->reader = ep->peer.cookie;
		g->reader_sock = ep->peer_sock;
		ep->grant = slot;
		return true;
	}
	return false;
}

static __always_inline bool memory_short(const struct tcp_sock *tp, __u32 size)
{
	__s64 pages = READER_SOCK(tp).__sk_common.skc_prot->memory_allocated->counter;
	__s64 most = knobs.memory_pages;
	unsigned long pressure = 0;

	/* Signed: the sum may be below zero while CPUs hold reserves (sk_memory_allocated). */
	if (!most || pages <= most >> 1)
		return false;
	/* Pressure lasts from tcp_mem[1] until below tcp_mem[0]. Meanwhile the kernel refuses what a socket is charged beyond
	 * its share, and a redirect fails with ENOMEM where TCP drops a packet. */
	bpf_probe_read_kernel(&pressure, sizeof(pressure), READER_SOCK(tp).__sk_common.skc_prot->memory_pressure);
	return pages + size / PAGE_BYTES + CPU_PAGES > most || pressure;
}

/* The unread messages are those sent since the mark before the last: `older` + `newer`. Once the
 * reader has consumed up to the mark, `older` is past and a new mark is set. */
static __always_inline enum up_reason over_budget(struct endpoint *ep, const struct tcp_sock *tp,
						  const struct reader *r, __u32 size)
{
	__u32 unread = r->unread, always = always_fits(r->buffer);
	__u64 cost, moved = ep->shortcut_bytes ^ (ep->shortcut_bytes + size);
	__u32 messages;

	if (!unread) {
		ep->mark = ep->shortcut_bytes;
		ep->older = ep->newer = 0;
		if (size <= MEMORY_ALWAYS && size <= always)
			return UP_SHORTCUT;
	} else if (ep->shortcut_bytes >= ep->mark + unread) {
		ep->older = ep->newer;
		ep->newer = 0;
		ep->mark = ep->shortcut_bytes;
	}
	messages = ep->older + ep->newer;
	cost = (__u64)unread + size + (__u64)messages * MESSAGE_COST;
	if (cost > knobs.budget_bytes)
		return UP_BUDGET_BYTES;
	if (unread + size > always && outgrows(ep, unread + size, ep->buffer_is == BUFFER_NARROW))
		return UP_BUDGET_BYTES;
	if (messages >= knobs.budget_messages)
		return UP_BUDGET_MESSAGES;
	if ((cost > knobs.shallow_bytes || messages >= knobs.shallow_messages) && !granted(ep))
		return UP_NODE_BUDGET;
	if (messages % MEMORY_EVERY && unread + size <= MEMORY_ALWAYS)
		return UP_SHORTCUT;
	if (memory_short(tp, size))
		return UP_NODE_MEMORY;
	if (messages % CGROUP_EVERY && !(moved >> CGROUP_SHIFT))
		return UP_SHORTCUT;
	return cgroup_short((const struct sock *)ep->peer_sock) && !fault(UP_FAULT_NO_CGROUP) ? UP_CGROUP_MEMORY : UP_SHORTCUT;
}

#endif
