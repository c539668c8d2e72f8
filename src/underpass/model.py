"""What underpass speaks of: endpoints, pairs, directions, reasons. Frozen values, no I/O."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Reason(enum.IntEnum):
    """Why a message took its path, or why a connection did not become a pair.

    Mirrors ``enum up_reason`` of ``bpf/underpass.h``; :attr:`word` is what people and metrics see.
    """

    word: str
    meaning: str

    def __new__(cls, value: int, word: str, meaning: str) -> Reason:
        """A reason with its number, its word and what it means."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.word, member.meaning = word, meaning
        return member

    SHORTCUT = 0, "shortcut", "messages go from socket to socket, under the TCP/IP stack"
    NO_MESSAGE = 1, "no-message-yet", "this direction has not sent anything yet"
    UNPAIRED = 2, "unpaired", "the other end had not finished its handshake when this was sent"
    TCP_UNREAD = 3, "tcp-unread", "earlier bytes went by TCP and the reader has not read them all"
    READER_WAITS = (
        4,
        "reader-waits-for-tcp",
        "the reader sleeps inside a TCP read (as with MSG_WAITALL), which only TCP bytes end",
    )
    BUDGET_BYTES = 5, "budget-bytes", "too many bytes wait unread; TCP holds the sender now"
    BUDGET_MESSAGES = 6, "budget-messages", "too many messages wait unread; TCP holds the sender"
    NODE_BUDGET = 7, "node-budget", "too many directions of the node hold deep queues"
    NODE_MEMORY = 8, "node-memory", "the node's TCP memory is near its pressure mark"
    PEER_GONE = 9, "peer-gone", "the other socket has closed or left the map"
    CLOSING = 10, "closing", "one side has shut down"
    ULP = 11, "ulp", "kTLS or another upper layer protocol took one of the sockets"
    RCVLOWAT = 12, "rcvlowat", "the reader set SO_RCVLOWAT above 1"
    PEEK_OFF = 13, "peek-off", "the reader set SO_PEEK_OFF"
    ZEROCOPY = 14, "zerocopy", "the sender set SO_ZEROCOPY"
    MARKED = 15, "marked", "one end was just used in a way that only TCP serves; it leaves"
    PAUSED = 16, "paused", "`underpass pause` is in force"
    DRAINING = 17, "draining", "`underpass down` is under way"
    FORCED = 18, "forced", "a test asked for TCP"
    NO_STATE = 19, "no-state", "the endpoint's own state could not be read"
    NOT_LOCAL = 20, "not-local", "no listener of this node answered the client"
    REMOTE_CLIENT = 21, "remote-client", "the client is not on this node"
    AMBIGUOUS = 22, "ambiguous", "two handshakes look alike, or NAT rewrites the stream on its way"
    ADDRESS_MISMATCH = 23, "address-mismatch", "the numbers mirror, the addresses do not agree"
    SELF_CONNECT = 24, "self-connect", "the socket talks to itself"
    MAP_FULL = 25, "map-full", "the map of sockets is at its capacity"
    SOCKET_BUSY = 26, "socket-busy", "another product holds the socket in a sockmap"
    NOT_SUITABLE = 27, "not-suitable", "the kernel refused the socket (ULP, MPTCP or its state)"
    NO_MEMORY = 28, "no-memory", "there was no memory for the endpoint's state"
    PEER_REFUSED = 29, "peer-refused", "the other end of a proven pair could not enter the map"
    READER_STUCK = 30, "reader-stuck", "it left: its reader had missed TCP bytes behind other bytes"
    TCP_FIRST = 31, "tcp-first", "it left: the client spoke by TCP before the pair was made"
    HALF_CLOSED = 32, "half-closed", "it left: it has shut its sending side down"
    OBSERVED = (
        33,
        "observed",
        "one end's program was still watched when it was opened (`underpass guard list`)",
    )
    GUARDED = (
        34,
        "guarded",
        "one end's program does what only TCP serves, or is denied (`underpass guard list`)",
    )
    SMALL_STREAM = 35, "small-stream", "it streams small messages, which TCP joins; both ends left"
    LEAVING = 36, "leaving", "it streams small messages and is about to leave the map"
    REPROOF = 37, "reproof", "sent by TCP so that network rules and conntrack see the stream"
    POLICY = 38, "policy", "the policy keeps one end on TCP (`underpass policy show`)"
    READER_BUSY = (
        39,
        "reader-busy",
        "a thread holds the reader's socket for long, as in a page fault; TCP does not wait for it",
    )
    CGROUP_MEMORY = 40, "cgroup-memory", "the reader's memory cgroup is near its limit"
    SEND_ROOM = (
        41,
        "send-room",
        "it left: its program set a large send buffer, in which more waited than is safe",
    )
    KERNEL_SOCKET = 42, "kernel-socket", "the kernel itself has an end, as of NVMe over TCP"


