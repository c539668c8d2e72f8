"""Rows: options and what the kernel tells of a connection."""

from __future__ import annotations

import select
import socket

from tests.semantics import libc
from tests.semantics.stage import LOCALHOST, MIB, Stage, fill, said, set_up
from tests.semantics.table import TEN, Subject

OPTIONS = Subject("Options and figures")


@OPTIONS.same("`getsockname`, `getpeername`", "they agree", carries=0)
def _names(stage: Stage) -> str:
    client, server = stage.pair()
    agree = client.getsockname() == server.getpeername()
    agree &= server.getsockname() == client.getpeername()
    return "they agree" if agree else "they do not agree"


@OPTIONS.same("`SO_ERROR` of a sound connection", "0")
def _error(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    return str(server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


@OPTIONS.same("options of a pair read back: keepalive, timeouts, buffers", "as they were set")
def _read_back(stage: Stage) -> str:
    client, server = stage.pair()
    wanted = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 33,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 7000,
        (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
    }
    for option, value in wanted.items():
        client.setsockopt(*option, value)
    client.sendall(TEN)
    server.recv(100)
    found = {option: client.getsockopt(*option) for option in wanted}
    return "as they were set" if found == wanted else str(found)


@OPTIONS.same(
    "`SO_KEEPALIVE` and a network that has begun to drop all packets", "ETIMEDOUT", carries=0
)
def _keepalive(stage: Stage) -> str:
    client, _ = stage.pair()
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
        client.setsockopt(socket.IPPROTO_TCP, option, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    drop(client)
    stage.polled(client, select.POLLIN, 5 + stage.patience)
    return said(lambda: client.recv(100, socket.MSG_DONTWAIT))


def drop(sock: socket.socket) -> None:
    """Let a firewall drop what comes to the socket's port, in the row's own namespace."""
    port = str(sock.getsockname()[1])
    set_up("iptables", "-I", "INPUT", "-p", "tcp", "--dport", port, "-j", "DROP")


@OPTIONS.accepted(
    "`TCP_USER_TIMEOUT` 500 ms and a reader that stalls; the writer's next error",
    "ETIMEDOUT",
    "none",
    "it bounds how long bytes wait for an acknowledgement; those of the shortcut are with "
    "the reader. "
    "Above the budget TCP has bytes again and it holds",
    carries=MIB,
)
def _user_timeout(stage: Stage) -> str:
    client, _ = stage.pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
    fill(client, 12 * MIB)
    stage.polled(client, 0, 2 + stage.patience)
    error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return said(lambda: _none_or(error))


def _none_or(error: int) -> str:
    if error:
        raise OSError(error, "SO_ERROR")
    return "none"


@OPTIONS.accepted(
    "`TCP_INFO`: bytes_sent, bytes_received after 10 bytes",
    "10, 10",
    "0, 0",
    "no segment is sent; `underpass connections` counts them, tools that watch TCP_INFO "
    "(`ss`) do not",
)
def _info(stage: Stage) -> str:
    client, server = stage.pair()
    fields = ((client, libc.BYTES_SENT), (server, libc.BYTES_RECEIVED))
    before = [libc.tcp_info(*field) for field in fields]
    client.sendall(TEN)
    server.recv(100)
    after = [libc.tcp_info(*field) for field in fields]
    return ", ".join(str(new - old) for new, old in zip(after, before, strict=True))


@OPTIONS.same("`SO_INCOMING_CPU` can be read", "yes")
def _incoming_cpu(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    found = server.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)
    return "yes" if found >= 0 else "no"


@OPTIONS.guarded(
    "MPTCP sockets (`IPPROTO_MPTCP`) at both ends", "10 bytes", "the kernel refuses them, so do we"
)
def _mptcp(_stage: Stage) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as listener:
        listener.bind((LOCALHOST, 0))
        listener.listen()
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    client.sendall(TEN)
    return said(lambda: server.recv(100))
