/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The few kernel types and fields that the programs read, by name only: libbpf relocates every
 * access (CO-RE) to the running kernel, so that no generated vmlinux.h is needed. */
#ifndef UNDERPASS_KERNEL_H
#define UNDERPASS_KERNEL_H

#include <stdbool.h>
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>

#define AF_INET 2
#define AF_INET6 10
#define SOL_SOCKET 1
#define SO_SNDBUF 7
#define SO_KEEPALIVE 9
#define SO_RCVLOWAT 18
#define SOL_TCP 6
#define TCP_KEEPIDLE 4
#define TCP_KEEPINTVL 5
#define TCP_KEEPCNT 6
#define TCP_USER_TIMEOUT 18
#define EEXIST 17
#define ENOSPC 28
#define EBUSY 16
#define ENOMEM 12
#define E2BIG 7

/* What a message on the shortcut does not meet is laid out aside: it is looked at some million times a second. */
#define unlikely(x) __builtin_expect(!!(x), 0)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct { int counter; } atomic_t;
typedef struct { __s64 counter; } atomic64_t;
typedef struct { atomic_t refs; } refcount_t;

struct list_head { struct list_head *next, *prev; };
struct timespec64 { __s64 tv_sec; };
struct inode { __u16 i_mode; unsigned long i_ino; __s64 i_size, i_mtime_sec; };
struct inode___v67 { struct timespec64 __i_mtime; };
struct inode___v61 { struct timespec64 i_mtime; };
struct qstr { const unsigned char *name; };
struct dentry { struct qstr d_name; };
struct path { struct dentry *dentry; };
struct file { unsigned int f_flags; struct inode *f_inode; struct path f_path; void *private_data; };
struct file___v613 { struct { atomic64_t refcnt; } f_ref; }; /* counts from 0 */
struct file___v61 { atomic64_t f_count; };
struct fdtable { unsigned int max_fds; struct file **fd; };
struct files_struct { struct fdtable *fdt; };
struct mm_struct { unsigned long arg_start, arg_end; struct file *exe_file; };
struct thread_info { unsigned long flags; __u32 status; };
struct task_struct {
	struct thread_info thread_info;
	int tgid;
	__u32 self_exec_id;
	unsigned long nivcsw;
	__u64 start_boottime;
	struct task_struct *group_leader;
	struct mm_struct *mm;
	struct files_struct *files;
};
struct pt_regs___x86 { unsigned long di, si, dx, r10; };
struct pt_regs___arm64 { __u64 regs[31]; __u64 orig_x0; };
struct in6_addr { union { __u8 u6_addr8[16]; __u32 u6_addr32[4]; } in6_u; };
struct kernfs_node { __u64 id; };
struct cgroup { struct kernfs_node *kn; int level; struct cgroup *ancestors[]; };
struct sock_cgroup_data { struct cgroup *cgroup; };

struct ns_common { const void *ops; unsigned int inum; };
struct netns_ipv4 { __u8 sysctl_tcp_orphan_retries, sysctl_tcp_retries2; int sysctl_tcp_wmem[3], sysctl_tcp_rmem[3]; };
struct net { struct netns_ipv4 ipv4; struct list_head list; struct ns_common ns; struct list_head dev_base_head; __u64 net_cookie; };
typedef struct { struct net *net; } possible_net_t;
struct net_device { struct list_head dev_list; struct in_device *ip_ptr; struct inet6_dev *ip6_ptr; };
struct in_device { struct in_ifaddr *ifa_list; };
struct in_ifaddr { struct in_ifaddr *ifa_next; __u32 ifa_local; };
struct inet6_dev { struct list_head addr_list; };
struct inet6_ifaddr { struct in6_addr addr; struct list_head if_list; };

