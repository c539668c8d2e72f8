/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The guard: programs that use what the shortcut cannot serve (splice from a socket, MSG_WAITALL and
 * so on) stay on TCP. A program is watched on TCP before any of its connections may take the shortcut,
 * and for as long as it lives: what it does is seen at the entry of its system calls (up_watch) and in
 * the state of its sockets, and is remembered under the program's identity.
 *
 * Identity: name, size and time of change of the executable, the same in every container of an image;
 * of an interpreter also its arguments. Key 0 = cannot tell, which is never admitted while we watch:
 * 32-bit programs are such, since their system calls have other numbers. */
#ifndef UNDERPASS_GUARD_H
#define UNDERPASS_GUARD_H

#include "peek.h"

#define MSG_OOB 0x1
#define MSG_TRUNC 0x20
#define MSG_WAITALL 0x100
#define MSG_ZEROCOPY 0x4000000
#define TCP_ZEROCOPY_RECEIVE 35
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262
#define TS_COMPAT 2            /* x86: set on entry by int 0x80 and its like */
#define TIF_32BIT (1ul << 22)  /* arm64 */

#define NAME_SIZE 32 /* of up_program.name */
#define PAUSE_NS 1000000000ull /* a longer silence counts as this much of running */
#define ARGUMENT_WORDS 8       /* read at a time */
#define ARGUMENT_PARTS 8

/* Key -> what is known of a program. LRU: one that was forgotten is watched anew. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct up_program);
} programs SEC(".maps");

/* Written by user space, read when a program is met for the first time. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct up_rule_key);
	__type(value, __u32); /* enum up_rule */
} rules SEC(".maps");

/* Where a program listens -> the key of who serves there. Written by LISTEN, by user space for listeners
 * that stood before, and by up_watch if another program accepts. LRU: the owner is then unknown. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct up_place);
	__type(value, __u64);
} owners SEC(".maps");

/* Cookies of sockets in the map that were used as they must not be, whoever owns them. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u32); /* enum up_sign */
} marked SEC(".maps");

/* Endpoints look their verdicts up again when this has changed. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct up_news);
} news SEC(".maps");

static __always_inline struct up_news *latest(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&news, &zero);
}

static __always_inline void tell(void)
{
	struct up_news *n = latest();

	if (n)
		__sync_fetch_and_add(&n->epoch, 1);
}

/* Mirrored by programs.py, which computes the same key for a process from /proc. */
static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
	return hash ^ (hash >> 32);
}

static __always_inline __u64 changed_at(const struct inode *inode)
{
	const struct inode___v67 *v67 = (const void *)inode;
	const struct inode___v61 *v61 = (const void *)inode;

	if (bpf_core_field_exists(inode->i_mtime_sec))
		return BPF_CORE_READ(inode, i_mtime_sec);
	if (bpf_core_field_exists(v67->__i_mtime))
		return BPF_CORE_READ(v67, __i_mtime.tv_sec);
	return BPF_CORE_READ(v61, i_mtime.tv_sec);
}

/* Programs that are what their arguments say. Four letters tell enough. */
static __always_inline bool interprets(const char *name)
{
	__u32 first = *(const __u32 *)name;

	return first == 0x68747970 /* pyth */ || first == 0x65646f6e /* node */ ||
	       first == 0x6176616a /* java */ || first == 0x79627572 /* ruby */ ||
	       first == 0x6c726570 /* perl */ || first == 0x6e746f64 /* dotn */ ||
	       first == 0x79737562 /* busy */ || (first & 0xffffff) == 0x706870 /* php */;
}

static __always_inline const struct file *executable(const struct mm_struct *mm)
{
	return mm ? BPF_CORE_READ(mm, exe_file) : 0;
}

static __always_inline const struct mm_struct *memory_of_caller(void)
{
	return BPF_CORE_READ((const struct task_struct *)bpf_get_current_task(), mm);
}

static __always_inline void read_name(char *name, const struct file *exe)
{
	bpf_probe_read_kernel_str(name, NAME_SIZE, BPF_CORE_READ(exe, f_path.dentry, d_name.name));
}

