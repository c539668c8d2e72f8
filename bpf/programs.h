/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs, and who one is: name, size and time of change of the executable, the same in every container
 * of an image; of an interpreter also its arguments. Key 0 = cannot tell, which is never admitted while we
 * watch: programs of 32 bits are such, since their system calls have other numbers. */
#ifndef UNDERPASS_PROGRAMS_H
#define UNDERPASS_PROGRAMS_H

#include "peek.h"

#define TS_COMPAT 2           /* x86: set on entry by int 0x80 and its like */
#define TIF_32BIT (1ul << 22) /* arm64 */
#define NAME_SIZE 32          /* of up_program.name */
#define ARGUMENT_WORDS 8      /* read at a time */
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

/* Mirrored by programs.py, which computes the same key for a process from /proc. */
static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
	return hash ^ (hash >> 32);
}

/* The program that was put here for `owner`; 0 = none, or another was put over it. */
static __always_inline __u64 sealed_for(const struct sealed *at, __u64 owner)
{
	__u64 program = at ? *(volatile const __u64 *)&at->program : 0;

	return program && *(volatile const __u64 *)&at->seal == mix(owner, program) ? program : 0;
}

static __always_inline void put_sealed(struct sealed *at, __u64 owner, __u64 program)
{
	if (!at)
		return;
	*(volatile __u64 *)&at->program = program;
	*(volatile __u64 *)&at->seal = mix(owner, program);
}

static __always_inline __u64 changed_at(const struct inode *inode)
{
	const struct inode___v67 *v67 = (const void *)inode;
	const struct inode___v61 *v61 = (const void *)inode;

	if (bpf_core_field_exists(inode->i_mtime_sec))
		return READ(inode, i_mtime_sec);
	if (bpf_core_field_exists(v67->__i_mtime))
		return READ(v67, __i_mtime.tv_sec);
	return READ(v61, i_mtime.tv_sec);
}

/* Programs that are what their arguments say. Four letters tell enough, or three. */
static __always_inline bool interprets(const char *name)
{
	__u32 first = *(const __u32 *)name, three = first & 0xffffff;

	return first == 0x68747970 /* pyth */ || first == 0x65646f6e /* node */ ||
	       first == 0x6176616a /* java */ || first == 0x79627572 /* ruby */ ||
	       first == 0x6c726570 /* perl */ || first == 0x6e746f64 /* dotn */ ||
	       first == 0x79737562 /* busy */ || first == 0x6c2d646c /* ld-l */ ||
	       first == 0x756d6571 /* qemu */ || first == 0x6d616562 /* beam */ ||
	       first == 0x6f6e6564 /* deno */ || first == 0x6f6e6f6d /* mono */ ||
	       three == 0x706870 /* php */ || three == 0x61756c /* lua */ || three == 0x6e7562 /* bun */;
}

static __always_inline const struct file *executable(const struct mm_struct *mm)
{
	return mm ? READ(mm, exe_file) : 0;
}

static __always_inline const struct mm_struct *memory_of_caller(void)
{
	return READ((const struct task_struct *)bpf_get_current_task(), mm);
}

static __always_inline void read_name(char *name, const struct file *exe)
{
	bpf_probe_read_kernel_str(name, NAME_SIZE, BPF_CORE_READ(exe, f_path.dentry, d_name.name));
}

/* Is the calling task in a system call of 32 bits (x86), or its program made for 32 (arm64)? */
static __always_inline bool narrow_call(void)
{
	const struct task_struct *task = bpf_get_current_task_btf();

	if (bpf_core_field_exists(task->thread_info.status))
		return task->thread_info.status & TS_COMPAT;
	return task->thread_info.flags & TIF_32BIT;
}

/* The key of the calling task's program; 0 = cannot tell. */
static __noinline __u64 identify(__u32 *interpreter)
{
	const struct mm_struct *mm = memory_of_caller();
	const struct file *exe = executable(mm);
	__u64 words[ARGUMENT_WORDS] = {}, hash = 0, at, left;
	const struct inode *inode;
	int i, part;

	if (!exe || narrow_call())
		return 0;
	inode = READ(exe, f_inode);
	read_name((char *)words, exe);
	for (i = 0; i < NAME_SIZE / 8; i++)
		hash = mix(hash, words[i]);
	hash = mix(hash, READ(inode, i_size));
	hash = mix(hash, changed_at(inode));
	*interpreter = interprets((char *)words);
	if (!*interpreter)
		return hash ?: 1;
	at = READ(mm, arg_start);
	left = READ(mm, arg_end) - at;
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

/* Programs that were identified on each CPU of late, by the run that the task was in. */
#define LAST_CALLERS 16
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LAST_CALLERS);
	__type(key, __u32);
	__type(value, struct sealed);
} last_callers SEC(".maps");

/* The run that the calling task is in; 0 = none. */
static __always_inline __u64 current_run(void)
{
	const struct task_struct *task = bpf_get_current_task_btf();
	const struct mm_struct *mm = memory_of_caller(); /* probe reads: the verifier wants no sums of pointers */

	return mix(mix(mix((__u64)mm, (__u64)executable(mm)), task->group_leader->start_boottime), task->self_exec_id);
}

static __always_inline struct sealed *last_caller(__u64 run)
{
	__u32 slot = run % LAST_CALLERS;

	return bpf_map_lookup_elem(&last_callers, &slot);
}

/* The calling task's program, entered into the list if it is new. Global: see waits_in(). */
__noinline __u64 current_program(void)
{
	__u64 key, start, size;
	const struct mm_struct *mm;
	struct up_program *p;
	__u64 run = current_run();
	__u32 interpreter = 0;
	struct sealed *last;

	last = last_caller(run);
	key = narrow_call() ? 0 : sealed_for(last, run);
	if (key && bpf_map_lookup_elem(&programs, &key))
		return key;
	key = identify(&interpreter);
	if (!key)
		return 0;
	if (!interpreter) /* one may write new arguments over its own */
		put_sealed(last, run, key);
	if (bpf_map_lookup_elem(&programs, &key))
		return key;
	bpf_map_update_elem(&programs, &key, &nothing_known, BPF_NOEXIST);
	p = bpf_map_lookup_elem(&programs, &key);
	mm = memory_of_caller();
	if (!p || !executable(mm))
		return key;
	p->first_seen = bpf_ktime_get_ns();
	p->pid = READ((const struct task_struct *)bpf_get_current_task(), tgid);
	read_name(p->name, executable(mm));
	p->by_arguments = interprets(p->name);
	start = READ(mm, arg_start);
	size = READ(mm, arg_end) - start;
	if (size > sizeof(p->command))
		size = sizeof(p->command);
	bpf_probe_read_user(p->command, size, (const void *)start);
	p->rule = rule_for(key, p->name);
	return key;
}

#endif
