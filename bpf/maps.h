/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Maps. Of each map: who writes it, what a full one means, how an entry goes away. */
#ifndef UNDERPASS_MAPS_H
#define UNDERPASS_MAPS_H

#include "kernel.h"
#include "underpass.h"

const volatile struct up_knobs knobs SEC(".rodata.knobs");

/* A queued message pins one slab object (struct sk_msg in kmalloc-1k) besides its bytes. */
#define MESSAGE_COST 1024

/* A program, written and read without a lock. */
struct sealed {
	__u64 program;
	__u64 seal; /* tells whose, and that both were written together */
};

struct numbers {
	__u32 client_next; /* client's snd_nxt = server's rcv_nxt as the handshake ends */
	__u32 server_next; /* client's rcv_nxt = server's snd_nxt */
};

/* One endpoint of one connection. The cookie alone would not do: a socket keeps it when it is
 * disconnected (connect to AF_UNSPEC) and connected again. */
struct key {
	__u64 cookie;
	struct numbers numbers;
};

/* What we made of a send buffer's size, if it still is the one that we set. */
enum buffer_is { BUFFER_UNTOUCHED, BUFFER_NARROW, BUFFER_ROOMY, BUFFER_WIDE };

/* State of one endpoint. Written under its socket lock only; freed with the socket. */
struct endpoint {
	struct key self;
	struct key peer; /* cookie 0 = not paired */
	struct numbers numbers; /* of its handshake */
	__u64 sock;      /* kernel address of its own socket */
	__u64 peer_sock; /* kernel address, only ever read through look() */
	__u64 peer_state; /* kernel address of its struct endpoint, only ever read through answers() */
	__u64 answered;  /* what the peer had sent as the run of small messages began */
	__u64 shortcut_bytes;
	__u64 shortcut_messages;
	__u64 tcp_messages;
	__u64 mark;  /* value of shortcut_bytes when `newer` began to count */
	__u32 newer; /* messages since the mark */
	__u32 older; /* messages between the mark before and the mark */
	__u64 program;      /* key of the program that connected or listens, 0 = unknown */
	__u64 peer_program;
	__u64 epoch;       /* state of the news at the last look at the verdicts */
	__u64 sender;      /* the task that sent last while it was leaving */
	__u64 told_at;     /* ns: when it announced to its peer that it leaves */
	__u64 gone_at;     /* ns: when the peer was first missed, or it was found guarded */
	__u64 left_at;     /* ns: when it left the map */
	__u64 proved_at;   /* ns: since when nothing went by TCP; 0 = ask with the next message */
	__u64 tick;        /* jiffies at the last look at these */
	__u64 proof_mark;  /* what had been redirected as a proof fell due; 0 = none is */
	__u64 fin_at;      /* ns: when a FIN came too early, see late.h */
	__u64 ack_at;      /* ns: when the ACK of our own did */
	__u64 seen_at;     /* ns: since when the TCP bytes before `seen_end` wait, none redirected ahead */
	__u32 seen_end;
	int buffer;        /* the size of its send buffer, as we set it last */
	int keep_idle, keep_interval, keep_count, user_timeout; /* what TCP_KEEPIDLE and so on were before we ticked */
	__u32 redirect_seq; /* write_seq at the last redirect: TCP bytes since then show as a difference */
	__u32 grant; /* slot that this direction last held */
	__u32 held;  /* over budget with many bytes unread: TCP shall hold the sender tightly, by messages of this size; 0 = not */
	__u8 role;
	__u8 reason;  /* of the last message, or of the refusal */
	__u8 ask;     /* the reader may have gone to sleep before it entered the map */
	__u8 leave;   /* reason for which sock_ops shall take it out of the map; 0 = none */
	__u8 watched; /* listener: this generation set the SYN-ACK callback */
	__u8 ticking; /* the keepalive timer runs for us; 2 = the program had it on itself */
	__u8 left;    /* it was in the map and is not any more */
	__u8 leaves;  /* how often that was so */
	__u8 buffer_is; /* enum buffer_is */
	__u8 observed; /* not in the map: its packets show that its program runs */
	__u8 barred;  /* the policy keeps one of the ends on TCP */
	__u8 guarded; /* a sign was seen at one of the ends: TCP from now on, and out of the map */
	__u8 spliced; /* its peer was spliced from in the map: TCP bytes would overtake what waits there */
	__u8 certain;  /* who serves the server's end is known for sure */
	__u8 loopback; /* both ends are in one network namespace */
	__u8 hasty;    /* it leaves as soon as its peer has been told */
	__u8 waits;    /* it looks on while a thread holds its peer: it lets go of its own socket soon */
	__u8 emptying; /* a small stream that goes by TCP once its reader has taken all that was redirected */
	__s8 side;     /* runs in a row in which the reader ran on another core; below 0: in which it did not */
	__u32 unread_row; /* messages in a row that went by TCP since earlier ones were unread there */
	__u32 small;   /* small messages in a row that a busy reader had not asked for; see small.h */
	__u32 sent, taken, switches; /* as the run began: bytes sent, taken by the reader; the sender's switches */
};

