/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The ABI between the programs and user space. Mirrored by src/underpass/abi.py, checked by tests/unit.
 * Fixed-width types only; every struct is a multiple of 8 bytes with no hidden padding. */
#ifndef UNDERPASS_H
#define UNDERPASS_H

#define UP_ABI 10

/* Why a message took its path, or why a connection did not become a pair.
 * The metric labels, the CLI's words and the docs come from this one list: name, word. */
#define UP_REASONS(X)                                                                                \
	X(SHORTCUT, "shortcut")                   /* the message went by the shortcut */                  \
	X(NO_MESSAGE, "no-message-yet")           /* the direction has not sent anything */               \
	X(UNPAIRED, "unpaired")                   /* the other end is not known, or not accepted, yet */  \
	X(TCP_UNREAD, "tcp-unread")               /* the gate: bytes sent by TCP are not consumed yet */  \
	X(READER_WAITS, "reader-waits-for-tcp")   /* a reader sleeps inside native recv (MSG_WAITALL) */  \
	X(BUDGET_BYTES, "budget-bytes")           /* too many bytes wait unread in this direction */      \
	X(BUDGET_MESSAGES, "budget-messages")     /* too many messages wait unread in this direction */   \
	X(NODE_BUDGET, "node-budget")             /* too many directions of the node hold deep queues */  \
	X(NODE_MEMORY, "node-memory")             /* the node's TCP memory is near its pressure mark */   \
	X(PEER_GONE, "peer-gone")                 /* the other socket closed, or left the map */          \
	X(CLOSING, "closing")                     /* one side has shut down: TCP gives the errors */      \
	X(ULP, "ulp")                             /* kTLS or another upper layer protocol took a socket */ \
	X(RCVLOWAT, "rcvlowat")                   /* the reader set SO_RCVLOWAT above 1 */                \
	X(PEEK_OFF, "peek-off")                   /* the reader set SO_PEEK_OFF */                        \
	X(ZEROCOPY, "zerocopy")                   /* the sender set SO_ZEROCOPY */                        \
	X(MARKED, "marked")                       /* a socket was just used as only TCP serves: guard */  \
	X(PAUSED, "paused")                       /* `underpass pause` */                                 \
	X(DRAINING, "draining")                   /* `underpass down` is under way */                     \
	X(FORCED, "forced")                       /* a test asked for TCP */                              \
	X(NO_STATE, "no-state")                   /* the endpoint's own state could not be read */        \
	X(NOT_LOCAL, "not-local")                 /* client: no listener of this node answered its SYN */ \
	X(REMOTE_CLIENT, "remote-client")         /* server: the client is not on this node */            \
	X(AMBIGUOUS, "ambiguous")                 /* two handshakes look alike, or NAT rewrites the stream */              \
	X(ADDRESS_MISMATCH, "address-mismatch")   /* mirrored numbers, but the addresses do not agree */  \
	X(SELF_CONNECT, "self-connect")           /* the socket talks to itself */                        \
	X(MAP_FULL, "map-full")                   /* the sockhash is at its capacity */                   \
	X(SOCKET_BUSY, "socket-busy")             /* another product holds the socket in a sockmap */     \
	X(NOT_SUITABLE, "not-suitable")           /* the kernel refused the socket (ULP, MPTCP, state) */ \
	X(NO_MEMORY, "no-memory")                 /* state for the endpoint could not be allocated */     \
	X(PEER_REFUSED, "peer-refused")           /* the other end of a proven pair could not enter */    \
	X(READER_STUCK, "reader-stuck")           /* left: its reader missed TCP bytes behind others */   \
	X(TCP_FIRST, "tcp-first")                 /* left: the client spoke by TCP before it was paired */ \
	X(HALF_CLOSED, "half-closed")             /* left: it shut its sending side down */               \
	X(OBSERVED, "observed")                   /* its program has not been watched for long enough */  \
	X(GUARDED, "guarded")                     /* its program does what only TCP serves, or is denied */ \
	X(SMALL_STREAM, "small-stream")           /* left: it streams small messages, which TCP joins */ \
	X(LEAVING, "leaving")                     /* a small stream that is about to leave */             \
	X(REPROOF, "reproof")                     /* sent by TCP so that the network path is met again */ \
	X(POLICY, "policy")                       /* the policy keeps one of the ends on TCP */           \
	X(READER_BUSY, "reader-busy")             /* a thread holds the reader's socket for long */       \
	X(CGROUP_MEMORY, "cgroup-memory")         /* the reader's cgroup is near its memory limit */      \
	X(SEND_ROOM, "send-room")                 /* left: in its large send buffer too much waits, by TCP */ \
	X(KERNEL_SOCKET, "kernel-socket")         /* the kernel itself has one of the ends */

