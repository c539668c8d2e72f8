"""Rows: who is told of what, and when."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket

from tests.semantics.stage import MIB, Stage, events_said, fill, read_all
from tests.semantics.table import TEN, Subject

READINESS = Subject("Readiness")
HANG_UPS = select.EPOLLIN | select.EPOLLRDHUP


def _epoll(sock: socket.socket, events: int) -> select.epoll:
    epoll = select.epoll()
    epoll.register(sock, events)
    return epoll


def _told(epoll: select.epoll, seconds: float) -> str:
    found = epoll.poll(seconds)
    return events_said(found[0][1] if found else 0)


@READINESS.same("`poll`: nothing there, bytes there, all read", "nothing, IN, nothing")
def _poll(stage: Stage) -> str:
    client, server = stage.pair()
    before = stage.polled(server, select.POLLIN, 0)
    client.sendall(TEN)
    there = stage.polled(server, select.POLLIN)
    server.recv(100)
    return f"{before}, {there}, {stage.polled(server, select.POLLIN, 0)}"


@READINESS.same("`poll` asleep as bytes come", "IN")
def _poll_asleep(stage: Stage) -> str:
    client, server = stage.pair()
    polling = stage.begin(lambda: stage.polled(server, select.POLLIN, 5)).asleep()
    client.sendall(TEN)
    return polling.outcome()


@READINESS.same("`select`", "readable and writable")
def _select(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    select.select([server], [], [], stage.patience)
    readable, writable, _ = select.select([server], [server], [], 0)
    return "readable and writable" if readable and writable else "not"


@READINESS.same("epoll, level-triggered: bytes, half read, all read", "IN, IN, nothing")
def _level(stage: Stage) -> str:
    client, server = stage.pair()
    epoll = _epoll(server, select.EPOLLIN)
    client.sendall(TEN)
    seen = [_told(epoll, stage.patience)]
    for size in (5, 5):
        server.recv(size)
        seen.append(_told(epoll, 0))
    return ", ".join(seen)


@READINESS.same(
    "epoll, edge-triggered: bytes, nothing new, more bytes, half read and more bytes",
    "IN, nothing, IN, IN",
    carries=30,
)
def _edge(stage: Stage) -> str:
    client, server = stage.pair()
    epoll = _epoll(server, select.EPOLLIN | select.EPOLLET)
    seen = []
    for send, read in ((True, 0), (False, 0), (True, 0), (True, 15)):
        if read:
            server.recv(read)
        if send:
            client.sendall(TEN)
        seen.append(_told(epoll, stage.patience if send else 0))
    return ", ".join(seen)


@READINESS.same("epoll asleep, edge-triggered, as bytes come", "IN")
def _edge_asleep(stage: Stage) -> str:
    client, server = stage.pair()
    epoll = _epoll(server, select.EPOLLIN | select.EPOLLET)
    polling = stage.begin(lambda: _told(epoll, 5)).asleep()
    client.sendall(TEN)
    return polling.outcome()


@READINESS.same("epoll, one-shot: bytes, more bytes, armed again", "IN, nothing, IN", carries=20)
def _one_shot(stage: Stage) -> str:
    client, server = stage.pair()
    epoll = _epoll(server, select.EPOLLIN | select.EPOLLONESHOT)
    client.sendall(TEN)
    seen = [_told(epoll, stage.patience)]
    client.sendall(TEN)
    seen.append(_told(epoll, 0))
    epoll.modify(server, select.EPOLLIN | select.EPOLLONESHOT)
    return ", ".join((*seen, _told(epoll, stage.patience)))


@READINESS.accepted(
    "epoll, edge-triggered, a short read taken for the end: shortcut bytes, TCP bytes behind them",
    "IN, 20 bytes",
    "IN, 10 bytes, IN, 10 bytes",
    "the second event comes within 2 s: the socket leaves the map and is woken",
)
def _stuck(stage: Stage) -> str:
    client, server = stage.pair()
    epoll = _epoll(server, select.EPOLLIN | select.EPOLLET)
    client.sendall(TEN)
    with stage.by_tcp():
        client.sendall(TEN)
    seen, left = [], 20
    while left:
        seen.append(_told(epoll, 3 + stage.patience))
        left -= len(data := server.recv(100, socket.MSG_DONTWAIT))
        seen.append(f"{len(data)} bytes")
    return ", ".join(seen)


@READINESS.same(
    "EPOLLRDHUP: peer shuts down writing behind 10 bytes; all read", "IN RDHUP, IN RDHUP"
)
def _half_hang_up(stage: Stage) -> str:
    client, server = stage.pair()
    client.sendall(TEN)
    client.shutdown(socket.SHUT_WR)
    stage.polled(server, select.POLLRDHUP)
    epoll = _epoll(server, HANG_UPS)
    first = _told(epoll, stage.patience)
    server.recv(100)
    return f"{first}, {_told(epoll, 0)}"


@READINESS.same("EPOLLHUP: both sides have shut down", "IN HUP RDHUP", carries=0)
def _hang_up(stage: Stage) -> str:
    client, server = stage.pair()
    server.shutdown(socket.SHUT_WR)
    client.shutdown(socket.SHUT_WR)
    stage.polled(server, 0)  # HUP is always told
    return _told(_epoll(server, HANG_UPS), stage.patience)


def _writable(stage: Stage, events: int) -> str:
    client, server = stage.pair()
    sent = fill(client)
    epoll = _epoll(client, events)
    full = _told(epoll, 0)
    read_all(server, sent)
    return f"{full}, {_told(epoll, stage.patience)}"


@READINESS.same(
    "EPOLLOUT: sender filled up to EAGAIN, then the reader reads all", "nothing, OUT", carries=MIB
)
def _writable_level(stage: Stage) -> str:
    return _writable(stage, select.EPOLLOUT)


@READINESS.same("EPOLLOUT, edge-triggered: the same", "nothing, OUT", carries=MIB)
def _writable_edge(stage: Stage) -> str:
    return _writable(stage, select.EPOLLOUT | select.EPOLLET)


@READINESS.same("signal-driven: `O_ASYNC` and bytes come", "SIGIO")
def _sigio(stage: Stage) -> str:
    client, server = stage.pair()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
    fcntl.fcntl(server, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(server, fcntl.F_SETFL, fcntl.fcntl(server, fcntl.F_GETFL) | os.O_ASYNC)
    client.sendall(TEN)
    told = signal.sigtimedwait([signal.SIGIO], stage.patience)
    return "SIGIO" if told else "nothing"
