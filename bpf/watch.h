/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs do with their TCP sockets, seen as their system calls begin. Runs at every call of the
 * node, so it ends after a few comparisons unless the call is a telling one. */
#ifndef UNDERPASS_WATCH_H
#define UNDERPASS_WATCH_H

#include "guard.h"

#define MSG_OOB 0x1
#define MSG_PEEK 0x2
#define MSG_TRUNC 0x20
#define MSG_WAITALL 0x100
#define MSG_ERRQUEUE 0x2000
#define MSG_ZEROCOPY 0x4000000
#define TCP_ZEROCOPY_RECEIVE 35
#define FIONREAD 0x541b
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

#define LOOKS_SHIFT 24 /* of what a call tells: enum up_use from here on, below it enum up_sign */

static __always_inline __u32 reading(__u64 flags)
{
	if (flags & MSG_ERRQUEUE) /* not of the stream */
		return 0;
	return (flags & MSG_PEEK ? UP_PEEKS << LOOKS_SHIFT : 0) | (flags & MSG_WAITALL ? UP_SIGN_WAITALL : 0) | (flags & MSG_TRUNC ? UP_SIGN_TRUNC : 0) |
	       (flags & MSG_OOB ? UP_SIGN_OOB : 0);
}

static __always_inline __u32 writing(__u64 flags)
{
	return (flags & MSG_OOB ? UP_SIGN_OOB : 0) | (flags & MSG_ZEROCOPY ? UP_SIGN_ZEROCOPY : 0);
}

/* Calls that are no sign of anything. */
#define ACCEPTS (1u << 31)
#define POLLS (1u << 29)
#define KEEPS (1u << 30) /* sets SO_KEEPALIVE */
#define ASKS (1u << 28)  /* asks epoll for events */
#define EPOLL_CTL_DEL 2  /* for none */

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
	if (call == knobs.calls.poll || call == knobs.calls.ppoll)
		return POLLS;
	if (call == knobs.calls.epoll_ctl)
		return SECOND(regs) == EPOLL_CTL_DEL ? 0 : ASKS;
	if (call == knobs.calls.accept || call == knobs.calls.accept4)
		return ACCEPTS;
	if (call == knobs.calls.setsockopt && SECOND(regs) == SOL_SOCKET && THIRD(regs) == SO_KEEPALIVE)
		return KEEPS;
	if (call == knobs.calls.splice || call == knobs.calls.sendfile)
		return UP_SIGN_SPLICE;
	if (call == knobs.calls.ioctl && (__u32)SECOND(regs) == FIONREAD)
		return UP_COUNTS << LOOKS_SHIFT | (miscounts() ? UP_SIGN_FIONREAD : 0);
	if (call == knobs.calls.getsockopt && SECOND(regs) == SOL_TCP && THIRD(regs) == TCP_ZEROCOPY_RECEIVE)
		return UP_SIGN_ZEROCOPY;
	return 0;
}

/* What is behind a descriptor of the calling task, 0 if it is none. */
static __always_inline const struct file *open_file(__u64 fd)
{
	const struct fdtable *table = bpf_get_current_task_btf()->files->fdt;
	const struct file *file = 0;

	if (fd < table->max_fds)
		bpf_probe_read_kernel(&file, sizeof(file), table->fd + fd);
	return file;
}

/* The TCP socket that a file is, 0 if it is none. */
static __always_inline const struct sock *tcp_socket(const struct file *file)
{
	const struct socket *socket;
	const struct inode *inode;
	const struct sock *sk;
	__u32 protocol;

	if (!file)
		return 0;
	inode = READ(file, f_inode);
	if ((READ(inode, i_mode) & S_IFMT) != S_IFSOCK)
		return 0;
	socket = READ(file, private_data);
	sk = READ(socket, sk);
	protocol = sk ? READ(sk, sk_protocol) : 0;
	return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP ? sk : 0;
}

/* `program` serves where `owner` is noted, whoever listened (as systemd does for others). Where several do,
 * one that is not admitted has the last word. */
