"""Live self-test: a loopback pair through every behaviour that a kernel may have wrong.

Runs in a child process inside a cgroup of its own, on a generation of its own, so that nothing
else on the node is touched. Each test opens a fresh connection and leaves none behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from underpass import dataplane, namespaces
from underpass.dataplane import Dataplane
from underpass.errors import UnderpassError
from underpass.model import Settings

_DEADLINE = 3.0
_SETTINGS = Settings(capacity=64, budget_bytes=256 << 10, budget_messages=64, admit_unknown=True)
_BLOCK = 64 << 10
_NAME = "underpass-selftest-"


@dataclass(frozen=True)
class Outcome:
    """One test.

    Attributes:
        name: what the kernel should do.
        ok: it does.
        vital: underpass depends on it.
        detail: what was seen, if not ok.
        consequence: what it means if not ok.
    """

    name: str
    ok: bool
    vital: bool
    detail: str
    consequence: str = ""


class _Failed(Exception):
    pass


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise _Failed(what)


@contextlib.contextmanager
def _connection(
    family: int = socket.AF_INET, address: str = "127.0.0.1", defer: bool = False
) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server((address, 0), family=family) as listener:
        listener.settimeout(_DEADLINE)
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(_DEADLINE)
            if defer:  # the handshake's ACK waits for data, so the client speaks too early
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
            client.connect(listener.getsockname())
            if defer:
                client.sendall(b"0")
            server, _ = listener.accept()
            with server:
                server.settimeout(_DEADLINE)
                yield client, server


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            break
        data += part
    return data


def _readable(sock: socket.socket, seconds: float = 0.0) -> bool:
    return bool(select.select([sock], [], [], seconds)[0])


def _waiting(sock: socket.socket) -> int:
    raw = fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4)
    return int(struct.unpack("i", raw)[0])


def _until_asleep(thread: threading.Thread) -> None:
    """Return once ``thread`` sleeps in a socket's wait queue."""
    deadline = time.monotonic() + _DEADLINE
    where = Path(f"/proc/self/task/{thread.native_id}/wchan")
    while "wait_woken" not in where.read_text():
        _expect(time.monotonic() < deadline, "the reader never slept")


def _carried(plane: Dataplane) -> int:
    return plane.counters().shortcut_messages_total


def _pairs(plane: Dataplane, family: int, address: str) -> None:
    before = _carried(plane)
    with _connection(family, address) as (client, server):
        for one, other in ((client, server), (server, client)):
            one.sendall(b"ping")
            _expect(_read(other, 4) == b"ping", "wrong bytes")
    _expect(_carried(plane) == before + 2, "messages went by TCP")


def _pairs_ipv4(plane: Dataplane) -> None:
    _pairs(plane, socket.AF_INET, "127.0.0.1")


def _pairs_ipv6(plane: Dataplane) -> None:
    _pairs(plane, socket.AF_INET6, "::1")


def _deferred_ack(_: Dataplane) -> None:
    sent = b"".join(b"%07d\n" % n for n in range(64))
    with _connection(defer=True) as (client, server):
        for start in range(0, len(sent), 8):
            client.sendall(sent[start : start + 8])
        _expect(_read(server, 1 + len(sent)) == b"0" + sent, "bytes out of order")


def _order_after_tcp(plane: Dataplane) -> None:
    with _connection() as (client, server):
        client.sendall(b"first ")
        plane.set_paused(True)
        client.sendall(b"second ")
        plane.set_paused(False)
        client.sendall(b"third ")
        _expect(_read(server, 19) == b"first second third ", "bytes out of order")
        before = _carried(plane)
        client.sendall(b"fourth")
        _expect(_read(server, 6) == b"fourth", "wrong bytes")
        _expect(_carried(plane) == before + 1, "did not return to the shortcut")


def _charged(plane: Dataplane) -> None:
    with _connection() as (client, server):
        client.sendall(b"x" * 10000)
        unread = max(record.unread for record in plane.endpoints())
        _expect(unread >= 10000, f"10000 bytes wait, {unread} are charged")
        _read(server, 10000)


def _bounded(_: Dataplane) -> None:
    with _connection() as (client, server):
        client.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 64 << 20:
                sent += client.send(b"x" * _BLOCK)
        _expect(sent < 64 << 20, "the sender was never stopped")
        _expect(len(_read(server, sent)) == sent, "bytes were lost")


