"""Many namespaces that use the same addresses and ports, and what goes between their sockets.

Two workers hold the sockets of all of them: a thread enters a namespace to make one. Every block
says whose it is, so one that comes out elsewhere is counted and named.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.bed import CLIENT4, NETNS, SERVER4, Bed, inside, remove_netns, run
from underpass.torture.content import content
from underpass.torture.patience import patient

LOOPBACK, PORT = "127.0.0.1", 8080
SOURCES = (20000, 20001)
"""Ports that the clients of every namespace bind."""
BLOCK = 512
"""Bytes of a block: whose it is, which of its turns, and content of its stream."""
_HEAD = struct.Struct("!QQ")
_CLONE_NEWNET = 0x40000000
_Key = tuple[int, str, int]  # number of the pair of namespaces, address of the server, client port
_SOCKETS: dict[_Key, socket.socket] = {}
_LISTENERS: dict[tuple[int, str], socket.socket] = {}


@dataclass(frozen=True)
class Tally:
    """What the sockets of a worker got in a turn."""

    right: int = 0
    """Blocks that came whole, to where they belong."""
    misdelivered: int = 0
    """Bytes that belong to another stream or turn."""
    missing: int = 0
    """Blocks that did not come whole within the deadline."""
    first: str = ""
    """What the first wrong bytes were."""


def make_lookalikes(bed: Bed, count: int) -> list[tuple[str, str]]:
    """Pairs of namespaces, each joined by a veth pair with the same two addresses: their names."""

    def add(number: int) -> tuple[str, str]:
        names = [f"{bed.name.replace('underpass-', 'up-')}-{end}{number}" for end in "cs"]
        for name in names:
            bed.undo.callback(remove_netns, name)  # first: an interrupt comes at any moment
            run("ip", "netns", "add", name)
        veth = ("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        run(*inside(names[0]), "ip", *veth)
        for name, address in zip(names, (CLIENT4, SERVER4), strict=True):
            steps = f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up"
            run(*inside(name), "sh", "-ec", steps)
        return names[0], names[1]

    return [add(number) for number in range(count)]


@contextlib.contextmanager
def _entered(name: str) -> Iterator[None]:
    """Move the calling thread, and with it what sockets it makes, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open("rb") as home, (NETNS / name).open("rb") as there:
        for handle in (there, home):
            if libc.setns(handle.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {name}")
            if handle is there:
                yield


def serve_all(names: list[tuple[str, str]]) -> None:
    """In a worker: listen in every server on its address and in every client on its loopback."""
    for number, (client, server) in enumerate(names):
        for name, address in ((server, SERVER4), (client, LOOPBACK)):
            with _entered(name):
                listener = socket.create_server((address, PORT))
            listener.settimeout(patient(20))
            _LISTENERS[number, address] = listener


def connect_all(names: list[tuple[str, str]], address: str, source: int) -> None:
    """In a worker: connect one client of every namespace; its handshake's ACK waits a moment.

    So all clients are known before any server is: what pairs by addresses alone pairs wrongly.
    """
    for number, (client, _) in enumerate(names):
        with _entered(client):
            sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        sock.bind((LOOPBACK if address == LOOPBACK else CLIENT4, source))
        sock.connect((address, PORT))
        _keep((number, address, source), sock)


def accept_all(count: int, address: str) -> None:
    """In a worker: accept one connection of every namespace."""
    for number in range(count):
        sock, peer = _LISTENERS[number, address].accept()
        _keep((number, address, peer[1]), sock)


def _keep(key: _Key, sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _SOCKETS[key] = sock


def _stream(key: _Key, *, server: bool) -> int:
    """A number of its own for every direction of every connection of every namespace."""
    number, address, source = key
    return number << 8 | (address == LOOPBACK) << 4 | SOURCES.index(source) << 1 | server


def say_all(turn: int, *, server: bool) -> None:
    """In a worker: send one block on every socket."""
    for key, sock in _SOCKETS.items():
        stream = _stream(key, server=server)
        sock.sendall(_block(stream, turn))


def _block(stream: int, turn: int) -> bytes:
    size = BLOCK - _HEAD.size
    return _HEAD.pack(stream, turn) + bytes(content(stream, turn * size, size))


def hear_all(turn: int, deadline: float, *, server: bool) -> Tally:
    """In a worker: read the peer's block on every socket, until all are whole or `deadline` s."""
    got = dict.fromkeys(_SOCKETS, b"")
    end = time.monotonic() + deadline
    while waiting := {_SOCKETS[key]: key for key in got if len(got[key]) < BLOCK}:
        left = end - time.monotonic()
        if left <= 0:
            break
        poller = select.poll()
        by_number = {sock.fileno(): (sock, key) for sock, key in waiting.items()}
        for number in by_number:
            poller.register(number, select.POLLIN)
        for number, _ in poller.poll(left * 1000):
            sock, key = by_number[number]
            with contextlib.suppress(BlockingIOError):
                data = sock.recv(4 * BLOCK)
                got[key] += data or b"\0" * BLOCK  # an end of file is wrong here
    for key, sock in _SOCKETS.items():
        with contextlib.suppress(BlockingIOError):
            while data := sock.recv(65536):  # nobody has said any more
                got[key] += data
    return _judge(got, turn, server=server)


def _judge(got: dict[_Key, bytes], turn: int, *, server: bool) -> Tally:
    right = misdelivered = missing = 0
    first = ""
    for key, data in got.items():
        wanted = _block(_stream(key, server=not server), turn)
        right += data == wanted
        missing += len(data) < BLOCK
        if not wanted.startswith(data):
            strange = data.removeprefix(wanted)
            misdelivered += len(strange)
            said = _HEAD.unpack_from(strange) if len(strange) >= _HEAD.size else ()
            first = (
                first or f"{key} in turn {turn} got {len(strange)} bytes of (stream, turn) {said}"
            )
    return Tally(right, misdelivered, missing, first)


class Crowd:
    """All lookalikes' connections, driven from two workers."""

    def __init__(self, bed: Bed, count: int) -> None:
        self.names = make_lookalikes(bed, count)
        self.clients, self.servers = bed.worker("client"), bed.worker("server")

    def connect(self) -> int:
        """Make all connections: in every namespace and to every server; how many there are."""
        self.servers.call(serve_all, self.names)
        for address in (SERVER4, LOOPBACK):
            for source in SOURCES:
                self.clients.call(connect_all, self.names, address, source)
                self.servers.call(accept_all, len(self.names), address)
        return len(self.names) * 2 * len(SOURCES)

    def talk(self, turn: int, deadline: float) -> list[Tally]:
        """Every server says its block, then every client, all at the same time; what came."""
        tallies = []
        # a stranger's client would get what the server says first
        for server in (True, False):
            speaker, hearer = self.servers, self.clients
            if not server:
                speaker, hearer = hearer, speaker
            hearing = hearer.submit(hear_all, turn, deadline, server=not server)
            speaker.call(say_all, turn, server=server)
            tallies.append(hearing.result(deadline + patient(20)))
        return tallies