#: Every reason, by its number.
REASONS = tuple(Reason)
#: Reasons that refuse a whole connection; the others are given message by message.
REFUSALS = (
    *(r for r in REASONS if Reason.NOT_LOCAL <= r < Reason.LEAVING),
    *(Reason.POLICY, Reason.SEND_ROOM, Reason.KERNEL_SOCKET),
)
#: Reasons for which a message goes by TCP.
TCP_REASONS = (
    *(r for r in REASONS if r >= Reason.UNPAIRED and r not in REFUSALS),
    Reason.POLICY,
)


class Fault(enum.IntFlag):
    """Known-bad twins (``up_fault``): each leaves out one rule, for tests that must notice."""

    NO_GATE = 1 << 0
    NO_BUDGET = 1 << 1
    NO_PROOF = 1 << 2
    ADDRESS_KEYS = 1 << 3
    DRAIN_UNREAD = 1 << 4
    SK_DROP = 1 << 5
    BLIND_READER = 1 << 6
    ACKED_GATE = 1 << 7
    STALE_PEER = 1 << 8
    UNSETTLED = 1 << 9
    LISTENER_DECIDES = 1 << 10
    LATE_SPLICE = 1 << 11
    DEAF = 1 << 12
    HASTY_PAIR = 1 << 13
    SHIFTED = 1 << 14
    ONE_END = 1 << 15
    RASH_PROOF = 1 << 16
    SLEEPY = 1 << 17
    NO_CGROUP = 1 << 18
    LATE_EVENT = 1 << 19
    EARLY_FIN = 1 << 20
    ROUSING = 1 << 21
    VAIN_PROBE = 1 << 22
    EARLY_ACK = 1 << 23
    EARLY_RESET = 1 << 24
    MISCOUNTED = 1 << 25
    KERNEL_ENDS = 1 << 26
    NO_ROOM = 1 << 27


class Sign(enum.IntFlag):
    """What a program was seen to use that the shortcut cannot serve (``enum up_sign``)."""

    SPLICE = 1 << 0
    WAITALL = 1 << 1
    OOB = 1 << 2
    TRUNC = 1 << 3
    ZEROCOPY = 1 << 4
    RCVLOWAT = 1 << 5
    ULP = 1 << 6
    MPTCP = 1 << 7
    FIONREAD = 1 << 8
    IN_KERNEL = 1 << 9

    @property
    def words(self) -> list[str]:
        """The word of every sign in it, as people see it."""
        return [_SIGN_WORDS[sign] for sign in self]


_SIGN_WORDS = {
    Sign.SPLICE: "splice",
    Sign.WAITALL: "msg-waitall",
    Sign.OOB: "msg-oob",
    Sign.TRUNC: "msg-trunc",
    Sign.ZEROCOPY: "msg-zerocopy",
    Sign.RCVLOWAT: "so-rcvlowat",
    Sign.ULP: "tcp-ulp",
    Sign.MPTCP: "mptcp",
    Sign.FIONREAD: "fionread",
    Sign.IN_KERNEL: "in-kernel",
}


class Rule(enum.IntEnum):
    """What an administrator said of a program (``enum up_rule``)."""

    NONE = 0
    ALLOW = 1
    DENY = 2


class Small(NamedTuple):
    """Bytes below which a stream of messages is faster by TCP; 0 = it never is.

    By road (``enum up_road``): with the reader on the sender's core, and beside it on another.

    Attributes:
        virtual: between network namespaces, with Nagle's algorithm.
        virtual_nodelay: the same with TCP_NODELAY.
        loopback: inside one network namespace, with Nagle's algorithm.
        loopback_nodelay: the same with TCP_NODELAY.
    """

    virtual: int = 80
    virtual_beside: int = 96
    virtual_nodelay: int = 4
    virtual_nodelay_beside: int = 0
    loopback: int = 8192
    loopback_beside: int = 16384
    loopback_nodelay: int = 8192
    loopback_nodelay_beside: int = 0