enum up_reason {
#define X(name, word) UP_##name,
	UP_REASONS(X)
#undef X
	UP_REASON_MAX
};

/* Known-bad twins, each leaving out one rule. For tests that prove that they would notice; 0 in life. */
enum up_fault {
	UP_FAULT_NO_GATE = 1 << 0,      /* rule 2: redirect although TCP bytes are unread */
	UP_FAULT_NO_BUDGET = 1 << 1,    /* rule 3: let any amount wait */
	UP_FAULT_NO_PROOF = 1 << 2,     /* rule 1: every client enters the map */
	UP_FAULT_ADDRESS_KEYS = 1 << 3, /* rule 1: pair by address and port, no namespace, no numbers */
	UP_FAULT_DRAIN_UNREAD = 1 << 4, /* drain: delete endpoints that hold unread bytes */
	UP_FAULT_SK_DROP = 1 << 5,      /* rule 5: answer a doubt with SK_DROP */
	UP_FAULT_BLIND_READER = 1 << 6, /* rule 2: do not look for readers asleep in native recv */
	UP_FAULT_ACKED_GATE = 1 << 7,   /* rule 2: take "acknowledged" for "consumed" */
	UP_FAULT_STALE_PEER = 1 << 8,   /* rule 1: a socket is its address in memory, whoever has it now */
	UP_FAULT_UNSETTLED = 1 << 9,    /* leave: do not ask whether a redirect is under way */
	UP_FAULT_LISTENER_DECIDES = 1 << 10, /* guard: ask who listened, not who accepts */
	UP_FAULT_LATE_SPLICE = 1 << 11, /* guard: send by TCP behind what a splice has not seen */
	UP_FAULT_DEAF = 1 << 12,        /* rule 4: do not ask whether the peer answers */
	UP_FAULT_SHIFTED = 1 << 14,     /* rule 2: do not ask whether NAT rewrites the stream */
	UP_FAULT_HASTY_PAIR = 1 << 13,  /* adopt: do not ask whether a thread is inside native recv */
	UP_FAULT_ONE_END = 1 << 15,     /* policy: ask for the client's end alone */
	UP_FAULT_RASH_PROOF = 1 << 16,  /* re-proof: do not ask how the reader looks at what waits */
	UP_FAULT_SLEEPY = 1 << 17,      /* rule 5: sleep until a thread lets go of the reader's socket */
	UP_FAULT_NO_CGROUP = 1 << 18,   /* rule 3: do not ask for the memory of the reader's cgroup */
	UP_FAULT_LATE_EVENT = 1 << 19,  /* adopt: take in a socket on which TCP bytes wait */
	UP_FAULT_EARLY_FIN = 1 << 20,   /* late: tell of the end of file as it comes */
	UP_FAULT_ROUSING = 1 << 21,     /* stuck: wake a sleeping reader for room to write */
	UP_FAULT_VAIN_PROBE = 1 << 22,  /* stuck: tick while the window holds bytes back */
	UP_FAULT_EARLY_ACK = 1 << 23,   /* late: wake a sleeping reader as its FIN is acknowledged */
	UP_FAULT_EARLY_RESET = 1 << 24, /* late: answer bytes with a reset while the end is kept from their sender */
	UP_FAULT_MISCOUNTED = 1 << 25,  /* guard: let programs in that ask FIONREAD, where it does not count */
	UP_FAULT_KERNEL_ENDS = 1 << 26, /* guard: let sockets in that the kernel uses, or is about to */
	UP_FAULT_NO_ROOM = 1 << 27,     /* budget: leave no room for TCP in the receive buffer */
};

