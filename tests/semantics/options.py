"""Rows: options and what the kernel tells of a connection."""

from __future__ import annotations

import select
import socket
import time
from pathlib import Path

from tests.semantics import libc
from tests.semantics.stage import LOCALHOST, MIB, Stage, fill, said, set_up
from tests.semantics.table import TEN, Subject

OPTIONS = Subject("Options and figures")
REFUSED = "the kernel refuses such a socket a place in the map (`not-suitable`)"


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


@OPTIONS.accepted(
    "keepalive options of a socket on which bytes by TCP wait behind others, unread",
    "off, 33, 44, 5",
    "on, 1, 1, 127",
    "the timer is borrowed meanwhile, so that a reader that misses those bytes is told of them; "
    "then all is as it was",
)
def _borrowed(stage: Stage) -> str:
    client, server = stage.pair()
    tcp = socket.IPPROTO_TCP
    wanted = {socket.TCP_KEEPIDLE: 33, socket.TCP_KEEPINTVL: 44, socket.TCP_KEEPCNT: 5}
    for option, value in wanted.items():
        server.setsockopt(tcp, option, value)
    client.sendall(TEN)
    with stage.by_tcp():
        client.sendall(TEN)
        time.sleep(0.1)
    on = server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    found = [str(server.getsockopt(tcp, option)) for option in wanted]
    return ", ".join(["on" if on else "off", *found])


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
    "Above the budget, or the receive buffer, TCP has bytes again and it holds",
    carries=MIB,
)
def _user_timeout(stage: Stage) -> str:
    client, _ = stage.pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
    fill(client, 4 * MIB)
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


@OPTIONS.accepted(
    "Recv-Q of `ss` and /proc/net/tcp while 10 bytes wait",
    "10",
    "0",
    "it is the TCP queue's; `underpass connections` shows what waits on the shortcut",
)
def _recv_queue(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    stage.polled(server, select.POLLIN)
    ports = f":{server.getsockname()[1]:04X}", f":{client.getsockname()[1]:04X}"
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if local.endswith(ports[0]) and remote.endswith(ports[1]):
            return str(int(queues.partition(":")[2], 16))
    return "not there"


@OPTIONS.same("`SO_INCOMING_CPU` can be read", "yes")
def _incoming_cpu(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    found = server.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)
    return "yes" if found >= 0 else "no"


def _mptcp(listens: int, connects: int) -> tuple[socket.socket, socket.socket]:
    """A client and its server, of these protocols."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, listens) as listener:
        listener.bind((LOCALHOST, 0))
        listener.listen()
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, connects)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    return client, server


@OPTIONS.guarded("MPTCP sockets at both ends", "10 bytes", REFUSED)
def _mptcp_both(_stage: Stage) -> str:
    client, server = _mptcp(socket.IPPROTO_MPTCP, socket.IPPROTO_MPTCP)
    client.sendall(TEN)
    return said(lambda: server.recv(100))


@OPTIONS.guarded("MPTCP client, TCP listener", "10 bytes", REFUSED)
def _mptcp_client(_stage: Stage) -> str:
    client, server = _mptcp(socket.IPPROTO_TCP, socket.IPPROTO_MPTCP)
    client.sendall(TEN)
    return said(lambda: server.recv(100))


@OPTIONS.same(
    "MPTCP listener (Go's default), TCP client", "10 bytes", "what it accepts is a TCP socket"
)
def _mptcp_listener(stage: Stage) -> str:
    client, server = _mptcp(socket.IPPROTO_MPTCP, socket.IPPROTO_TCP)
    stage.settle(client, server)
    client.sendall(TEN)
    return said(lambda: server.recv(100))
