"""Rows: how connections come to be."""

from __future__ import annotations

import errno
import select
import socket
from functools import partial
from pathlib import Path

from tests.semantics import libc
from tests.semantics.stage import LOCALHOST, Stage, said
from tests.semantics.table import TEN, Subject

CONNECTING = Subject("Connecting")


@CONNECTING.same("IPv6; IPv4 to a dual-stack listener", "10 bytes, 10 bytes", carries=10)
def _families(stage: Stage) -> str:
    seen = []
    for family, address in ((socket.AF_INET6, "::1"), (socket.AF_INET, LOCALHOST)):
        with socket.create_server(
            ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
        ) as listener:
            client = socket.socket(family)
            client.connect((address, listener.getsockname()[1]))
            server, _ = listener.accept()
        stage.settle(client, server)
        client.sendall(TEN)
        seen.append(said(partial(server.recv, 100)))
    return ", ".join(seen)


@CONNECTING.same("non-blocking `connect`: EINPROGRESS, EPOLLOUT, then bytes", "OUT, 10 bytes")
def _nonblocking(stage: Stage) -> str:
    with socket.create_server((LOCALHOST, 0)) as listener:
        client = socket.socket()
        client.setblocking(False)
        begun = client.connect_ex(listener.getsockname())
        assert begun in (0, errno.EINPROGRESS)
        told = stage.polled(client, select.POLLOUT)
        client.setblocking(True)
        server, _ = listener.accept()
    stage.settle(client, server)
    client.sendall(TEN)
    return f"{told}, {said(lambda: server.recv(100))}"


@CONNECTING.guarded(
    "TCP fast open, 10 bytes in the SYN",
    "10 bytes",
    "the numbers of such a handshake do not mirror: the connection is no pair",
)
def _fast_open(_stage: Stage) -> str:
    enabled_without_cookies = 0x207
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(enabled_without_cookies))
    with socket.create_server((LOCALHOST, 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        client = socket.socket()
        client.sendto(TEN, socket.MSG_FASTOPEN, listener.getsockname())
        server, _ = listener.accept()
    return said(lambda: server.recv(100))


@CONNECTING.same(
    "`TCP_DEFER_ACCEPT` at both ends: the client speaks before the server is there",
    "0123456789abcdefghij",
    carries=0,
    why="what left before the server was known went by TCP; the rest waits until that is read",
)
def _deferred(_stage: Stage) -> str:
    with socket.create_server((LOCALHOST, 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        client = socket.socket()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        client.connect(listener.getsockname())
        client.sendall(TEN)
        server, _ = listener.accept()
    client.sendall(b"abcdefghij")
    got = b""
    while len(got) < 20:
        got += server.recv(100)
    return got.decode()


@CONNECTING.same(
    "`SO_REUSEPORT` group: 8 clients, each answered by who accepted it", "8 right", carries=10
)
def _reuse_port(stage: Stage) -> str:
    first = socket.create_server((LOCALHOST, 0), reuse_port=True)
    second = socket.create_server(first.getsockname(), reuse_port=True)
    right = 0
    for number in range(8):
        client = socket.create_connection(first.getsockname())
        ready, _, _ = select.select([first, second], [], [])
        server, _ = ready[0].accept()
        stage.settle(client, server)
        said_first = b"client %04d" % number
        client.sendall(said_first)
        right += server.recv(100) == said_first
    return f"{right} right"


@CONNECTING.same(
    "`connect(AF_UNSPEC)` with 10 bytes unread, `connect` to another server: what is read",
    "abcdefghij",
)
def _reconnect(stage: Stage) -> str:
    client, server = stage.pair()
    server.sendall(b"old words!")
    with socket.create_server((LOCALHOST, 0)) as listener:
        libc.disconnect(client)
        client.connect(listener.getsockname())
        second, _ = listener.accept()
    second.sendall(b"abcdefghij")
    return client.recv(100).decode()


@CONNECTING.guarded("a socket connected to itself", "10 bytes", "it is recognised and is no pair")
def _itself(_stage: Stage) -> str:
    sock = socket.socket()
    sock.bind((LOCALHOST, 0))
    sock.connect(sock.getsockname())
    sock.sendall(TEN)
    return said(lambda: sock.recv(100))