/* Written by sock_ops. Full: the connection stays on TCP (map-full). Entries go when a socket closes. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 131072);
	__type(key, struct key);
	__type(value, __u64);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

/* Marks listeners on which another program had set the SYN-ACK callback before us, and, cloned by the
 * kernel, the sockets that they accept: there the flag is not ours to clear. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, __u32);
} shared_listeners SEC(".maps");

/* How a listener saw a handshake: its namespace, its own end, the client's end. */
struct view {
	__u64 netns;
	struct up_address client;
	struct up_address server;
};

struct syn {
	struct view view;
	__u64 listener; /* kernel address of who answers, only ever read from */
	__u64 ambiguous;
};

/* Who connects, from CONNECT, which runs in the caller, to the end of the handshake. By the low bits of the socket's
 * cookie: the kernel hands those out in rows of 4096 to each CPU, so that others are rarely in the way. Where one is, the
 * program is unknown. */
#define CALLERS 65536
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CALLERS);
	__type(key, __u32);
	__type(value, struct sealed);
} callers SEC(".maps");

/* Client's initial number -> the SYN that a listener of this node is answering. Written by the SYN-ACK
 * callback, deleted by whichever ESTABLISHED callback comes; LRU, so that a SYN flood only costs pairing. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct syn);
} syns SEC(".maps");

struct handshake {
	struct view view;
	__u64 listener;      /* as in struct syn */
	__u64 client;        /* cookies and addresses of the two sockets */
	__u64 client_sock;
	__u64 server_sock;
	__u64 client_state;  /* addresses of their struct endpoint */
	__u64 server_state;
	__u64 epoch;         /* of the news, as the verdict on the client and then on the server was looked up */
	__u64 server;        /* written last; 0 = not yet */
	__u32 ambiguous;
	__u32 refused;       /* enum up_reason: why this does not become a pair */
	__u32 early;         /* a thread slept on the client's socket before it entered */
	__u32 outside;       /* the client did not enter the map: nobody waits for the answer */
	__u32 certain;       /* who serves the server's end is known for sure */
	__u32 loopback;
	__u64 client_program;
	__u64 server_program;
};

/* A client that waits to learn its server. Written by both ESTABLISHED callbacks, deleted by the
 * client's first message or its close; evicted (LRU): the client's direction stays on TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct numbers);
	__type(value, struct handshake);
} handshakes SEC(".maps");

/* Directions that hold a deep queue now. Taken with compare-and-swap, taken over once drained.
 * Full: node-budget. */
struct grant {
	__u64 owner; /* cookie of the sending endpoint, 0 = free */
	__u64 reader;
	__u64 reader_sock;
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, struct grant);
} grants SEC(".maps");

struct holder {
	__u64 until; /* ns since boot */
	__u64 held;
};
/* Address -> does this node hold it. A cache; LRU. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32[4]);
	__type(value, struct holder);
} holders SEC(".maps");

/* Connections that already are and shall be taken in; see adopt.h. Written and emptied by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, __u64);
	__type(value, struct up_order);
} orders SEC(".maps");

/* Written by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct up_control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct up_counters);
} counters SEC(".maps");

/* Totals of the generations that this one has replaced. Written and read by user space only. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct up_counters);
} inherited SEC(".maps");

/* Written and read by user space only. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct up_about);
} about SEC(".maps");

static __always_inline struct up_control *controls(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/* `down` is under way: no new pairs. */
static __always_inline bool draining(void)
{
	struct up_control *ctl = controls();

	return !ctl || ctl->stop == UP_DRAINING;
}

/* Another generation is in charge: this one takes in no new connection, but completes its handshakes. */
static __always_inline bool closed(void)
{
	struct up_control *ctl = controls();

	return !ctl || ctl->closed;
}

static __always_inline bool fault(__u32 one)
{
	return (knobs.faults & one) != 0;
}

static __always_inline struct up_counters *count(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

#endif