/* What a program was seen to use that the shortcut cannot serve: name, bit, word. */
#define UP_SIGNS(X)                                                                                  \
	X(SPLICE, 0, "splice")            /* splice from a socket */                                      \
	X(WAITALL, 1, "msg-waitall")                                                                      \
	X(OOB, 2, "msg-oob")                                                                              \
	X(TRUNC, 3, "msg-trunc")                                                                          \
	X(ZEROCOPY, 4, "msg-zerocopy")    /* or SO_ZEROCOPY */                                            \
	X(RCVLOWAT, 5, "so-rcvlowat")     /* above 1 */                                                   \
	X(ULP, 6, "tcp-ulp")              /* kTLS and other upper layer protocols */                      \
	X(MPTCP, 7, "mptcp")                                                                               \
	X(FIONREAD, 8, "fionread")        /* where it does not count what is redirected */                 \
	X(IN_KERNEL, 9, "in-kernel")      /* hands its sockets to the kernel, as iSCSI does */

enum up_sign {
#define X(name, bit, word) UP_SIGN_##name = 1 << (bit),
	UP_SIGNS(X)
#undef X
};

/* What a program was seen to do with a socket: how it looks at what waits before it takes it, see proof_due(); and
 * what the map has to know of this socket alone. */
enum up_use {
	UP_COUNTS = 1, /* looks by FIONREAD, where a kernel miscounts what is in the map */
	UP_PEEKS = 2,  /* looks by MSG_PEEK */
	UP_KEEPS = 4,  /* switched SO_KEEPALIVE on */
	UP_TOLD = 8,   /* asks poll() for POLLRDHUP */
};

/* What an administrator said of a program. */
enum up_rule { UP_ALLOW = 1, UP_DENY = 2 };

enum up_role { UP_CLIENT = 1, UP_SERVER = 2 };

/* Of `recv_code`: the first parts are native recv's, the others those that call ours. */
#define UP_RECV_PARTS 7
#define UP_RECV_NATIVE 3
#define UP_KNOWN_NAMES 16

/* The one element of map `.rodata.knobs`: set before load, then constant. The verifier removes what
 * they switch off. */
struct up_knobs {
	__u32 faults;           /* enum up_fault */
	__u32 cgroup_level;     /* depth of the subtree's root below the cgroup root */
	__u64 cgroup_id;        /* subtree root, 0 = every cgroup */
	__u32 budget_bytes;     /* per direction: bytes unread, the queue's own objects included */
	__u32 budget_messages;  /* per direction: messages unread */
	__u32 shallow_bytes;    /* what a direction may hold without one of the node's grants */
	__u32 shallow_messages;
	__u32 grants;           /* power of two: directions that may hold deep queues at once */
	__u32 rdonly_cast;      /* 1 = the kernel has bpf_rdonly_cast */
	__u32 fionread_broken;  /* 1 = FIONREAD does not count TCP bytes of sockets in a map, or nobody knows */
	__u32 counts_redirected; /* 1 = it counts what is redirected to them */
	__u64 memory_pages;     /* above this much TCP memory of the node nothing more may wait, 0 = no limit */
	__u64 buffer_most;      /* the largest SO_SNDBUF (net.core.wmem_max) */
	__u64 recv_wake;        /* address of woken_wake_function, 0 = unknown */
	__u64 poll_wake;        /* address of pollwake, 0 = unknown */
	__u64 epoll_wake;       /* address of ep_poll_callback, 0 = unknown */
	__u64 recv_code[2 * UP_RECV_PARTS]; /* where functions begin and end that a reader returns to; 0 = unknown */
	struct up_known {       /* programs that the guard knows before they show what they do */
		__u64 name, bits; /* how its name begins, and which bits of that count; 0 = none */
		__u64 signs;      /* enum up_sign */
	} known[UP_KNOWN_NAMES];
	__u64 observe_ns;       /* how long a program must have run before it is admitted, 0 = at once */
	struct up_calls {       /* this architecture's numbers of the system calls that are watched */
		__u32 splice, recvfrom, recvmsg, recvmmsg, sendto, sendmsg, sendmmsg, getsockopt;
		__u32 accept, accept4, ioctl, setsockopt, poll, ppoll, epoll_ctl, sendfile; /* ~0 = it has none */
	} calls;
};

