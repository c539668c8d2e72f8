/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The ABI between the programs and user space. Mirrored by src/underpass/abi.py, checked by tests/unit.
 * Fixed-width types only; every struct is a multiple of 8 bytes with no hidden padding. */
#ifndef UNDERPASS_H
#define UNDERPASS_H

#define UP_ABI 4

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
	X(AMBIGUOUS, "ambiguous")                 /* two handshakes at once look alike */                 \
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
	X(LEAVING, "leaving")                     /* a small stream that is about to leave */

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
	X(MPTCP, 7, "mptcp")

enum up_sign {
#define X(name, bit, word) UP_SIGN_##name = 1 << (bit),
	UP_SIGNS(X)
#undef X
};

/* What an administrator said of a program. */
enum up_rule { UP_ALLOW = 1, UP_DENY = 2 };

enum up_role { UP_CLIENT = 1, UP_SERVER = 2 };

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
	__u32 fionread_broken;  /* 1 = FIONREAD does not count TCP bytes of sockets in a map */
	__u32 pad;
	__u64 memory_pages;     /* above this much TCP memory of the node nothing more may wait, 0 = no limit */
	__u64 recv_wake;        /* address of woken_wake_function, 0 = unknown */
	__u64 observe_ns;       /* how long a program must have run before it is admitted, 0 = at once */
	struct up_calls {       /* this architecture's numbers of the system calls that are watched */
		__u32 splice, recvfrom, recvmsg, recvmmsg, sendto, sendmsg, sendmmsg, getsockopt;
		__u32 accept, accept4;
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
	__u8 pad;
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
	__u64 accepts;  /* 1 = the program was seen to accept here: it is no mere holder of the listener */
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

#endif