@dataclass(frozen=True)
class Settings:
    """Sizes of one generation.

    Attributes:
        capacity: pairs that fit at once.
        budget_bytes: bytes that may wait unread in one direction, queue objects included.
        budget_messages: messages that may wait unread in one direction.
        node_budget_bytes: bytes that all deep queues of the node may hold together; 0 chooses
            a sixteenth of the memory.
        observe_seconds: how long a program must have run before its connections may take the
            shortcut, a pause counting at most a second.
        admit_unknown: admit programs at once, watched or not.
        allow: names of programs that may take the shortcut whatever they do.
        deny: names of programs that stay on TCP.
        small: messages whose streams leave the shortcut.
        reproof_seconds: so often a message of each direction takes the network path; 0 = never.
    """

    capacity: int = 65536
    budget_bytes: int = 16 << 20
    budget_messages: int = 8192
    node_budget_bytes: int = 0
    observe_seconds: float = 10.0
    admit_unknown: bool = False
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    small: Small = field(default_factory=Small)
    reproof_seconds: float = 10.0


@dataclass(frozen=True)
class Endpoint:
    """One TCP socket. ``netns`` is the namespace's name, or ``net:[inode]``."""

    address: str
    port: int
    netns: str
    pod: str | None = None

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Direction:
    """One endpoint's sending side: the path of its last message, why, and what went so far."""

    path: str
    reason: str
    shortcut_bytes: int
    shortcut_messages: int
    tcp_messages: int


@dataclass(frozen=True)
class Pair:
    """Two endpoints of this node that are proven to be one connection."""

    client: Endpoint
    server: Endpoint
    client_to_server: Direction
    server_to_client: Direction
    unread: int = 0

    def __str__(self) -> str:
        return f"{self.client} -> {self.server}"


@dataclass(frozen=True)
class Counters:
    """Totals of one generation. Keys of the dictionaries are the words of :class:`Reason`."""

    pairs_total: int
    shortcut_messages_total: int
    shortcut_bytes_total: int
    tcp_messages_total: dict[str, int]
    refused_total: dict[str, int]


@dataclass(frozen=True)
class Program:
    """A program that the guard knows.

    Attributes:
        id: its identity, hexadecimal.
        name: of its executable.
        command: how its arguments begin.
        by_arguments: it is an interpreter: the arguments are part of its identity.
        verdict: ``watched``, ``admitted``, ``kept-out``, ``allowed`` or ``denied``.
        reason: what led to it: ``rule``, and the words of ``signs``.
        signs: words of what it was seen to use.
        observed_seconds: how long it has run under watch.
        pid: the process that was seen first.
    """

    id: str
    name: str
    command: str
    by_arguments: bool
    verdict: str
    reason: str
    signs: list[str]
    observed_seconds: float
    pid: int


@dataclass(frozen=True)
class Socket:
    """A TCP socket as `explain` sees it, whether or not underpass holds it.

    Attributes:
        endpoint: its own end.
        remote_address: of the other end, as it sees it.
        remote_port: of the other end.
        listening: it accepts connections.
        in_map: the shortcut's map holds it.
        covered: its process is inside the attached cgroup.
        armed: it answers SYNs with the proof callback.
        role: client or server (``abi.CLIENT``, ``abi.SERVER``) if it was ever in the map, else 0.
        reason: of its last message, or why it is not in the map; SHORTCUT if nothing is known.
        cookie: the kernel's number for it, 0 if it has none.
        peer: cookie of the other end, 0 if it is not paired.
        program: key of its program, 0 if it is not known.
    """

    endpoint: Endpoint
    remote_address: str
    remote_port: int
    listening: bool
    in_map: bool
    covered: bool
    armed: bool
    role: int
    reason: Reason
    cookie: int
    peer: int
    program: int = 0


def many(count: int, thing: str) -> str:
    """``1 rule``, ``2 rules``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def plain(value: Any) -> Any:
    """``value`` with every dataclass turned into a dictionary, ready for JSON."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
