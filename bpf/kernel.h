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
#define EEXIST 17
#define ENOSPC 28
#define EBUSY 16
#define ENOMEM 12
#define E2BIG 7

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
struct file { struct inode *f_inode; struct path f_path; void *private_data; };
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
struct net { struct list_head list; struct ns_common ns; struct list_head dev_base_head; __u64 net_cookie; };
typedef struct { struct net *net; } possible_net_t;
struct net_device { struct list_head dev_list; struct in_device *ip_ptr; struct inet6_dev *ip6_ptr; };
struct in_device { struct in_ifaddr *ifa_list; };
struct in_ifaddr { struct in_ifaddr *ifa_next; __u32 ifa_local; };
struct inet6_dev { struct list_head addr_list; };
struct inet6_ifaddr { struct in6_addr addr; struct list_head if_list; };

struct proto { atomic64_t *memory_allocated; };
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
typedef struct { int owned; } socket_lock_t;
struct wait_queue_entry { void *func; struct list_head entry; };
struct wait_queue_head { struct list_head head; };
struct socket_wq { struct wait_queue_head wait; };
struct socket { struct file *file; struct sock *sk; };
struct sock {
	struct sock_common __sk_common;
	struct { atomic_t rmem_alloc; } sk_backlog;
	socket_lock_t sk_lock;
	struct socket_wq *sk_wq;
	int sk_rcvlowat, sk_sndbuf, sk_peek_off;
	__u8 sk_shutdown;
	__u8 sk_userlocks;
	__u16 sk_protocol;
	struct socket *sk_socket;
	void *sk_user_data;
	struct sock_cgroup_data sk_cgrp_data;
};
struct inet_sock { struct sock sk; };
struct inet_connection_sock { struct inet_sock icsk_inet; const void *icsk_ulp_ops; };
struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 copied_seq, rcv_nxt, write_seq, snd_una;
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

#endif