/* Is the calling task in a system call of 32 bits (x86), or its program made for 32 (arm64)? */
static __always_inline bool narrow_call(void)
{
	const struct task_struct *task = (const void *)bpf_get_current_task();

	if (bpf_core_field_exists(task->thread_info.status))
		return BPF_CORE_READ(task, thread_info.status) & TS_COMPAT;
	return BPF_CORE_READ(task, thread_info.flags) & TIF_32BIT;
}

/* The key of the calling task's program; 0 = cannot tell. */
static __noinline __u64 identify(void)
{
	const struct mm_struct *mm = memory_of_caller();
	const struct file *exe = executable(mm);
	__u64 words[ARGUMENT_WORDS] = {}, hash = 0, at, left;
	const struct inode *inode;
	int i, part;

	if (!exe || narrow_call())
		return 0;
	inode = BPF_CORE_READ(exe, f_inode);
	read_name((char *)words, exe);
	for (i = 0; i < NAME_SIZE / 8; i++)
		hash = mix(hash, words[i]);
	hash = mix(hash, BPF_CORE_READ(inode, i_size));
	hash = mix(hash, changed_at(inode));
	if (!interprets((char *)words))
		return hash ?: 1;
	at = BPF_CORE_READ(mm, arg_start);
	left = BPF_CORE_READ(mm, arg_end) - at;
	for (part = 0; part < ARGUMENT_PARTS && left; part++) {
		__u64 size = left < sizeof(words) ? left : sizeof(words);

		__builtin_memset(words, 0, sizeof(words));
		if (size > sizeof(words) || bpf_probe_read_user(words, size, (const void *)at))
			return 0;
		for (i = 0; i < ARGUMENT_WORDS; i++)
			hash = mix(hash, words[i]);
		at += size;
		left -= size;
	}
	return hash ?: 1;
}

static __always_inline __u32 rule_for(__u64 program, const char *name)
{
	struct up_rule_key key = {.program = program};
	__u32 *rule = bpf_map_lookup_elem(&rules, &key);

	if (!rule) {
		key.program = 0;
		__builtin_memcpy(key.name, name, sizeof(key.name));
		rule = bpf_map_lookup_elem(&rules, &key);
	}
	return rule ? *rule : 0;
}

static const struct up_program nothing_known;

/* The calling task's program, entered into the list if it is new. */
static __noinline __u64 current_program(void)
{
	__u64 key = identify(), start, size;
	const struct mm_struct *mm;
	struct up_program *p;

	if (!key || bpf_map_lookup_elem(&programs, &key))
		return key;
	bpf_map_update_elem(&programs, &key, &nothing_known, BPF_NOEXIST);
	p = bpf_map_lookup_elem(&programs, &key);
	mm = memory_of_caller();
	if (!p || !executable(mm))
		return key;
	p->first_seen = bpf_ktime_get_ns();
	p->pid = BPF_CORE_READ((const struct task_struct *)bpf_get_current_task(), tgid);
	read_name(p->name, executable(mm));
	p->by_arguments = interprets(p->name);
	start = BPF_CORE_READ(mm, arg_start);
	size = BPF_CORE_READ(mm, arg_end) - start;
	if (size > sizeof(p->command))
		size = sizeof(p->command);
	bpf_probe_read_user(p->command, size, (const void *)start);
	p->rule = rule_for(key, p->name);
	return key;
}

/* May its connections take the shortcut? UP_SHORTCUT, UP_OBSERVED or UP_GUARDED. One that had to make
 * room in the list waits until it is met again: there may be a rule for it. */
static __always_inline enum up_reason admitted(__u64 program)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;

	if (p && p->rule == UP_ALLOW)
		return UP_SHORTCUT;
	if (p && (p->signs || p->rule == UP_DENY))
		return UP_GUARDED;
	if (program && !p)
		return UP_OBSERVED;
	if (knobs.observe_ns && (!p || p->active_ns < knobs.observe_ns))
		return UP_OBSERVED;
	return UP_SHORTCUT;
}

static __always_inline bool allowed(__u64 program)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;

	return p && p->rule == UP_ALLOW;
}

/* Does it accept itself where it listens? Else it may hand its listeners on to a program never seen. */
static __always_inline bool serves_itself(__u64 program)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;

	return !knobs.observe_ns || (p && (p->rule == UP_ALLOW || (p->accepts && !p->hands_on)));
}

