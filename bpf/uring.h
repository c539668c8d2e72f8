/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs do with their TCP sockets by io_uring, which makes no system call for each operation: seen as
 * the kernel takes a request of theirs, in the program's own thread or in one that polls its ring. */
#ifndef UNDERPASS_URING_H
#define UNDERPASS_URING_H

#include "watch.h"

/* Of enum io_uring_op. */
#define OP_SENDMSG 9
#define OP_RECVMSG 10
#define OP_SEND 26
#define OP_RECV 27
#define OP_SPLICE 30
#define OP_SEND_ZC 47
#define OP_SENDMSG_ZC 48
#define OP_RECV_ZC 58

#define REQ_F_FIXED_FILE 1
#define SPLICE_F_FD_IN_FIXED (1u << 31)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct io_cqe { int fd; };
struct io_rsrc_node { unsigned long file_ptr; };
struct io_rsrc_data { unsigned int nr; struct io_rsrc_node **nodes; };
struct io_file_table { struct io_rsrc_data data; };
struct io_ring_ctx { struct io_file_table file_table; };
struct io_file_table___v612 { unsigned long *files; }; /* really struct io_fixed_file: such a word each */
struct io_ring_ctx___v612 { struct io_file_table___v612 file_table; unsigned int nr_user_files; };
struct io_kiocb { __u8 opcode; __u32 flags; struct io_cqe cqe; struct io_ring_ctx *ctx; };
/* What a request begins with, by its operation. */
struct io_sr_msg { unsigned int msg_flags; };
struct io_splice { int splice_fd_in; unsigned int flags; };

#pragma clang attribute pop

/* The signs that a request gives, if it is on a TCP socket; 0 for nearly all. */
static __always_inline __u32 signs_of_request(const struct io_kiocb *req)
{
	const struct io_sr_msg *message = (const void *)req;
	__u8 operation = req->opcode;

	if (operation == OP_RECV || operation == OP_RECVMSG)
		return reading(BPF_CORE_READ(message, msg_flags));
	if (operation == OP_SEND || operation == OP_SENDMSG)
		return writing(BPF_CORE_READ(message, msg_flags));
	if (operation == OP_SPLICE)
		return UP_SIGN_SPLICE;
	if (operation == OP_SEND_ZC || operation == OP_SENDMSG_ZC || operation == OP_RECV_ZC)
		return UP_SIGN_ZEROCOPY;
	return 0;
}

/* What a program has registered with its ring, to be named by a number there. */
static __always_inline const struct file *registered_file(const struct io_ring_ctx *ring, __u32 number)
{
	const struct io_ring_ctx___v612 *v612 = (const void *)ring;
	const struct io_rsrc_node *node = 0;
	unsigned long file = 0;

	if (bpf_core_field_exists(ring->file_table.data)) {
		if (number >= BPF_CORE_READ(ring, file_table.data.nr))
			return 0;
		bpf_probe_read_kernel(&node, sizeof(node), BPF_CORE_READ(ring, file_table.data.nodes) + number);
		file = node ? BPF_CORE_READ(node, file_ptr) : 0;
	} else if (bpf_core_field_exists(v612->file_table.files)) {
		if (number >= BPF_CORE_READ(v612, nr_user_files))
			return 0;
		bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(v612, file_table.files) + number);
	}
	return (const void *)(file & ~7ul); /* below: flags */
}

/* The request's socket has not been looked up yet: that is done when the operation begins. */
static __always_inline void watch_ring(const struct io_kiocb *req)
{
	const struct io_splice *splice = (const void *)req;
	__u32 signs = signs_of_request(req), number = req->cqe.fd;
	bool registered = req->flags & REQ_F_FIXED_FILE;
	const struct sock *sk;

	if (!signs)
		return;
	if (signs == UP_SIGN_SPLICE) { /* its descriptor proper is where the bytes go */
		number = BPF_CORE_READ(splice, splice_fd_in);
		registered = BPF_CORE_READ(splice, flags) & SPLICE_F_FD_IN_FIXED;
	}
	sk = tcp_socket(registered ? registered_file(req->ctx, number) : open_file(number));
	if (sk && covered(sk))
		gives(sk, signs);
}

#endif