/* The one element of map `about`: what this generation is. Programs do not read it. */
struct up_about {
	__u32 abi;
	__u32 capacity; /* pairs */
	__u64 generation; /* one more than that of the one it replaced */
	__u64 node_budget; /* bytes, as it was set; 0 = chosen */
	struct up_knobs knobs;
	char version[32];
	char cgroup[512];
};

/* The roads of a direction, of which each has its own bounds of "small": through a virtual network or over
 * loopback, with Nagle's algorithm or with TCP_NODELAY; the first bound is for a reader on the sender's core, the
 * second for one that runs beside it. */
enum up_road { UP_VIRTUAL, UP_VIRTUAL_NODELAY, UP_LOOPBACK, UP_LOOPBACK_NODELAY, UP_ROADS };

/* The one element of map `control`; written by user space, read by every message. */
struct up_control {
	__u32 stop;   /* 0, or the reason for which every message goes by TCP: UP_PAUSED, UP_DRAINING */
	__u32 forced; /* tests: of 65536 messages, about this many are forced onto TCP */
	__u32 closed; /* 1 = no new pairs: this generation is not in charge (yet, or any more) */
	__u32 adopting; /* 1 = listeners that are armed were armed by the generation before */
	__u32 small[2 * UP_ROADS]; /* a stream of messages below this many bytes is faster by TCP; 0 = none is */
	__u64 reproof_ns; /* so often a message of each direction meets the network path; 0 = never */
	__u32 policy; /* 0 = none, else one more than the bank that holds it */
	__u32 pad;
};

/* Who may take the shortcut: 64 rules, of which the lowest that matches decides; see policy.h. Two banks of tables:
 * one is in force while the other is written. */
struct up_policy {
	__u64 allow;         /* bit by rule: it allows */
	__u64 any_port;      /* rules that name no port */
	__u64 any_cidr;      /* rules that name no network */
	__u64 unknown_group; /* rules for a socket of no known group */
	__u32 default_allow; /* 1 = what no rule matches may take the shortcut */
	__u32 unknown_waits; /* 1 = a socket of no known group stays on TCP */
};

/* Keys of the tables whose elements are masks of rules. */
struct up_group { /* a cgroup and all below it that have none of their own */
	__u64 cgroup;
	__u32 bank;
	__u32 pad;
};
struct up_port {
	__u32 port;
	__u32 bank;
};
struct up_network {
	__u32 bits; /* of what follows that count */
	__u32 bank;
	__u32 ip[4]; /* network order, IPv4 as IPv4-mapped IPv6 */
};

/* The one element of map `counters`, per CPU. */
struct up_counters {
	__u64 messages[UP_REASON_MAX];    /* by reason; [SHORTCUT] went by the shortcut */
	__u64 connections[UP_REASON_MAX]; /* refused sockets by reason; [SHORTCUT] counts pairs made */
	__u64 shortcut_bytes;
};

/* An address with its port; IPv4 as IPv4-mapped IPv6, so that dual-stack sockets compare equal. */
struct up_address {
	__u32 ip[4]; /* network order */
	__u32 port;  /* host order */
};

/* What is known of a program; see guard.h. */
struct up_program {
	__u64 first_seen; /* ns since boot */
	__u64 last_seen;  /* when it last sent a TCP packet while it was observed */
	__u64 active_ns;  /* how long it has run so far, a pause counting at most a second */
	__u32 signs;      /* enum up_sign */
	__u32 rule;       /* enum up_rule, 0 = none */
	__u32 pid;        /* the process that was seen first */
	__u8 by_arguments; /* 1 = an interpreter: its arguments are part of its identity */
	__u8 accepts;  /* 1 = it was seen to accept where it listens */
	__u8 hands_on; /* 1 = another program has taken over a listener of its */
	__u8 looks;    /* enum up_use */
	char name[32];    /* of the executable */
	char command[128]; /* how its arguments begin, each ended by NUL */
};

