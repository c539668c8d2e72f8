"""Rows: ends, resets and halves."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct

from tests.semantics.reading import ONCE
from tests.semantics.stage import MIB, Stage, fill, forked, read_all, reset, said, set_up
from tests.semantics.table import TEN, Subject, Verdict

CLOSING = Subject("Closing")
HALF = "whoever shuts its sending side down leaves the map, and its peer sends by TCP"


@CLOSING.same("`close` behind 10 bytes", "10 bytes, end of file")
def _close(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    client.close()
    return f"{said(lambda: server.recv(100))}, {stage.told(lambda: server.recv(100))}"


@CLOSING.same("`close` while the peer sleeps in `recv`", "end of file", carries=0)
def _close_asleep(stage: Stage) -> str:
    client, server = stage.pair()
    reading = stage.begin(lambda: server.recv(100)).asleep()
    client.close()
    return reading.outcome()


@CLOSING.same(
    "`SO_LINGER` 0 and `close` (RST) behind 10 bytes", "10 bytes, ECONNRESET, end of file"
)
def _reset_behind(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    reset(client)
    return ", ".join(stage.told(lambda: server.recv(100)) for _ in range(3))


@CLOSING.accepted(
    "RST while the peer sleeps in `recv`; the next `recv`",
    "ECONNRESET, end of file",
    "EAGAIN, ECONNRESET",
    ONCE,
    carries=0,
)
def _reset_asleep(stage: Stage) -> str:
    client, server = stage.pair()
    reading = stage.begin(lambda: server.recv(100)).asleep()
    reset(client)
    return f"{reading.outcome()}, {stage.told(lambda: server.recv(100))}"


@CLOSING.same("RST: `poll`, `SO_ERROR`", "IN ERR HUP RDHUP, ECONNRESET", carries=0)
def _reset_told(stage: Stage) -> str:
    client, server = stage.pair()
    reset(client)
    told = stage.polled(server, select.POLLIN | select.POLLRDHUP)
    error = server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return f"{told}, {said(lambda: _raised(error))}"


def _raised(error: int) -> None:
    if error:
        raise OSError(error, "SO_ERROR")


@CLOSING.same(
    "`SO_LINGER` 2 s and `close`, 10 bytes unread at the peer", "done, 10 bytes, end of file"
)
def _linger(stage: Stage) -> str:
    client, server = stage.pair()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 2))
    client.sendall(TEN)
    closed = stage.told(client.close)
    return f"{closed}, {said(lambda: server.recv(100))}, {stage.told(lambda: server.recv(100))}"


@CLOSING.accepted(
    "`close` with 10 bytes unread; the peer's `recv`",
    "ECONNRESET",
    "end of file",
    "`tcp_close` looks at the TCP queue alone, and no hook may turn its FIN into a RST",
)
def _close_unread(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    server.close()
    return stage.told(lambda: client.recv(100))


@CLOSING.accepted(
    "`close` with 10 bytes unread; the peer's `send`, twice",
    "ECONNRESET, EPIPE",
    "10, EPIPE",
    "as with `recv`; the first goes by TCP to a closed socket, and the RST answers it",
)
def _send_unread(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    server.close()
    stage.polled(client, select.POLLRDHUP)
    return _send_twice(stage, client)


def _send_twice(stage: Stage, sock: socket.socket) -> str:
    first = said(lambda: sock.send(TEN))
    stage.polled(sock, 0, stage.patience if first == "10" else 0)  # HUP, should an RST come
    return f"{first}, {said(lambda: sock.send(TEN))}"


@CLOSING.same("`send` twice to a peer that has closed, all read", "10, EPIPE", carries=0)
def _send_closed(stage: Stage) -> str:
    client, server = stage.pair()
    server.close()
    stage.polled(client, select.POLLRDHUP)
    return _send_twice(stage, client)


@CLOSING.same(
    "a full peer closes while we sleep in `send`",
    "ECONNRESET",
    "the bytes above the budget wait in TCP, and its close resets",
    carries=MIB,
)
def _close_full(stage: Stage) -> str:
    client, server = stage.pair()
    fill(client)
    sending = stage.begin(lambda: client.sendall(bytes(64 * MIB))).asleep()
    server.close()
    return sending.outcome()


@CLOSING.guarded("`shutdown(SHUT_WR)`, then `write`", "EPIPE, SIGPIPE", HALF)
def _shut_send(stage: Stage) -> str:
    client, _ = stage.pair()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    client.shutdown(socket.SHUT_WR)
    outcome = said(lambda: os.write(client.fileno(), TEN))
    return f"{outcome}, {'SIGPIPE' if signal.SIGPIPE in signal.sigpending() else 'no signal'}"


@CLOSING.guarded(
    "half-close, then `recv` what the peer still sends", "end of file, 10 bytes, end of file", HALF
)
def _half_close(stage: Stage) -> str:
    client, server = stage.pair()
    client.shutdown(socket.SHUT_WR)
    first = stage.told(lambda: server.recv(100))
    server.sendall(TEN)
    server.close()
    return f"{first}, {said(lambda: client.recv(100))}, {stage.told(lambda: client.recv(100))}"


@CLOSING.same(
    "half-close with shortcut bytes unread on the closing side", "10 bytes, 10 bytes, end of file"
)
def _half_close_unread(stage: Stage) -> str:
    client, server = stage.pair()
    server.sendall(TEN)
    client.shutdown(socket.SHUT_WR)
    first = said(lambda: client.recv(100))
    server.sendall(TEN)
    server.close()
    return (
        f"{first}, {stage.told(lambda: client.recv(100))}, {stage.told(lambda: client.recv(100))}"
    )


@CLOSING.accepted(
    "another thread half-closes the socket under a sleeping `recv`; then 10 bytes come",
    "10 bytes",
    "EAGAIN",
    ONCE,
    carries=0,
)
def _half_close_asleep(stage: Stage) -> str:
    client, server = stage.pair()
    reading = stage.begin(lambda: client.recv(100)).asleep()
    client.shutdown(socket.SHUT_WR)
    server.recv(100)
    reading.join(stage.patience)
    server.sendall(TEN)
    return reading.outcome()


@CLOSING.guarded(
    "`shutdown(SHUT_RD)`, `recv`; the peer sends 10 bytes, `recv`",
    "end of file, 10 bytes",
    "nothing is sent by the shortcut to a socket that has shut down reading",
)
def _shut_read(stage: Stage) -> str:
    client, server = stage.pair()
    server.shutdown(socket.SHUT_RD)
    first = stage.told(lambda: server.recv(100))
    client.sendall(TEN)
    return f"{first}, {stage.told(lambda: server.recv(100))}"


@CLOSING.same("`shutdown(SHUT_RD)` with 10 bytes unread, `recv` twice", "10 bytes, end of file")
def _shut_read_unread(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    server.shutdown(socket.SHUT_RD)
    return ", ".join(stage.told(lambda: server.recv(100)) for _ in range(2))


@CLOSING.accepted(
    "another thread's `shutdown(SHUT_RDWR)` under a sleeping `recv`; the next `recv`",
    "end of file, end of file",
    "EAGAIN, end of file",
    ONCE,
    carries=0,
)
def _shut_both_asleep(stage: Stage) -> str:
    _, server = stage.pair()
    reading = stage.begin(lambda: server.recv(100)).asleep()
    server.shutdown(socket.SHUT_RDWR)
    return f"{reading.outcome()}, {stage.told(lambda: server.recv(100))}"


@CLOSING.accepted(
    "`ss -K` (SOCK_DESTROY) under a sleeping `recv`; the next `recv`",
    "ECONNABORTED, end of file",
    "EAGAIN, ECONNABORTED",
    ONCE,
    carries=0,
)
def _destroyed(stage: Stage) -> str:
    _client, server = stage.pair()
    reading = stage.begin(lambda: server.recv(100)).asleep()
    set_up("ss", "-K", "state", "established", "sport", "=", str(server.getsockname()[1]))
    return f"{reading.outcome()}, {stage.told(lambda: server.recv(100))}"


@CLOSING.same("peer's process killed with SIGKILL behind 10 bytes", "10 bytes, end of file")
def _killed(stage: Stage) -> str:
    client, server = stage.pair()
    reading, writing = os.pipe()

    def body() -> None:
        server.close()
        client.sendall(TEN)
        os.write(writing, b"!")
        signal.pause()

    child = forked(body)
    client.close()
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    first = said(lambda: read_all(server, 10))
    return f"{first}, {stage.told(lambda: server.recv(100))}"


@CLOSING.accepted(
    "peer's process killed with SIGKILL, asleep on our `recv`, 10 bytes unread by it",
    "ECONNRESET",
    "end of file",
    "a process that is killed closes its sockets: as with `close`",
)
def _killed_unread(stage: Stage) -> str:
    client, server = stage.pair()
    server.sendall(TEN)
    child = forked(signal.pause)
    client.close()
    reading = stage.begin(lambda: server.recv(100)).asleep()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return reading.outcome()


CLOSING.not_run(
    "`shutdown(SHUT_WR)` of one thread while another's `send` is under way",
    "after the message, or `send` fails",
    "the message may be lost, though `send` tells its size",
    Verdict.ACCEPTED,
    "[not run: a race, 2 to 3 of 100 tries of a program made for it] the kernel lets go of the "
    "sender's lock before it takes the reader's; a program whose threads do so does not know what "
    "it has sent on plain TCP either",
)
