"""A slow wire between the client's and the server's namespace: what it carries can be made to wait.

A worker in the router's namespace takes every frame from one veth and puts it into the other. It
can hold, lose and double packets of a kind, and delay each by a time of its own. (netem could not
tell a handshake's ACK from data, and not every kernel has it.)
"""

from __future__ import annotations

import contextlib
import enum
import heapq
import itertools
import os
import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.kernel.bed import Bed
from tests.kernel.waiting import wait_until
from underpass.torture.worker import Worker

_ALL = 0x0003  # ETH_P_ALL
_PACKET_IGNORE_OUTGOING = 23
_SOL_PACKET = 263
_SO_RCVBUFFORCE = 33
_LONGEST = 70000
_PORTS = ("port-client", "port-server")
_SYN, _ACK, _FIN_OR_RST = 0x02, 0x10, 0x05


class Kind(enum.Enum):
    """What a packet is to a connection."""

    SYN = "SYN"
    SYN_ACK = "SYN-ACK"
    ACK = "the client's bare ACK"
    CLIENT_BYTES = "the client's bytes"
    SERVER_BYTES = "the server's bytes"
    OTHER = "anything else"


def kind_of(frame: bytes, *, from_client: bool) -> Kind:
    """What an Ethernet frame is; everything that is not TCP over IPv4 is OTHER."""
    if len(frame) < 54 or frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
        return Kind.OTHER
    segment = 14 + (frame[14] & 15) * 4
    flags = frame[segment + 13]
    if flags & _SYN:
        return Kind.SYN_ACK if flags & _ACK else Kind.SYN
    [length] = struct.unpack_from("!H", frame, 16)
    if 14 + length > segment + (frame[segment + 12] >> 4) * 4:
        return Kind.CLIENT_BYTES if from_client else Kind.SERVER_BYTES
    return Kind.ACK if from_client and not flags & _FIN_OR_RST else Kind.OTHER


@dataclass
class _Way:
    """What the wire does; written by calls, read by the thread that carries."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    held_kinds: set[Kind] = field(default_factory=set)
    held: list[tuple[Kind, int, bytes]] = field(default_factory=list)
    lose: Counter[Kind] = field(default_factory=Counter)
    double: bool = False
    most_delay: float = 0
    carried: Counter[Kind] = field(default_factory=Counter)
    late: int = 0
    """Frames that went after one that had come later."""
    due: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    wake: tuple[int, int] = field(default_factory=os.pipe)


_WAY = _Way()


def _take(frame: bytes, to: int) -> None:
    """Decide on one frame: hold it, lose it, or let it go at its time."""
    kind = kind_of(frame, from_client=to == 1)
    if _WAY.lose[kind]:
        _WAY.lose[kind] -= 1
        return
    if kind in _WAY.held_kinds:
        _WAY.held.append((kind, to, frame))
        return
    for _ in range(2 if _WAY.double and kind is not Kind.OTHER else 1):
        when = time.monotonic() + _WAY.chance.uniform(0, _WAY.most_delay)
        heapq.heappush(_WAY.due, (when, next(_WAY.numbers), to, frame))
    _WAY.carried[kind] += 1


def _end(name: str) -> socket.socket:
    """Every frame that comes in by an interface."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
    end.bind((name, _ALL))
    return end


def _start() -> None:
    ends = [_end(name) for name in _PORTS]
    threading.Thread(target=_carry, args=(ends,), daemon=True).start()


def _carry(ends: list[socket.socket]) -> None:
    last = -1
    while True:
        with _WAY.lock:
            left = _WAY.due[0][0] - time.monotonic() if _WAY.due else None
        waiting = [*(end.fileno() for end in ends), _WAY.wake[0]]
        ready, _, _ = select.select(waiting, [], [], left and max(left, 0))
        if _WAY.wake[0] in ready:
            os.read(_WAY.wake[0], 4096)
        with _WAY.lock:
            for number, end in enumerate(ends):
                if end.fileno() in ready:
                    _take(end.recv(_LONGEST), 1 - number)
            while _WAY.due and _WAY.due[0][0] <= time.monotonic():
                _, number, to, frame = heapq.heappop(_WAY.due)
                _WAY.late += number < last
                last = max(last, number)
                with contextlib.suppress(OSError):  # a full queue loses packets, as wires do
                    ends[to].send(frame)


def _hold(kinds: set[Kind]) -> None:
    with _WAY.lock:
        _WAY.held_kinds |= kinds


def _held() -> Counter[Kind]:
    with _WAY.lock:
        return Counter(kind for kind, _, _ in _WAY.held)


def _release(kinds: set[Kind]) -> None:
    with _WAY.lock:
        _WAY.held_kinds -= kinds
        going = [one for one in _WAY.held if one[0] in kinds]
        _WAY.held = [one for one in _WAY.held if one[0] not in kinds]
        for _, to, frame in going:
            _take(frame, to)
    os.write(_WAY.wake[1], b".")


def _disturb(lose: Kind | None, most_delay: float, *, double: bool) -> None:
    with _WAY.lock:
        if lose:
            _WAY.lose[lose] += 1
        _WAY.most_delay, _WAY.double = most_delay, double


def _lost() -> bool:
    with _WAY.lock:
        return not +_WAY.lose


def _counts() -> tuple[Counter[Kind], int]:
    with _WAY.lock:
        return Counter(_WAY.carried), _WAY.late


class Wire:
    """The wire of one test, from the test's side."""

    def __init__(self, bed: Bed) -> None:
        for where in ("client", "server"):
            # a frame has to be what goes over a wire: one segment, with its checksum
            bed.within(where, "ethtool", "-K", "eth0", "tx", "off")
            bed.within("router", "ip", "link", "set", f"port-{where}", "nomaster")
        self._worker: Worker = bed.worker("router", outside=True)
        self._worker.call(_start)

    def hold(self, *kinds: Kind) -> None:
        """Let packets of these kinds wait from now on."""
        self._worker.call(_hold, set(kinds))

    def wait_held(self, kind: Kind) -> None:
        """Wait until a packet of the kind waits."""
        wait_until(lambda: self._worker.call(_held)[kind], f"{kind.value} waits")

    def release(self, *kinds: Kind) -> None:
        """Let packets of these kinds go, those that waited first."""
        self._worker.call(_release, set(kinds))

    def lose(self, kind: Kind) -> None:
        """Lose the next packet of the kind."""
        self._worker.call(_disturb, kind, 0, double=False)

    def lost(self) -> bool:
        """Whether all that had to be lost is."""
        return self._worker.call(_lost)

    def disturb(self, most_delay: float, *, double: bool = False) -> None:
        """Delay each packet by a time of its own, up to `most_delay` s, and send each twice."""
        self._worker.call(_disturb, None, most_delay, double=double)

    def counts(self) -> tuple[Counter[Kind], int]:
        """Packets that went, by their kind, and how many of them were overtaken."""
        return self._worker.call(_counts)
