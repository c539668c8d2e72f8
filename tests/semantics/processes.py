"""Rows: one socket and several processes."""

from __future__ import annotations

import os
import socket
import subprocess

from tests.semantics.stage import Stage, forked, said
from tests.semantics.table import TEN, Subject

PROCESSES = Subject("Processes and descriptors")


def _answer(sock: socket.socket) -> None:
    """What the other process does: send back what comes."""
    sock.sendall(sock.recv(100))


def _answered(stage: Stage, client: socket.socket) -> str:
    client.sendall(TEN)
    return stage.told(lambda: client.recv(100))


@PROCESSES.same(
    "descriptor passed over a Unix socket; the receiver goes on", "10 bytes", carries=20
)
def _passed(stage: Stage) -> str:
    client, server = stage.pair()
    ours, theirs = socket.socketpair()

    def body() -> None:
        server.close()
        _, (handle,), _, _ = socket.recv_fds(theirs, 1, 1)
        _answer(socket.socket(fileno=handle))

    child = forked(body)
    socket.send_fds(ours, [b"!"], [server.fileno()])
    server.close()
    outcome = _answered(stage, client)
    os.waitpid(child, 0)
    return outcome


@PROCESSES.same("`dup`: one closed, the other goes on", "10 bytes", carries=20)
def _dup(stage: Stage) -> str:
    client, server = stage.pair()
    other = server.dup()
    server.close()
    answering = stage.begin(lambda: _answer(other))
    outcome = _answered(stage, client)
    answering.join()
    return outcome


@PROCESSES.same("`fork`: the child answers, the parent has closed", "10 bytes", carries=20)
def _fork(stage: Stage) -> str:
    client, server = stage.pair()
    child = forked(lambda: _answer(server))
    server.close()
    outcome = _answered(stage, client)
    os.waitpid(child, 0)
    return outcome


@PROCESSES.same(
    "`fork`: parent and child read by turns", "10 bytes, 10 bytes, end of file", carries=20
)
def _turns(stage: Stage) -> str:
    client, server = stage.pair()
    seen = []
    client.sendall(TEN)
    seen.append(said(lambda: server.recv(100)))
    client.sendall(TEN)
    reading, writing = os.pipe()
    child = forked(lambda: os.write(writing, said(lambda: server.recv(100)).encode()))
    os.waitpid(child, 0)
    seen.append(os.read(reading, 100).decode())
    client.close()
    seen.append(stage.told(lambda: server.recv(100)))
    return ", ".join(seen)


@PROCESSES.same("`exec` with inherited descriptors: `head -c 10` answers", "10 bytes", carries=20)
def _exec(stage: Stage) -> str:
    client, server = stage.pair()
    child = subprocess.Popen(("head", "-c", "10"), stdin=server.fileno(), stdout=server.fileno())
    server.close()
    outcome = _answered(stage, client)
    child.wait()
    return outcome
