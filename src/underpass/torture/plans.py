"""What one connection does at both ends, as data: steps, plans and batches of plans."""

from __future__ import annotations

import enum
import random
import socket
from dataclasses import dataclass, replace

FOREVER = -1
"""As `send`: until told to stop. As `receive`: until EOF."""
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Step:
    """Send and receive at the same time; then, when both are done, what the flags say."""

    send: int = 0
    receive: int = 0
    write: int = 16 * KIB
    """Bytes a write."""
    vary: bool = False
    """Writes of a random size up to `write`."""
    sendfile: bool = False
    shut: bool = False
    """shutdown(SHUT_WR) as soon as all is sent."""
    eof: bool = False
    """Wait for the peer's EOF: no more bytes may come."""
    reset: bool = False
    """Close with an RST."""
    expect_reset: bool = False
    """Take right bytes until the peer's RST."""
    until_error: bool = False
    """Send until the peer's RST shows as an error: it must."""
    fill: int = 0
    """Send without blocking until nothing more is taken; more bytes than this are an error."""
    within: float = 0
    """Seconds after the connection's start when filling ends; the reader waits for longer."""
    wait: float = 0
    """Seconds of idleness before the step begins."""


class Mode(enum.Enum):
    """How both ends use their sockets."""

    BLOCKING = "blocking"
    LEVEL = "epoll level triggered"
    EDGE = "epoll edge triggered"
    SHORT = "epoll edge triggered, a short read ends it"


@dataclass(frozen=True)
class Plan:
    """What the client and the server of one connection do."""

    name: str
    client: tuple[Step, ...]
    server: tuple[Step, ...]
    mode: Mode = Mode.BLOCKING


@dataclass(frozen=True)
class Batch:
    """Connections that run at once between two workers.

    Connection i binds the client port `first_port + i`: both ends know by it which plan they play.
    """

    number: int
    """Keys the contents: batches that run at once have different numbers."""
    plans: tuple[Plan, ...]
    target: str
    """Address that clients connect to."""
    listen: str = ""
    """Address that the server binds; default: the target."""
    source: str = ""
    """Address that clients bind; default: any."""
    port: int = 8080
    first_port: int = 20000
    deferred: bool = False
    """Clients set TCP_DEFER_ACCEPT: their handshake ACK waits for their first bytes."""
    writer_waits: bool = False
    """Blocking clients begin to write before the connection stands: this defers the ACK too."""
    pace: float = 0
    """Seconds between one connect and the next."""
    deadline: float = 30.0
    """Seconds after which a connection that is not done counts as hung."""

    def streams(self, index: int) -> tuple[int, int]:
        """Numbers of the streams client to server and server to client of a connection."""
        first = (self.number << 24) + 2 * index + 1
        return first, first + 1

    @property
    def family(self) -> socket.AddressFamily:
        """The clients' address family."""
        return family_of(self.target)


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET6 for an address with a colon, else AF_INET."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _duplex(size: int, write: int) -> tuple[Step, ...]:
    return (Step(send=size, receive=size, write=write, vary=True),)


def _plan(name: str, client: tuple[Step, ...], server: tuple[Step, ...]) -> Plan:
    """Build a plan in which the client closes first and the server sees it."""
    closing = Step(shut=True, eof=True)
    return Plan(name, (*client, closing), (*server, Step(eof=True), Step(shut=True)))


HALF_CLOSE_IN_MID_STREAM = Plan(
    "half-close while the other end sends",
    (Step(send=30 * KIB, receive=600 * KIB, write=1000, vary=True, shut=True, eof=True),),
    (Step(send=600 * KIB, receive=30 * KIB, write=1500, vary=True), Step(eof=True, shut=True)),
)
"""The client shuts its sending side down in the midst of what it receives."""

SHAPES: tuple[Plan, ...] = (
    _plan(
        "server first",
        (Step(receive=200 * KIB), Step(send=64 * KIB, write=1000)),
        (Step(send=200 * KIB), Step(receive=64 * KIB)),
    ),
    _plan(
        "client first",
        (Step(send=200 * KIB), Step(receive=64 * KIB)),
        (Step(receive=200 * KIB), Step(send=64 * KIB, write=1000)),
    ),
    _plan("both at once", _duplex(256 * KIB, 8 * KIB), _duplex(256 * KIB, 20 * KIB)),
    Plan(
        "half-close",
        (Step(send=100 * KIB, shut=True), Step(receive=150 * KIB, eof=True)),
        (Step(receive=100 * KIB, eof=True), Step(send=150 * KIB), Step(shut=True)),
    ),
    HALF_CLOSE_IN_MID_STREAM,
    Plan(
        "server sends and closes",
        (Step(send=100), Step(receive=300 * KIB, eof=True), Step(shut=True)),
        (Step(receive=100), Step(send=300 * KIB, write=64 * KIB, shut=True)),
    ),
    Plan(
        "reset by the client",
        (Step(send=40 * KIB), Step(receive=16), Step(send=20 * KIB, reset=True)),
        (Step(receive=40 * KIB), Step(send=16), Step(expect_reset=True)),
    ),
    Plan(
        "reset by the server",
        (Step(send=16), Step(receive=40 * KIB), Step(send=16), Step(expect_reset=True)),
        (Step(receive=16), Step(send=40 * KIB), Step(receive=16), Step(send=9000, reset=True)),
    ),
    _plan(
        "1-byte writes",
        (Step(send=3000, receive=3000, write=1),),
        (Step(send=3000, receive=3000, write=1),),
    ),
    _plan(
        "1-MiB writes",
        (Step(send=3 * MIB, write=MIB), Step(receive=2 * MIB)),
        (Step(receive=3 * MIB), Step(send=2 * MIB, write=MIB)),
    ),
    _plan(
        "sendfile",
        (Step(send=512 * KIB, write=200 * KIB, sendfile=True), Step(receive=512 * KIB)),
        (Step(receive=512 * KIB), Step(send=512 * KIB, write=64 * KIB, sendfile=True)),
    ),
    _plan(
        "request/response",
        (Step(send=200), Step(receive=5000)) * 20,
        (Step(receive=200), Step(send=5000)) * 20,
    ),
)
"""Every shape a connection's life takes in the tests, blocking."""

SMALL_MESSAGES = _plan(
    "64 small messages", (Step(send=64 * 100, write=100),), (Step(receive=64 * 100),)
)
"""64 messages of 100 bytes as soon as the connection stands."""

_FLOOD = Step(send=FOREVER, receive=FOREVER, write=8 * KIB, vary=True, shut=True, eof=True)
BUSY = Plan("busy both ways", (_FLOOD,), (_FLOOD,))
"""Both ends send without a pause until told to stop."""


def mixed(count: int, seed: int) -> tuple[Plan, ...]:
    """`count` plans: every shape in every mode in turn, in an order drawn from `seed`."""
    every = [replace(plan, mode=mode) for mode in Mode for plan in SHAPES]
    plans = [every[i % len(every)] for i in range(count)]
    random.Random(seed).shuffle(plans)
    return tuple(plans)
