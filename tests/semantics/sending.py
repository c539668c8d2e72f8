"""Rows: sending."""

from __future__ import annotations

import hashlib
import os
import select
import socket
from functools import partial

from tests.semantics import libc
from tests.semantics.reading import GUARD
from tests.semantics.stage import MIB, Stage, fill, read_all, said, set_timeout
from tests.semantics.table import TEN, Subject, Verdict
from tests.semantics.uring import Uring

SENDING = Subject("Sending")
_LARGE = 8 * MIB
_BLOCK = 4 << 10


@SENDING.same("`send`, `write`, `sendmsg` with many buffers, `writev`", "40 bytes", carries=40)
def _sends(stage: Stage) -> str:
    client, server = stage.pair()
    parts = [TEN[i : i + 1] for i in range(10)]
    client.send(TEN)
    os.write(client.fileno(), TEN)
    client.sendmsg(parts)
    os.writev(client.fileno(), parts)
    return said(lambda: read_all(server, 40))


@SENDING.same("`sendmmsg` of two messages", "2, 20 bytes", carries=20)
def _sendmmsg(stage: Stage) -> str:
    client, server = stage.pair()
    sent = libc.sendmmsg(client, (TEN, TEN))
    return f"{sent}, {said(lambda: read_all(server, 20))}"


@SENDING.same("`send` of 0 bytes, then 10", "0, nothing, 10 bytes")
def _nothing(stage: Stage) -> str:
    client, server = stage.pair()
    sent = said(lambda: client.send(b""))
    told = stage.polled(server, select.POLLIN, 0)
    client.sendall(TEN)
    return f"{sent}, {told}, {said(lambda: server.recv(100))}"


def _file(data: bytes) -> int:
    handle = os.memfd_create("underpass-test-file")
    os.write(handle, data)
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


@SENDING.same("`sendfile` into the socket, 100,000 bytes", "100000 bytes, right", carries=100_000)
def _sendfile(stage: Stage) -> str:
    client, server = stage.pair()
    data = os.urandom(100_000)
    handle = _file(data)
    sending = stage.begin(lambda: client.sendfile(os.fdopen(handle, "rb")))
    return f"{sending.outcome()} bytes, {_compared(server, data)}"


def _compared(server: socket.socket, data: bytes) -> str:
    return "right" if read_all(server, len(data)) == data else "wrong"


@SENDING.accepted(
    "`sendfile`, then the file is written anew before the peer reads",
    "the new bytes",
    "the bytes that were sent",
    "TCP points at the file's pages, the shortcut copies them",
)
def _sendfile_changed(stage: Stage) -> str:
    client, server = stage.pair()
    handle = _file(TEN)
    os.sendfile(client.fileno(), handle, 0, len(TEN))
    os.pwrite(handle, TEN[::-1], 0)
    return "the bytes that were sent" if server.recv(100) == TEN else "the new bytes"


@SENDING.same("`splice` into the socket, 10,000 bytes", "10000 bytes, right", carries=10_000)
def _splice_into(stage: Stage) -> str:
    client, server = stage.pair()
    data = os.urandom(10_000)
    reading, writing = os.pipe()
    os.write(writing, data)
    sent = stage.told(lambda: os.splice(reading, client.fileno(), len(data)))
    return f"{sent} bytes, {_compared(server, data)}"


@SENDING.same("`io_uring` send and recv", "10, 10 bytes")
def _io_uring(stage: Stage) -> str:
    client, server = stage.pair()
    ring = Uring()
    room = bytearray(100)
    sent = ring.send(client.fileno(), TEN)
    got = ring.recv(server.fileno(), room)
    return f"{sent}, {said(lambda: bytes(room[:got]))}"


@SENDING.same("`io_uring` recv that waits until bytes come", "10")
def _io_uring_waits(stage: Stage) -> str:
    client, server = stage.pair()
    ring = Uring()
    reading = stage.begin(lambda: ring.recv(server.fileno(), bytearray(100))).asleep()
    client.sendall(TEN)
    return reading.outcome()


@SENDING.guarded(
    "`io_uring` zero-copy send by the client", "10, 10 bytes", GUARD, unguarded="ENOTSUP, EAGAIN"
)
def _io_uring_zerocopy(stage: Stage) -> str:
    client, server = stage.pair()
    ring = Uring()
    sent = stage.told(lambda: ring.send_zc(client.fileno(), TEN))
    return f"{sent}, {said(lambda: server.recv(100, socket.MSG_DONTWAIT))}"


@SENDING.same("one `send` of 8 MiB while the peer reads", "8388608, right", carries=MIB)
def _large(stage: Stage) -> str:
    client, server = stage.pair()
    data = os.urandom(_LARGE)
    sending = stage.begin(lambda: client.send(data))
    got = hashlib.sha256(read_all(server, _LARGE)).digest()
    right = "right" if got == hashlib.sha256(data).digest() else "wrong"
    return f"{sending.outcome()}, {right}"


@SENDING.same(
    "one non-blocking `send` of 64 MiB, nobody reads",
    "a part, EAGAIN, all of it arrives",
    carries=MIB,
)
def _partial(stage: Stage) -> str:
    client, server = stage.pair()
    data = os.urandom(64 * MIB)
    sent = client.send(data, socket.MSG_DONTWAIT)
    part = "a part" if 0 < sent < len(data) else str(sent)
    sent += fill(client)
    again = said(lambda: client.send(TEN, socket.MSG_DONTWAIT))
    got = read_all(server, sent)
    return f"{part}, {again}, {'all of it arrives' if len(got) == sent else 'not all arrives'}"