static __always_inline void serves(struct up_owner *owner, __u64 program)
{
	struct up_program *listened;

	if (owner->program == program ||
	    (owner->program && (owner->accepts || owner->shared) && admitted(program) == UP_SHORTCUT))
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

	if (READ(sk, __sk_common.skc_state) != BPF_TCP_LISTEN)
		return;
	read_place(sk, &place);
	owner = bpf_map_lookup_elem(&owners, &place);
	if (!owner) { /* it had made room */
		note_listener(&fresh, sk);
		bpf_map_update_elem(&owners, &place, &fresh, BPF_NOEXIST);
		return;
	}
	if (owner->listener != (__u64)sk && !stands(owner)) { /* another at this place has closed */
		note_listener(owner, sk);
		if (owner->shared)
			owner->program = program;
		owner->shared = 0;
	}
	if (p && owner->program == program && !p->accepts)
		p->accepts = 1;
	serves(owner, program);
	if (!owner->accepts && (owner->program == program || !owner->shared))
		owner->accepts = 1;
}

/* The keepalive timer may be running for us: then this changes nothing that we would see when it stops. */
static __noinline void keeps(const struct sock *sk, __u64 value)
{
	int on = 0;

	if (psock_of(sk) && !bpf_probe_read_user(&on, sizeof(on), (const void *)value))
		note_use(sk, on ? UP_KEEPS : 0, UP_KEEPS);
}

struct pollfd { int fd; __s16 events, revents; };
#define POLLRDHUP 0x2000
#define POLLED 4 /* of the sockets of one call, so many are looked at */

/* Does a program ask poll() to be told of the peer's end of file? What it asks epoll stands at the socket: see late.h. */
static __noinline void polls(__u64 list, __u32 count)
{
	struct pollfd asked[POLLED] = {};
	const struct sock *sk;
	int i;

	if (count > POLLED)
		count = POLLED;
	if (bpf_probe_read_user(asked, count * sizeof(*asked), (const void *)list))
		return;
	for (i = 0; i < POLLED; i++) {
		if (!(asked[i].events & POLLRDHUP))
			continue;
		sk = tcp_socket(open_file(asked[i].fd));
		if (sk && covered(sk))
			return note_looks(current_program(), sk, UP_TOLD);
	}
}

/* What epoll is asked stands at the socket only for as long as it is: who has no room for more asks for nothing, and
 * asks again behind a FIN (HAProxy). */
static __noinline void asks(__u64 fd, __u64 event)
{
	const struct sock *sk;
	__u32 events = 0;

	if (bpf_probe_read_user(&events, sizeof(events), (const void *)event) || !(events & POLLRDHUP))
		return;
	sk = tcp_socket(open_file(fd));
	if (sk && covered(sk))
		note_looks(current_program(), sk, UP_TOLD);
}

/* The calling task's program does with `sk` what gives these signs. */
static __always_inline void gives(const struct sock *sk, __u32 signs)
{
	__u64 program = current_program(), cookie;
	__u32 *mark, all;

	if (signs == ACCEPTS)
		return accepts(sk, program);
	if (signs >> LOOKS_SHIFT)
		note_looks(program, sk, signs >> LOOKS_SHIFT);
	signs &= (1u << LOOKS_SHIFT) - 1;
	if (!signs || allowed(program))
		return;
	cookie = READ(sk, __sk_common.skc_cookie.counter);
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

static __always_inline void watch(const void *regs, __u64 call)
{
	__u32 signs = signs_of_call(regs, call);
	const struct sock *sk;

	if (!signs)
		return;
	if (signs == POLLS)
		return polls(FIRST(regs), SECOND(regs));
	if (signs == ASKS)
		return asks(THIRD(regs), FOURTH(regs));
	/* sendfile from a socket into a pipe is a splice; its first descriptor is where the bytes go. */
	sk = tcp_socket(open_file(call == knobs.calls.sendfile ? SECOND(regs) : FIRST(regs)));
	if (!sk || !covered(sk))
		return;
	if (signs == KEEPS)
		return keeps(sk, FOURTH(regs));
	gives(sk, signs);
}

#endif