static __always_inline void note_sign(__u64 program, __u32 sign)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;

	if (!p || (p->signs & sign))
		return;
	__sync_fetch_and_or(&p->signs, sign);
	tell();
}

/* What the state of a socket says about its program. */
static __always_inline __u32 signs_of(const struct tcp_sock *tp)
{
	__u32 signs = READER_SOCK(tp).sk_rcvlowat > 1 ? UP_SIGN_RCVLOWAT : 0;

	if (tp->inet_conn.icsk_ulp_ops)
		signs |= UP_SIGN_ULP;
	return zero_copies(tp) ? signs | UP_SIGN_ZEROCOPY : signs;
}

/* An observed program has sent a TCP packet on a local connection: it runs. True while it is to be
 * watched further. */
static __always_inline bool ran(__u64 program, const struct tcp_sock *tp)
{
	struct up_program *p = program ? bpf_map_lookup_elem(&programs, &program) : 0;
	__u64 now = bpf_ktime_get_ns(), before;
	__u32 signs;

	if (!p)
		return false;
	signs = signs_of(tp);
	if (signs)
		note_sign(program, signs);
	before = __sync_lock_test_and_set(&p->last_seen, now);
	if (before && before < now)
		__sync_fetch_and_add(&p->active_ns, now - before < PAUSE_NS ? now - before : PAUSE_NS);
	return admitted(program) == UP_OBSERVED;
}

/* Has a sign been seen at one of the ends since this endpoint looked last? */
static __always_inline bool guarded(struct endpoint *ep)
{
	struct up_news *n = latest();
	__u32 *use;

	if (!n || ep->epoch == n->epoch)
		return ep->guarded;
	ep->epoch = n->epoch;
	use = bpf_map_lookup_elem(&marked, &ep->peer.cookie);
	if (use && *use & UP_SIGN_SPLICE)
		ep->spliced = 1;
	if (use || admitted(ep->program) == UP_GUARDED || admitted(ep->peer_program) == UP_GUARDED ||
	    bpf_map_lookup_elem(&marked, &ep->self.cookie))
		ep->guarded = 1;
	return ep->guarded;
}

/* splice does not see redirected bytes and would take TCP bytes that were sent after them: while such wait
 * at a peer that was spliced from, the shortcut alone keeps the order. */
static __always_inline bool order_at_stake(const struct endpoint *ep)
{
	const struct sock *peer = (const void *)ep->peer_sock;

	return ep->spliced && psock_of(peer) && has_unread(peer) && !fault(UP_FAULT_LATE_SPLICE);
}

/* The calling endpoint shall leave the map, once what its peer may have under way has arrived. */
static __always_inline void wants_out(struct endpoint *ep, enum up_reason reason)
{
	ep->gone_at = bpf_ktime_get_ns();
	ep->leave = reason;
}

/* Who serves what arrives at this end: who listens at the very address, else at any. */
static __always_inline __u64 *owner_of(__u64 netns, const struct up_address *local)
{
	struct up_place place = {.netns = netns, .at = *local};
	__u64 *owner = bpf_map_lookup_elem(&owners, &place);

	if (owner)
		return owner;
	place.at.ip[0] = place.at.ip[1] = place.at.ip[3] = 0;
	if (local->ip[2] == bpf_htonl(0xffff)) {
		owner = bpf_map_lookup_elem(&owners, &place);
		if (owner)
			return owner;
	}
	place.at.ip[2] = 0;
	return bpf_map_lookup_elem(&owners, &place);
}

/* The same for the local end of `sk`, which need not be the caller's to lock. */
static __always_inline __u64 *owner_at(const struct sock *sk)
{
	struct up_address local = {}, remote;

	read_sock_ends(sk, &local, &remote);
	return owner_of(BPF_CORE_READ(sk, __sk_common.skc_net.net, net_cookie), &local);
}

/* Who accepts is who reads, and may not be who listened: the listener may have been handed on. `listened`
 * is whose verdict let the accepted socket `sk` into the map; may it stay? */
static __noinline enum up_reason acceptor(const struct sock *sk, __u64 *listened)
{
	__u64 *owner = owner_at(sk);

	if (!owner || *owner == *listened)
		return UP_SHORTCUT;
	*listened = *owner;
	return admitted(*listened);
}

#endif