def _close_delivers(_: Dataplane) -> None:
    with _connection() as (client, server):
        client.sendall(b"last words")
        client.close()
        _expect(_read(server, 11) == b"last words", "bytes were lost")


def _reset_delivers(_: Dataplane) -> None:
    with _connection() as (client, server):
        client.sendall(b"last words")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        _expect(_read(server, 10) == b"last words", "bytes were lost")
        try:
            server.recv(1)
        except ConnectionResetError:
            return
        raise _Failed("no ECONNRESET after the bytes")


def _shutdown_is_final(_: Dataplane) -> None:
    with _connection() as (client, _server):
        client.shutdown(socket.SHUT_WR)
        try:
            client.send(b"x")
        except BrokenPipeError:
            return
        raise _Failed("send after shutdown succeeded")


def _reads_nothing(_: Dataplane) -> None:
    """Asked of an empty queue, where kernels that would loop say EAGAIN: nothing is risked."""
    with _connection() as (client, server):
        client.sendall(b"x")
        _read(server, 1)
        server.setblocking(False)  # or Python waits for bytes before it calls
        try:
            data = server.recvmsg(0)[0]
        except BlockingIOError:
            text = "with bytes there it would loop in the kernel (CVE-2023-53133, mended in 6.1.20)"
            raise _Failed(text) from None
        _expect(data == b"", "wrong bytes")


def _waitall(plane: Dataplane) -> None:
    with _connection() as (client, server):
        plane.set_paused(True)
        client.sendall(b"x" * 10)
        got: list[int] = []
        server.settimeout(None)  # or Python makes it non-blocking; SO_RCVTIMEO bounds the wait
        limit = struct.pack("ll", int(_DEADLINE), 0)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        reader = threading.Thread(
            target=lambda: got.append(len(server.recv(20, socket.MSG_WAITALL)))
        )
        reader.start()
        _until_asleep(reader)
        plane.set_paused(False)
        client.sendall(b"x" * 10)
        reader.join()
        _expect(got == [20], "a reader inside MSG_WAITALL was passed over")


def _lowat(_: Dataplane) -> None:
    with _connection() as (client, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 8)
        client.sendall(b"x" * 4)
        _expect(not _readable(server, 0.05), "readable below SO_RCVLOWAT")
        client.sendall(b"x" * 4)
        _expect(_readable(server, _DEADLINE), "not readable at SO_RCVLOWAT")
        _read(server, 8)


def _fionread_shortcut(_: Dataplane) -> None:
    with _connection() as (client, server):
        client.sendall(b"x" * 10)
        _expect(_waiting(server) == 10, f"10 bytes wait, it says {_waiting(server)}")


def _fionread_tcp(plane: Dataplane) -> None:
    with _connection() as (client, server):
        plane.set_paused(True)
        client.sendall(b"x" * 10)
        _expect(_readable(server, _DEADLINE), "never became readable")
        plane.set_paused(False)
        _expect(_waiting(server) == 10, f"10 bytes wait, it says {_waiting(server)}")


def _drain_keeps_unread(plane: Dataplane) -> None:
    """The last test: it drains the generation itself."""
    with _connection() as (client, server):
        client.sendall(b"unread")
        _expect(
            len(dataplane.drain(plane, 0, None)) == 1, "an endpoint with unread bytes was let go"
        )
        _expect(_read(server, 6) == b"unread", "bytes were lost")
        client.sendall(b"by tcp")
        _expect(_read(server, 6) == b"by tcp", "TCP does not go on")


_Test = Callable[[Dataplane], None]
#: name, whether underpass depends on it, test
_TESTS: tuple[tuple[str, bool, _Test], ...] = (
    ("an IPv4 connection pairs and both directions take the shortcut", True, _pairs_ipv4),
    ("an IPv6 connection pairs and both directions take the shortcut", False, _pairs_ipv6),
    ("a client whose handshake ACK is deferred keeps its order", True, _deferred_ack),
    ("order holds from shortcut to TCP and back", True, _order_after_tcp),
    ("unread redirected bytes are charged to the reader", True, _charged),
    ("a reader that does not read stops the sender", True, _bounded),
    ("close after redirected bytes: bytes, then end of file", True, _close_delivers),
    ("reset after redirected bytes: bytes, then ECONNRESET", False, _reset_delivers),
    ("send after shutdown gives EPIPE", False, _shutdown_is_final),
    ("a read of 0 bytes returns at once", True, _reads_nothing),
    ("a reader asleep in MSG_WAITALL on TCP bytes is not passed over", True, _waitall),
    ("SO_RCVLOWAT is honoured", False, _lowat),
    ("FIONREAD counts bytes of the shortcut", False, _fionread_shortcut),
    ("FIONREAD counts TCP bytes of a paired socket", False, _fionread_tcp),
    ("drain keeps an endpoint with unread bytes", True, _drain_keeps_unread),
)