struct proto { atomic64_t *memory_allocated; unsigned long *memory_pressure; };
struct page_counter { atomic64_t usage; unsigned long max; struct page_counter *parent; };
struct mem_cgroup { struct page_counter memory; };
struct sock_common {
	__u32 skc_daddr, skc_rcv_saddr;
	__u16 skc_dport, skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct proto *skc_prot;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr, skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
	unsigned long skc_flags;
	struct sock *skc_listener;
};
struct wait_queue_entry { void *func; struct list_head entry; };
struct wait_queue_head { struct list_head head; };
struct epoll_event { __u32 events; };
struct epitem { struct epoll_event event; };
struct eppoll_entry { struct epitem *base; struct wait_queue_entry wait; };
typedef struct { int owned; } socket_lock_t;
struct socket_wq { struct wait_queue_head wait; };
struct socket { unsigned long flags; struct file *file; struct sock *sk; };
struct sock {
	struct sock_common __sk_common;
	struct { atomic_t rmem_alloc; } sk_backlog;
	socket_lock_t sk_lock;
	struct socket_wq *sk_wq;
	struct mem_cgroup *sk_memcg;
	int sk_rcvlowat, sk_sndbuf, sk_rcvbuf, sk_peek_off, sk_write_pending;
	__u32 sk_tsflags, sk_allocation;
	__u8 sk_shutdown;
	__u8 sk_userlocks;
	__u16 sk_protocol;
	struct socket *sk_socket;
	void *sk_user_data;
	struct sock_cgroup_data sk_cgrp_data;
};
struct inet_sock { struct sock sk; };
struct inet_connection_sock { struct inet_sock icsk_inet; const void *icsk_ulp_ops; __u32 icsk_user_timeout, icsk_rto_max; };
struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 copied_seq, rcv_nxt, rcv_wup, rcv_wnd, write_seq, snd_una;
	__u16 advmss;
	__u64 bytes_acked, bytes_received;
	__u8 bpf_sock_ops_cb_flags;
	__u8 is_mptcp;
	__u8 nonagle;
};
/* Only where its bit stands counts: it moves between kernels. */
enum sock_flags { SOCK_ZEROCOPY = 1 };
struct request_sock { struct sock_common __req_common; };
struct inet_request_sock { struct request_sock req; };
struct tcp_request_sock { struct inet_request_sock req; __u32 rcv_isn; };
struct bpf_sock_ops_kern { struct sock *sk; }; /* what a sock_ops context really is */
struct sk_psock { struct list_head ingress_msg; refcount_t refcnt; };

struct seq_file;
struct bpf_iter_meta { struct seq_file *seq; };
struct bpf_iter__tcp { struct bpf_iter_meta *meta; struct sock_common *sk_common; };
struct bpf_iter__sockmap { struct bpf_iter_meta *meta; struct bpf_map *map; void *key; struct sock *sk; };

#pragma clang attribute pop

/* Since 6.2; before, the same reads go by bpf_probe_read_kernel (knob `rdonly_cast`). */
extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym __weak;

/* A field of 1, 2, 4 or 8 bytes behind any address, 0 where nothing is: one load in place of a call of
 * bpf_probe_read_kernel. What comes is a number to the verifier, also if it is a pointer: the memory is taken for that of a type which
 * begins with one. */
#define READ(from, field)                                                                          \
	({                                                                                         \
		typeof((from)->field) what;                                                        \
		const void *where = (const void *)&(from)->field;                                  \
		_Static_assert(sizeof(what) <= 8, "a number");                                     \
		if (knobs.rdonly_cast) {                                                           \
			where = bpf_rdonly_cast(where, bpf_core_type_id_kernel(struct timespec64)); \
			switch (sizeof(what)) {                                                    \
			case 1: *(__u8 *)&what = *(const volatile __u8 *)where; break;             \
			case 2: *(__u16 *)&what = *(const volatile __u16 *)where; break;           \
			case 4: *(__u32 *)&what = *(const volatile __u32 *)where; break;           \
			default: *(__u64 *)&what = *(const volatile __u64 *)where;                 \
			}                                                                          \
		} else {                                                                           \
			bpf_core_read((void *)&what, sizeof(what), &(from)->field);                \
		}                                                                                  \
		what;                                                                              \
	})

#endif