/* A rule is for one program, or with program 0 for all of that name. */
struct up_rule_key {
	__u64 program;
	char name[32];
};

/* Where a socket listens; address 0 = any. */
struct up_place {
	__u64 netns; /* cookie */
	struct up_address at;
	__u32 pad;
};

/* Who serves at a place. */
struct up_owner {
	__u64 program;  /* key, 0 = unknown */
	__u64 listener; /* kernel address, only ever read from; 0 = unknown */
	__u64 cookie;   /* of the listener; 0 = it had none */
	__u32 accepts;  /* 1 = the program was seen to accept here: it is no mere holder of the listener */
	__u32 shared;   /* 1 = another program has a listener of its own at this place */
};

/* The one element of map `news`. */
struct up_news {
	__u64 epoch; /* grows with everything that may change a verdict */
};

/* One line of the socket list, as the iterators write it. */
struct up_record {
	__u64 cookie;
	__u64 peer; /* cookie of the other end, 0 = not paired */
	__u64 shortcut_bytes;
	__u64 shortcut_messages;
	__u64 tcp_messages;
	__u64 netns_cookie;
	__u64 inode; /* of the socket, as /proc/PID/fd shows it; 0 = it has none */
	__u64 program;
	struct up_address local;
	struct up_address remote;
	__u32 netns;   /* inode of the network namespace */
	__u32 unread;  /* redirected bytes that wait for this endpoint's reader */
	__u8 role;     /* enum up_role, 0 = unknown */
	__u8 reason;   /* enum up_reason of the last message, or of the refusal */
	__u8 state;    /* TCP state */
	__u8 in_map;   /* sockets: 1 = this generation holds it */
	__u8 covered;  /* sockets: 1 = inside the attached cgroup */
	__u8 armed;    /* listeners: 1 = answers SYNs with the proof callback, 2 = so does another program */
	__u8 pad[2];
};

/* An open connection's end that is in no map, as `up_standing` writes it. */
struct up_standing {
	__u64 cookie;
	__u64 peer;    /* cookie of the other end, if it was paired before */
	__u64 inode;
	__u64 left_at; /* ns since boot, when it left the map; 0 = it did not */
	struct up_address local;
	struct up_address remote;
	__u32 sent_from;     /* its first number: one more than a client's initial one is what its server received from */
	__u32 received_from;
	__u32 netns; /* inode of the network namespace */
	__u8 reason; /* enum up_reason: why it left or did not enter, as far as it is known */
	__u8 leaves; /* how often it has left */
	__u8 pad[2];
};

/* What the program `up_adopt` does with a socket for which there is an order. */
enum up_step {
	UP_WATCH, /* let its packets show that its program runs */
	UP_ENTER, /* into the map, unpaired: all goes by TCP still */
	UP_CHECK, /* is it held by those alone that were looked at? */
	UP_PAIR,  /* with the other end, which has entered, too */
	UP_GIVE_UP, /* out of the map again, unless it has been paired; `answer` says why */
};

/* An element of map `orders`, by cookie: written by user space, which is told the outcome in it. */
struct up_order {
	__u64 peer; /* cookie of the other end */
	__u64 program;
	__u64 peer_program;
	__u64 number; /* the key of this pair, unlike any before */
	__u64 sock;   /* written by UP_ENTER: kernel address of the socket and of its state */
	__u64 state;
	__u32 descriptors; /* by which processes have it open */
	__u32 threaded; /* 1 = each of these has several threads */
	__u32 step;    /* enum up_step */
	__u32 role;
	__u32 loopback;
	__u32 sent_from, received_from; /* as they were read, or it is another connection by now */
	__u32 answer; /* enum up_reason; UP_SHORTCUT = done */
};

#endif