#: What it means that a test which is not vital fails.
_CONSEQUENCES: dict[_Test, str] = {
    _fionread_tcp: "pairs that begin with a large message by TCP leave the map; a reader that "
    "trusts FIONREAD may pause 1 to 2 s when its sender falls back to TCP; programs that ask it "
    "are spared re-proof, so `underpass pause` and `resume` after a change of network rules",
    _fionread_shortcut: "programs that ask FIONREAD stay on TCP (sign fionread), nginx among "
    "them; one that asks for the first time once it is admitted can miss bytes that wait",
    _pairs_ipv6: "IPv6 connections stay on TCP",
}
#: What `up` tries before it goes live: quick, and leaves no endpoint behind.
_QUICK = (_pairs_ipv4, _order_after_tcp, _charged, _reads_nothing, _fionread_tcp)


def fionread_broken(outcomes: list[Outcome]) -> bool:
    """Does FIONREAD miss the TCP bytes of a socket in a map?"""
    name = next(name for name, _, test in _TESTS if test is _fionread_tcp)
    return any(o.name == name and not o.ok for o in outcomes)


def run(quick: bool = False) -> list[Outcome]:
    """Run every test, or the ``quick`` ones, and return the outcomes, in order.

    Raises:
        UnderpassError: the test bed cannot be made (no root, no cgroup v2, no bpffs).
    """
    sweep()
    cgroup = namespaces.find_cgroup2() / f"{_NAME}{os.getpid()}"
    pins = namespaces.BPFFS / cgroup.name
    with contextlib.ExitStack() as undo:
        try:
            cgroup.mkdir()
        except OSError as error:
            raise UnderpassError(
                "make", cgroup, error.strerror or str(error), "run as root, cgroup v2 writable"
            ) from None
        undo.callback(cgroup.rmdir)
        for _ in range(2):  # an interrupt may break off the first
            undo.callback(dataplane.down, pins, 1.0)
        # it does on purpose what keeps other programs out
        own = Path("/proc/self/exe").readlink().name[:31]
        dataplane.up(pins, cgroup, dataclasses.replace(_SETTINGS, allow=(own,)))
        return _in_child(pins, cgroup, [t for t in _TESTS if not quick or t[2] in _QUICK])


def sweep() -> None:
    """Clear what a self-test left that was killed with no chance to tidy up."""
    for cgroup in namespaces.find_cgroup2().glob(f"{_NAME}*"):
        if not Path(f"/proc/{cgroup.name.removeprefix(_NAME)}").exists():
            dataplane.down(namespaces.BPFFS / cgroup.name, 1.0)
            with contextlib.suppress(OSError):
                cgroup.rmdir()
    for pins in namespaces.BPFFS.glob(f"{_NAME}*"):  # their cgroup has gone before them
        owner = pins.name.removeprefix(_NAME)
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(UnderpassError):
                dataplane.down(pins, 1.0)


def _in_child(pins: Path, cgroup: Path, tests: Sequence[tuple[str, bool, _Test]]) -> list[Outcome]:
    """Sockets belong to the cgroup of the process that makes them: so a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            with os.fdopen(writing, "w") as report, Dataplane.open(pins) as plane:
                for name, vital, test in tests:
                    outcome = _one(name, vital, test, plane)
                    report.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
                    report.flush()
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as report:
            outcomes = [Outcome(**json.loads(line)) for line in report]
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.waitpid(child, 0)
    for name, vital, _ in tests[len(outcomes) :]:
        outcomes.append(Outcome(name, False, vital, "the test process ended before it"))
    return outcomes


def _one(name: str, vital: bool, test: _Test, plane: Dataplane) -> Outcome:
    def failed(detail: str) -> Outcome:
        return Outcome(name, False, vital, detail, _CONSEQUENCES.get(test, "programs see it"))

    try:
        test(plane)
    except _Failed as error:
        return failed(str(error))
    except TimeoutError:
        return failed(f"nothing came within {_DEADLINE:.0f} s")
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return Outcome(name, True, False, "not tried: this node has no such address family")
        return failed(str(error))
    except UnderpassError as error:
        return failed(str(error))
    return Outcome(name, True, vital, "")
