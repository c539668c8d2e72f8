/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs do with their TCP sockets, seen as their system calls begin. Runs at every call of the
 * node, so it ends after a few comparisons unless the call is a telling one. */
#ifndef UNDERPASS_WATCH_H
#define UNDERPASS_WATCH_H

#include "guard.h"

#define MSG_OOB 0x1
#define MSG_TRUNC 0x20
#define MSG_WAITALL 0x100
#define MSG_ZEROCOPY 0x4000000
#define TCP_ZEROCOPY_RECEIVE 35
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262

/* An argument of a system call, 0 to 3, read directly: this runs with every message of the node. CO-RE picks the
 * architecture's own as the object is loaded. */
#define ARGUMENT(at, x86_name, arm_name)                                                 \
	({                                                                                         \
		const struct pt_regs___x86 *x86 = at;                                            \
		const struct pt_regs___arm64 *arm = at;                                          \
		bpf_core_field_exists(x86->r10) ? x86->x86_name : arm->arm_name;                   \
	})
#define FIRST(at) ARGUMENT(at, di, orig_x0)
#define SECOND(at) ARGUMENT(at, si, regs[1])
#define THIRD(at) ARGUMENT(at, dx, regs[2])
#define FOURTH(at) ARGUMENT(at, r10, regs[3])

static __always_inline __u32 reading(__u64 flags)
{
	return (flags & MSG_WAITALL ? UP_SIGN_WAITALL : 0) | (flags & MSG_TRUNC ? UP_SIGN_TRUNC : 0) |
	       (flags & MSG_OOB ? UP_SIGN_OOB : 0);
}

static __always_inline __u32 writing(__u64 flags)
{
	return (flags & MSG_OOB ? UP_SIGN_OOB : 0) | (flags & MSG_ZEROCOPY ? UP_SIGN_ZEROCOPY : 0);
}

#define ACCEPTS (1u << 31) /* no sign of anything: the call accepts */

/* The signs that a call gives, if it is on a TCP socket; 0 for nearly all. */
static __always_inline __u32 signs_of_call(const void *regs, __u64 call)
{
	if (call == knobs.calls.recvfrom || call == knobs.calls.recvmmsg)
		return reading(FOURTH(regs));
	if (call == knobs.calls.recvmsg)
		return reading(THIRD(regs));
	if (call == knobs.calls.sendto || call == knobs.calls.sendmmsg)
		return writing(FOURTH(regs));
	if (call == knobs.calls.sendmsg)
		return writing(THIRD(regs));
	if (call == knobs.calls.accept || call == knobs.calls.accept4)
		return ACCEPTS;
	if (call == knobs.calls.splice)
		return UP_SIGN_SPLICE;
	if (call == knobs.calls.getsockopt && SECOND(regs) == SOL_TCP && THIRD(regs) == TCP_ZEROCOPY_RECEIVE)
		return UP_SIGN_ZEROCOPY;
	return 0;
}

/* The TCP socket behind a descriptor of the calling task, 0 if it is none. */
static __always_inline const struct sock *tcp_socket(__u64 fd)
{
	const struct task_struct *task = (const void *)bpf_get_current_task();
	const struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	const struct file *file = 0;
	const struct socket *socket;
	const struct sock *sk;
	__u32 protocol;

	if (fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(table, fd) + fd);
	if (!file || (BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	protocol = sk ? BPF_CORE_READ(sk, sk_protocol) : 0;
	return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP ? sk : 0;
}

/* `program` serves where `owner` is noted, whoever listened (as systemd does for others). Where several do,
 * one that is not admitted has the last word. */
static __always_inline void serves(struct up_owner *owner, __u64 program)
{
	struct up_program *listened;

	if (owner->program == program ||
	    (owner->program && owner->accepts && admitted(program) == UP_SHORTCUT))
		return;
	listened = bpf_map_lookup_elem(&programs, &owner->program);
	if (listened)
		listened->hands_on = 1;
	owner->program = program;
}

static __noinline void served_by(const struct sock *sk, __u64 program)
{
	struct up_owner *owner = owner_at(sk);

	if (owner)
		serves(owner, program);
}

/* `program` is about to accept from `sk`. */
static __noinline void accepts(const struct sock *sk, __u64 program)
{
	struct up_owner fresh = {.program = program, .accepts = 1}, *owner;
	struct up_program *p = bpf_map_lookup_elem(&programs, &program);
	struct up_place place = {};

	if (BPF_CORE_READ(sk, __sk_common.skc_state) != BPF_TCP_LISTEN)
		return;
	read_place(sk, &place);
	owner = bpf_map_lookup_elem(&owners, &place);
	if (!owner) { /* it had made room */
		note_listener(&fresh, sk);
		bpf_map_update_elem(&owners, &place, &fresh, BPF_NOEXIST);
		return;
	}
	if (p && owner->program == program && !p->accepts)
		p->accepts = 1;
	serves(owner, program);
	if (owner->listener != (__u64)sk && !stands(owner))
		note_listener(owner, sk); /* another at this place has closed */
	if (!owner->accepts)
		owner->accepts = 1;
}

static __always_inline void watch(const void *regs, __u64 call)
{
	__u64 program, cookie;
	const struct sock *sk;
	__u32 signs = signs_of_call(regs, call), *mark, all;

	if (!signs)
		return;
	sk = tcp_socket(FIRST(regs));
	if (!sk || !covered(sk))
		return;
	program = current_program();
	if (signs == ACCEPTS)
		return accepts(sk, program);
	if (allowed(program))
		return;
	cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	mark = bpf_map_lookup_elem(&marked, &cookie);
	if (psock_of(sk) && cookie && (!mark || (*mark & signs) != signs)) {
		all = signs | (mark ? *mark : 0);
		bpf_map_update_elem(&marked, &cookie, &all, BPF_ANY);
		tell();
	}
	if (program) {
		note_sign(program, signs);
		served_by(sk, program);
	}
}

#endif