@SENDING.same("`SO_SNDTIMEO` runs out, nobody reads", "a part, EAGAIN", carries=MIB)
def _sndtimeo(stage: Stage) -> str:
    client, _server = stage.pair()
    set_timeout(client, socket.SO_SNDTIMEO, 0.2)
    data = bytes(64 * MIB)
    sent = client.send(data)
    for _ in range(20):  # TCP's buffers may have grown meanwhile
        if (last := said(lambda: client.send(data))) == "EAGAIN":
            break
    return f"{'a part' if 0 < sent < len(data) else sent}, {last}"


@SENDING.same(
    "`SO_SNDBUF` and `SO_RCVBUF` of 64 KiB: what fits while nobody reads",
    "less than 1 MiB",
    carries=10,
)
def _buffers(stage: Stage) -> str:
    client, server = stage.pair()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    client.sendall(TEN)
    return "less than 1 MiB" if fill(client) < MIB else "more than 1 MiB"


@SENDING.accepted(
    "SIOCOUTQ after 4 MiB, nobody reads",
    "above 0",
    "0",
    "what waits on the shortcut waits in the reader's queue; nothing is unsent",
    carries=4 * MIB,
)
def _outq(stage: Stage) -> str:
    client, _ = stage.pair()
    fill(client, 4 * MIB)
    return "above 0" if libc.asked(client, libc.SIOCOUTQ) else "0"


@SENDING.guarded(
    "`MSG_ZEROCOPY`: the completion",
    "completion",
    GUARD,
    unguarded="nothing",
    carries=10,
)
def _zerocopy(stage: Stage) -> str:
    client, server = stage.pair()
    client.setsockopt(socket.SOL_SOCKET, libc.SO_ZEROCOPY, 1)
    client.send(TEN, libc.MSG_ZEROCOPY)
    read_all(server, 10)
    if stage.polled(client, 0) != "ERR":
        return "nothing"
    return "completion" if client.recvmsg(0, 100, libc.MSG_ERRQUEUE)[1] else "no message"


@SENDING.same(
    "`SO_TIMESTAMPING` of what is sent: the notes in the error queue",
    "notes",
    "a sender that asks for them stays on TCP",
    carries=0,
)
def _timestamps(stage: Stage) -> str:
    client, server = stage.pair()
    by_software, acknowledged, report = 1 << 1, 1 << 9, 1 << 4
    client.setsockopt(socket.SOL_SOCKET, libc.SO_TIMESTAMPING, by_software | acknowledged | report)
    client.send(TEN)
    read_all(server, 10)
    if stage.polled(client, 0) != "ERR":
        return "none"
    return "notes" if client.recvmsg(100, 200, libc.MSG_ERRQUEUE)[1] else "no message"


@SENDING.accepted(
    "`send` from a buffer whose end is no memory",
    "EFAULT",
    "0",
    "`sk_msg_memcopy_from_iter` forgets the error; a program that does this is broken",
    carries=0,
)
def _torn(stage: Stage) -> str:
    client, _ = stage.pair()
    return said(lambda: libc.send_torn(client, 3000))


def _first_and_second(stage: Stage, server: socket.socket) -> str:
    return "at once" if stage.polled(server, select.POLLIN, 0) == "IN" else "held back"


@SENDING.accepted(
    "`TCP_CORK`: 10 bytes, then uncorked",
    "held back, IN",
    "at once, IN",
    "it shapes packets, and there are none; held bytes would be bytes to lose. A client that takes "
    "what its first `recv` brings for the whole answer notices (`ab -k`, if no length is told)",
)
def _cork(stage: Stage) -> str:
    client, server = stage.pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    client.sendall(TEN)
    first = _first_and_second(stage, server)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    return f"{first}, {stage.polled(server, select.POLLIN)}"


@SENDING.accepted(
    "`MSG_MORE`: 10 bytes, then 10 without it",
    "held back, 20 bytes",
    "at once, 20 bytes",
    "as with `TCP_CORK`",
    carries=20,
)
def _more(stage: Stage) -> str:
    client, server = stage.pair()
    client.send(TEN, libc.MSG_MORE)
    first = _first_and_second(stage, server)
    client.sendall(TEN)
    return f"{first}, {said(lambda: read_all(server, 20))}"


def _three(stage: Stage, *, nodelay: bool) -> str:
    client, server = stage.pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    for _ in range(3):
        client.sendall(TEN)
    first = said(lambda: server.recv(100))
    return first if first == "30 bytes" else f"{first}, {said(lambda: read_all(server, 20))}"


@SENDING.accepted(
    "Nagle: three small sends; what the first `recv` gets, and what comes later",
    "10 bytes, 20 bytes",
    "30 bytes",
    "small writes do not wait for an acknowledgement",
    carries=30,
)
def _nagle(stage: Stage) -> str:
    return _three(stage, nodelay=False)


@SENDING.same("`TCP_NODELAY`: three small sends", "30 bytes", carries=30)
def _nodelay(stage: Stage) -> str:
    return _three(stage, nodelay=True)


@SENDING.same(
    "two threads send 4 KiB each, 200 times: every send in one piece", "yes", carries=1600 << 10
)
def _two_senders(stage: Stage) -> str:
    client, server = stage.pair()

    def send(letter: bytes) -> None:
        for _ in range(200):
            client.sendall(letter * _BLOCK)

    sending = [stage.begin(partial(send, letter)) for letter in (b"a", b"b")]
    whole = all(len(set(read_all(server, _BLOCK))) == 1 for _ in range(400))
    for call in sending:
        call.join()
    return "yes" if whole else "no"


SENDING.not_run(
    "`SO_MAX_PACING_RATE`, tc shaping",
    "the rate holds",
    "as fast as the reader reads",
    Verdict.ACCEPTED,
    "[not run: a rate is a time] no packet passes a queue; keep programs that must be "
    "slowed outside",
)
