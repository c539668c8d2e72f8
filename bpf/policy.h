/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Policy: may an end take the shortcut, by its cgroup (its pod), the server's port and the addresses? User space compiles
 * rules into masks, a bit by rule; those that match in every table are rules that match, and the first decides.
 * Mirrored by policy.py. */
#ifndef UNDERPASS_POLICY_H
#define UNDERPASS_POLICY_H

#include "peek.h"

#define GROUP_LEVELS 12 /* of the cgroup tree, from the socket's own upwards */

/* All written by user space. Full: the command that writes fails, what was in force stays. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct up_policy);
} policies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct up_group);
	__type(value, __u64);
} groups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct up_port);
	__type(value, __u64);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, struct up_network);
	__type(value, __u64);
} networks SEC(".maps");

/* One at a time: the stack of its callers is deep. */
union policy_key {
	struct up_group group;
	struct up_port port;
	struct up_network network;
};

/* The rules for the group that a socket belongs to; 0 = it is in none. */
static __always_inline const __u64 *of_group(const struct sock *sk, union policy_key *key, __u32 bank)
{
	const struct cgroup *cgrp = READ(sk, sk_cgrp_data.cgroup), *at;
	int i, level = cgrp ? READ(cgrp, level) : -1;
	const __u64 *rules = 0;

	key->group = (struct up_group){.bank = bank};
	for (i = 0; i < GROUP_LEVELS && level >= 0 && !rules; i++, level--) {
		bpf_probe_read_kernel(&at, sizeof(at), (const void *)cgrp +
				      bpf_core_field_offset(struct cgroup, ancestors) + level * sizeof(void *));
		key->group.cgroup = BPF_CORE_READ(at, kn, id);
		rules = bpf_map_lookup_elem(&groups, &key->group);
	}
	return rules;
}

/* The rules that name the port at which the server listens, as this end sees it. */
static __always_inline __u64 of_port(const struct sock_common *skc, __u32 role, union policy_key *key, __u32 bank)
{
	const __u64 *rules;

	key->port.port = role == UP_CLIENT ? bpf_ntohs(READ(skc, skc_dport)) : READ(skc, skc_num);
	key->port.bank = bank;
	rules = bpf_map_lookup_elem(&ports, &key->port);
	return rules ? *rules : 0;
}

/* The rules that name a network in which the local or the remote address is. */
static __always_inline __u64 of_network(const struct sock_common *skc, bool remote, union policy_key *key, __u32 bank)
{
	const __u64 *rules;

	key->network = (struct up_network){.bits = 160, .bank = bank};
	if (READ(skc, skc_family) == AF_INET) {
		key->network.ip[2] = bpf_htonl(0xffff);
		key->network.ip[3] = remote ? READ(skc, skc_daddr) : READ(skc, skc_rcv_saddr);
	} else if (remote) {
		BPF_CORE_READ_INTO(&key->network.ip, skc, skc_v6_daddr);
	} else {
		BPF_CORE_READ_INTO(&key->network.ip, skc, skc_v6_rcv_saddr);
	}
	rules = bpf_map_lookup_elem(&networks, &key->network);
	return rules ? *rules : 0;
}

/* May the socket at this address take the shortcut? */
static __noinline int permitted(__u64 sock, __u32 role)
{
	const struct sock *sk = (const void *)sock;
	const struct sock_common *skc = &sk->__sk_common;
	struct up_control *ctl = controls();
	struct up_policy *policy;
	union policy_key key;
	const __u64 *group;
	__u64 rules;
	__u32 bank;

	if (!ctl || !ctl->policy || !sock)
		return 1;
	bank = (ctl->policy - 1) & 1;
	policy = bpf_map_lookup_elem(&policies, &bank);
	if (!policy)
		return 1;
	group = of_group(sk, &key, bank);
	if (!group && (policy->unknown_waits || BPF_CORE_READ(sk, sk_cgrp_data.cgroup, level) >= GROUP_LEVELS))
		return 0; /* or deeper than we look */
	rules = group ? *group : policy->unknown_group;
	rules &= policy->any_port | of_port(skc, role, &key, bank);
	rules &= policy->any_cidr | of_network(skc, false, &key, bank) | of_network(skc, true, &key, bank);
	if (!rules)
		return policy->default_allow != 0;
	return (policy->allow & rules & -rules) != 0; /* the lowest bit alone */
}

#endif
