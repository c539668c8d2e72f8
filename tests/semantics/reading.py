"""Rows: reading, and reading in special ways."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import termios
from collections.abc import Callable
from functools import partial

from tests.semantics import libc
from tests.semantics.stage import Stage, read_all, said, set_timeout
from tests.semantics.table import TEN, Subject
from tests.semantics.uring import Uring

READING = Subject("Reading")
SPECIAL = Subject("Reading in special ways")

GUARD = "the guard: programs seen doing this stay on TCP"
ONCE = "`tcp_bpf_recvmsg` waits once; programs that read without blocking do not notice"


@READING.same(
    "`recv`, `read`, `readv`, `recvmsg`", "10 bytes, 10 bytes, 10 bytes, 10 bytes", carries=40
)
def _reads(stage: Stage) -> str:
    client, server = stage.pair()
    room = [bytearray(4), bytearray(96)]

    def readv() -> bytes:
        return b"".join(room)[: os.readv(server.fileno(), room)]

    reads: tuple[Callable[[], bytes], ...] = (
        lambda: server.recv(100),
        lambda: os.read(server.fileno(), 100),
        readv,
        lambda: server.recvmsg(100)[0],
    )
    seen = []
    for read in reads:
        client.sendall(TEN)
        seen.append(said(read))
    return ", ".join(seen)


@READING.same("`recv` of less than one send, and of two at once", "4 bytes, 16 bytes", carries=20)
def _portions(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    client.sendall(TEN)
    return f"{said(lambda: server.recv(4))}, {said(lambda: server.recv(100))}"


@READING.same("`recvmmsg`", "4 bytes, 6 bytes")
def _recvmmsg(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    return ", ".join(f"{len(part)} bytes" for part in libc.recvmmsg(server, (4, 10, 10)))


@READING.same("`recv` that sleeps until bytes come", "10 bytes")
def _asleep(stage: Stage) -> str:
    client, server = stage.pair()
    reading = stage.begin(lambda: server.recv(100)).asleep()
    client.sendall(TEN)
    return reading.outcome()


@READING.same("`recv(MSG_DONTWAIT)`, nothing there; then something", "EAGAIN, 10 bytes")
def _dontwait(stage: Stage) -> str:
    client, server = stage.pair()
    first = said(lambda: server.recv(100, socket.MSG_DONTWAIT))
    client.sendall(TEN)
    return f"{first}, {said(lambda: server.recv(100, socket.MSG_DONTWAIT))}"


@READING.same("`recv` of 0 bytes, 10 bytes there", "0, 10 bytes")
def _nothing_of_ten(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    first = stage.told(lambda: len(libc.recv(server, 0)))
    return f"{first}, {said(lambda: server.recv(100))}"


@READING.accepted(
    "`recv` of 0 bytes, nothing there",
    "blocks",
    "0",
    "a program that waits so for bytes goes on at once, and waits in its next `recv`; kernels "
    "without d900f3d20cc3 loop where bytes are there: `up` and `doctor` refuse them",
    carries=0,
)
def _nothing_of_nothing(stage: Stage) -> str:
    _client, server = stage.pair()
    return stage.told(lambda: len(libc.recv(server, 0)))


@READING.same(
    "two sends, `recv(MSG_PEEK)` twice, then `recv`", "20 bytes, 20 bytes, 20 bytes", carries=20
)
def _peek(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    client.sendall(TEN)
    flags = (socket.MSG_PEEK, socket.MSG_PEEK, 0)
    return ", ".join(said(partial(server.recv, 100, flag)) for flag in flags)


@READING.same("bytes by TCP, then by the shortcut, read at the end", "in order", carries=20)
def _order(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(b"1" * 10)
    with stage.by_tcp():
        client.sendall(b"2" * 10)
    client.sendall(b"3" * 10)  # must wait behind the second
    got = read_all(server, 30)
    client.sendall(b"4" * 10)
    got += read_all(server, 10)
    return "in order" if got == b"".join(b"%d" % n * 10 for n in (1, 2, 3, 4)) else f"{got!r}"


def _mixed(stage: Stage) -> tuple[socket.socket, socket.socket]:
    """A reader for whom 10 bytes wait by the shortcut and 10 more behind them by TCP."""
    client, server = stage.pair()
    client.sendall(TEN)
    with stage.by_tcp():
        client.sendall(TEN)
    return client, server


@READING.accepted(
    "10 bytes by the shortcut, 10 behind them by TCP: `recv`, `recv`",
    "20 bytes, EAGAIN",
    "10 bytes, 10 bytes",
    "one `recv` reads from one queue; a short read, as TCP allows at any time",
)
def _border(stage: Stage) -> str:
    _client, server = _mixed(stage)
    return ", ".join(said(lambda: server.recv(100, socket.MSG_DONTWAIT)) for _ in range(2))


@READING.accepted(
    "10 bytes by the shortcut, 10 behind them by TCP: `recv(MSG_PEEK)`",
    "20 bytes",
    "10 bytes",
    "as with `recv`. A program that peeks until a whole record is there sees the rest only once "
    "it has read the "
    "first part: this takes a path change (`pause`, `down`, the budget) inside a record",
)
def _peek_border(stage: Stage) -> str:
    _client, server = _mixed(stage)
    return said(lambda: server.recv(100, socket.MSG_PEEK))


@READING.same("`SO_RCVTIMEO` runs out", "EAGAIN", carries=0)
def _rcvtimeo(stage: Stage) -> str:
    _, server = stage.pair()
    set_timeout(server, socket.SO_RCVTIMEO, 0.05)
    return stage.told(lambda: server.recv(100))


def _interrupted(stage: Stage, *, restart: bool) -> str:
    client, server = stage.pair()
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, not restart)
    reading = stage.begin(lambda: libc.recv(server, 100)).asleep()
    assert reading.ident is not None
    signal.pthread_kill(reading.ident, signal.SIGUSR1)
    if not restart:
        return reading.outcome()
    # the signal has been taken once the thread is asleep again, or gone
    reading.join(stage.patience)
    client.sendall(TEN)
    return reading.outcome()


@READING.accepted("`recv` interrupted by a signal, `SA_RESTART` set", "10 bytes", "EAGAIN", ONCE)
def _restarted(stage: Stage) -> str:
    return _interrupted(stage, restart=True)


@READING.accepted(
    "`recv` interrupted by a signal, without `SA_RESTART`", "EINTR", "EAGAIN", ONCE, 0
)
def _not_restarted(stage: Stage) -> str:
    return _interrupted(stage, restart=False)


@READING.accepted(
    "`recv` while the process is stopped and goes on (job control, a debugger, a frozen cgroup)",
    "10 bytes",
    "EAGAIN",
    ONCE,
)
def _stopped(stage: Stage) -> str:
    client, server = stage.pair()
    reading = stage.begin(lambda: libc.recv(server, 100)).asleep()
    me = str(os.getpid())
    script = 'kill -STOP "$0"; sleep 0.2; kill -CONT "$0"'
    subprocess.run(["sh", "-c", script, me], check=True, timeout=30)
    reading.join(stage.patience)
    client.sendall(TEN)
    return reading.outcome()


@READING.accepted(
    "two threads asleep in `recv`, bytes for one", "10 bytes, blocks", "10 bytes, EAGAIN", ONCE
)
def _two_readers(stage: Stage) -> str:
    client, server = stage.pair()
    readings = [stage.begin(lambda: server.recv(100)).asleep() for _ in range(2)]
    client.sendall(TEN)
    return ", ".join(sorted(reading.outcome() for reading in readings))


@SPECIAL.guarded(
    "`recv(MSG_WAITALL)`: 10 bytes are there, 10 come later",
    "20 bytes",
    GUARD,
    unguarded="10 bytes",
    carries=10,
)
def _waitall(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    reading = stage.begin(lambda: server.recv(20, socket.MSG_WAITALL))
    reading.join(stage.patience)
    client.sendall(TEN)
    return reading.outcome()


@SPECIAL.guarded(
    "`recv(MSG_WAITALL)` asleep with 10 bytes of TCP as the path could change",
    "20 bytes",
    "that direction stays on TCP while a reader sleeps in a TCP read",
)
def _waitall_on_tcp(stage: Stage) -> str:
    client, server = stage.pair()
    with stage.by_tcp():
        client.sendall(TEN)
        reading = stage.begin(lambda: server.recv(20, socket.MSG_WAITALL)).asleep()
    client.sendall(TEN)
    return reading.outcome()


@SPECIAL.guarded(
    "`SO_RCVLOWAT` 8: 4 bytes, then 4 more",
    "nothing, IN",
    "that direction stays on TCP while it is above 1",
)
def _lowat(stage: Stage) -> str:
    client, server = stage.pair()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 8)
    client.sendall(TEN[:4])
    first = stage.polled(server, select.POLLIN)
    client.sendall(TEN[:4])
    return f"{first}, {stage.polled(server, select.POLLIN)}"


@SPECIAL.accepted(
    "`SO_RCVLOWAT` 20 set while 10 bytes wait",
    "nothing",
    "IN",
    "what went by the shortcut before is readable; what comes after it goes by TCP",
)
def _late_lowat(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 20)
    return stage.polled(server, select.POLLIN)


@SPECIAL.guarded(
    "`SO_PEEK_OFF` 0, `recv(MSG_PEEK)` of 4 bytes twice",
    "0123, 4567",
    "that direction stays on TCP while it is set",
)
def _peek_off(stage: Stage) -> str:
    client, server = stage.pair()
    server.setsockopt(socket.SOL_SOCKET, libc.SO_PEEK_OFF, 0)
    client.sendall(TEN)
    return ", ".join(server.recv(4, socket.MSG_PEEK).decode() for _ in range(2))


@SPECIAL.accepted(
    "`recv(MSG_TRUNC)` with a buffer of 10: is it written?",
    "10 bytes, left as it was",
    "10 bytes, written",
    "`tcp_bpf_recvmsg` knows no MSG_TRUNC: the bytes are consumed, as asked",
)
def _trunc(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    room = bytearray(10)
    got = server.recv_into(room, 10, socket.MSG_TRUNC)
    return f"{got} bytes, {'written' if room == TEN else 'left as it was'}"


@SPECIAL.accepted(
    "`recv(NULL, 10, MSG_TRUNC)`, then `recv`",
    "10, EAGAIN",
    "EFAULT, 10 bytes",
    "`tcp_bpf_recvmsg` knows no MSG_TRUNC; the bytes stay where they are",
)
def _trunc_nowhere(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    first = said(lambda: libc.recv_nowhere(server, 10, socket.MSG_TRUNC))
    return f"{first}, {said(lambda: server.recv(100, socket.MSG_DONTWAIT))}"


@SPECIAL.guarded(
    "`splice` from the socket",
    "10",
    f"{GUARD} (HAProxy; Go's `io.Copy` between connections)",
    unguarded="blocks",
    carries=10,
)
def _splice_from(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    _, writing = os.pipe()
    return stage.told(lambda: os.splice(server.fileno(), writing, 100))


@SPECIAL.guarded(
    "`sendfile` from the socket into a pipe", "10", GUARD, unguarded="blocks", carries=10
)
def _sendfile_from(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    _, writing = os.pipe()
    return stage.told(lambda: os.sendfile(writing, server.fileno(), None, 100))


@SPECIAL.guarded("`io_uring` splice from the socket", "10", GUARD, unguarded="blocks", carries=10)
def _splice_from_by_ring(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    _, writing = os.pipe()
    ring = Uring()
    return stage.told(lambda: ring.splice(server.fileno(), writing, 100))


@SPECIAL.guarded(
    "`MSG_OOB`: POLLPRI, `recv(MSG_OOB)`, `recv`",
    "PRI, !, 0123456789",
    GUARD,
    unguarded="nothing, 0, 123456789!",
    carries=11,
)
def _urgent(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    client.send(b"!", socket.MSG_OOB)
    told = stage.polled(server, select.POLLPRI)
    urgent = server.recv(1, socket.MSG_OOB).decode()
    return f"{told}, {urgent}, {server.recv(100).decode()}"


@SPECIAL.accepted(
    "`recv(MSG_OOB)` with no urgent byte there",
    "EINVAL",
    "10 bytes",
    "`tcp_bpf_recvmsg` knows no MSG_OOB; programs ask after POLLPRI or SIGURG, which do not come",
)
def _nothing_urgent(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    return said(lambda: server.recv(100, socket.MSG_OOB))


@SPECIAL.guarded(
    "`MSG_OOB` with `SO_OOBINLINE`: POLLPRI, `recv` up to the mark, SIOCATMARK, `recv`",
    "PRI, 10 bytes, 1, 1 bytes",
    GUARD,
    unguarded="nothing, 11 bytes, 0, EAGAIN",
    carries=11,
)
def _urgent_inline(stage: Stage) -> str:
    client, server = stage.pair()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    client.sendall(TEN)
    client.send(b"!", socket.MSG_OOB)
    told = stage.polled(server, select.POLLPRI)
    first = said(lambda: server.recv(100))
    mark = libc.asked(server, libc.SIOCATMARK)
    return f"{told}, {first}, {mark}, {said(lambda: server.recv(100, socket.MSG_DONTWAIT))}"


def _waiting(stage: Stage, server: socket.socket) -> str:
    stage.polled(server, select.POLLIN)
    return str(libc.asked(server, termios.FIONREAD))


@SPECIAL.accepted(
    "FIONREAD (SIOCINQ) on bytes of the shortcut",
    "10",
    ("10", "0"),
    "depends on the kernel, `doctor` tries it; right since 929e30f93125; before, programs that "
    "ask it stay on TCP",
)
def _fionread(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    return _waiting(stage, server)


@SPECIAL.accepted(
    "FIONREAD (SIOCINQ) on TCP bytes of a paired socket",
    "10",
    ("10", "0"),
    "depends on the kernel, `up` and `doctor` try it: 0 between 929e30f93125 and "
    "04af4efde58a; there a "
    "reader that waits for it leaves the map within 2 s, and pairs that begin by TCP leave at once",
    carries=0,
)
def _fionread_tcp(stage: Stage) -> str:
    client, server = stage.pair()
    with stage.by_tcp():
        client.sendall(TEN)
        return _waiting(stage, server)


@SPECIAL.accepted(
    "`TCP_INQ` control message, 4 of 10 bytes read",
    "6 more",
    "no message",
    "`tcp_bpf_recvmsg` fills in no control messages; programs use it as a hint",
)
def _inq(stage: Stage) -> str:
    client, server = stage.pair()
    server.setsockopt(socket.IPPROTO_TCP, libc.TCP_INQ, 1)
    client.sendall(TEN)
    _, told, _, _ = server.recvmsg(4, 100)
    return f"{int.from_bytes(told[0][2], 'little')} more" if told else "no message"


@SPECIAL.guarded(
    "`TCP_ZEROCOPY_RECEIVE`: bytes that it tells of",
    "10",
    "like `splice` from the socket it sees the TCP queue alone: the program stays on TCP",
    "0",
    len(TEN),
)
def _zerocopy_receive(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    stage.polled(server, select.POLLIN)
    return str(libc.zerocopy_receivable(server))


@SPECIAL.accepted(
    "`SO_TIMESTAMP` control message",
    "a timestamp",
    "no message",
    "no packet came whose time it could be",
)
def _timestamp(stage: Stage) -> str:
    client, server = stage.pair()
    server.setsockopt(socket.SOL_SOCKET, libc.SO_TIMESTAMP, 1)
    for _ in range(200):  # the kernel begins to stamp packets a moment after it is asked
        client.sendall(TEN)
        if server.recvmsg(100, 100)[1]:
            return "a timestamp"
        select.select([server], [], [], 0.005)
    return "no message"
