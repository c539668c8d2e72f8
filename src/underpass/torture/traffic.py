"""Run a batch of connections between two workers and tell what went wrong on which."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass

from underpass.torture.endpoints import (
    MOVED,
    STOP,
    Endpoint,
    Loop,
    Machine,
    Outcome,
    play,
)
from underpass.torture.patience import patient
from underpass.torture.plans import FOREVER, Batch, Mode, family_of
from underpass.torture.worker import Worker, WorkerGoneError

_LISTENERS: dict[int, socket.socket] = {}
_ABANDONED = threading.Event()
"""Set: the other worker is dead, no more connections come."""
_LOOK = 0.2


@dataclass(frozen=True)
class Report:
    """The outcomes of both ends of every connection of a batch."""

    batch: Batch
    clients: tuple[Outcome, ...]
    servers: tuple[Outcome, ...]

    @property
    def wrong(self) -> list[str]:
        """A line for every connection that is not right, client's end first; empty: all right."""
        batch = self.batch
        lengths: dict[int, int] = {}
        lines: dict[int, list[str]] = {}
        for client, server in zip(self.clients, self.servers, strict=True):
            up, down = batch.streams(client.index)
            lengths[up] = max(client.sent, server.received, 1)
            lengths[down] = max(server.sent, client.received, 1)
        for end in (*self.clients, *self.servers):
            if end.wrong:
                lines.setdefault(end.index, []).append(f"{end.side} {end.wrong.describe(lengths)}")
            elif end.error:
                lines.setdefault(end.index, []).append(f"{end.side} {end.error}")
        for client, server in zip(self.clients, self.servers, strict=True):
            lines.setdefault(client.index, []).extend(self._lengths(client, server))
        return [
            f"connection {index} (port {batch.first_port + index}, {batch.plans[index].name}, "
            f"{batch.plans[index].mode.value}): {'; '.join(said)}"
            for index, said in sorted(lines.items())
            if said
        ]

    def _lengths(self, client: Outcome, server: Outcome) -> list[str]:
        """Complaints where a stream without a length in its plan lost or gained bytes."""
        plan = self.batch.plans[client.index]
        open_ended = any(step.receive == FOREVER for step in (*plan.client, *plan.server))
        if client.error or server.error or not open_ended:
            return []
        pairs = ((client, server, "to the server"), (server, client, "to the client"))
        return [
            f"{to.received} bytes of {by.sent} arrived {where}"
            for by, to, where in pairs
            if by.sent != to.received
        ]

    def check(self) -> None:
        """AssertionError that names every connection that is not right."""
        if wrong := self.wrong:
            head = f"{len(wrong)} of {len(self.clients)} connections wrong"
            raise AssertionError("\n".join([head, *wrong[:20]]))

    @property
    def woken(self) -> int:
        """Blocking reads that were woken for nothing, at both ends of all connections."""
        return sum(end.woken for end in (*self.clients, *self.servers))

    @property
    def sent_bytes(self) -> int:
        """Bytes sent by both ends of all connections."""
        return sum(end.sent for end in (*self.clients, *self.servers))


class Running:
    """A batch that is under way."""

    def __init__(self, client: Worker, server: Worker, batch: Batch) -> None:
        self.batch = batch
        self._workers = (client, server)
        for worker in self._workers:
            worker.call(start_again)
        server.call(open_listener, batch)
        self._server = server.submit(serve, batch)
        self._client = client.submit(connect, batch)

    def moved(self) -> int:
        """Bytes that both ends have sent so far."""
        return sum(worker.call(moved) for worker in self._workers)

    def ends(self) -> tuple[list[Outcome], list[Outcome]]:
        """Wait for both ends, of which a worker may be killed meanwhile: it has no outcomes."""
        limit = patient(self.batch.deadline + 20)
        wait((self._client, self._server), limit, FIRST_EXCEPTION)
        for worker in self._workers:
            if not worker.alive:
                for other in self._workers:
                    other.submit(abandon)
        ends = []
        for future in (self._client, self._server):
            try:
                ends.append(future.result(limit))
            except WorkerGoneError:
                ends.append([])
        return ends[0], ends[1]

    def stop(self) -> None:
        """Let streams without a length end."""
        for worker in self._workers:
            worker.call(stop)

    def report(self) -> Report:
        """Wait for all connections' ends."""
        limit = patient(self.batch.deadline + 20)
        clients, servers = self._client.result(limit), self._server.result(limit)
        return Report(self.batch, tuple(clients), tuple(servers))


def run_batch(client: Worker, server: Worker, batch: Batch) -> Report:
    """Run all connections of a batch to their ends."""
    return Running(client, server, batch).report()


def start_again() -> None:
    """In a worker: forget an earlier stop."""
    STOP.clear()
    _ABANDONED.clear()


def abandon() -> None:
    """In a worker: wait for no more connections."""
    _ABANDONED.set()


def stop() -> None:
    """In a worker: let streams without a length end."""
    STOP.set()


def moved() -> int:
    """In a worker: bytes sent so far."""
    return MOVED.value


def open_listener(batch: Batch) -> None:
    """In the server's worker: listen where the batch says."""
    host = batch.listen or batch.target
    listener = socket.socket(family_of(host), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((host, batch.port))
    listener.listen(4096)
    _LISTENERS[batch.number] = listener


def serve(batch: Batch) -> list[Outcome]:
    """In the server's worker: accept and play all connections of the batch."""
    side = _Side(batch, "server")
    listener = _LISTENERS.pop(batch.number)
    accepted = 0
    with listener:
        listener.settimeout(_LOOK)
        while accepted < len(batch.plans) and time.monotonic() < side.end:
            try:
                sock, peer = listener.accept()
            except TimeoutError:
                if _ABANDONED.is_set():
                    break
                continue
            accepted += 1
            side.start(sock, peer[1] - batch.first_port)
    return side.finish()


def connect(batch: Batch) -> list[Outcome]:
    """In the client's worker: connect and play all connections of the batch."""
    side = _Side(batch, "client")
    for index in range(len(batch.plans)):
        side.start(_client_socket(batch, index), index)
        if batch.pace:
            time.sleep(batch.pace)
    return side.finish()


def _client_socket(batch: Batch, index: int) -> socket.socket:
    sock = socket.socket(batch.family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if batch.deferred:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
    sock.bind((batch.source, batch.first_port + index))
    return sock


class _Side:
    """One end of all connections of a batch."""

    def __init__(self, batch: Batch, side: str) -> None:
        self.batch = batch
        self.side = side
        self.end = time.monotonic() + patient(batch.deadline)
        self.outcomes: dict[int, Outcome] = {}
        self.threads: list[threading.Thread] = []
        self.polled = 0
        self.loop = Loop(side, len(batch.plans), self.end)
        self.looping = threading.Thread(target=self.loop.run)
        self.looping.start()

    def start(self, sock: socket.socket, index: int) -> None:
        plan = self.batch.plans[index]
        up, down = self.batch.streams(index)
        if self.side == "client":
            endpoint = Endpoint(sock, plan.client, up, down, self.end)
        else:
            endpoint = Endpoint(sock, plan.server, down, up, self.end)
        if plan.mode is Mode.BLOCKING:
            thread = threading.Thread(target=self._play, args=(endpoint, index))
            self.threads.append(thread)
            thread.start()
            return
        self.polled += 1
        sock.setblocking(False)
        if self.side == "client":
            sock.connect_ex((self.batch.target, self.batch.port))
        self.loop.add(Machine(endpoint, index, plan.mode))

    def _play(self, endpoint: Endpoint, index: int) -> None:
        target = (self.batch.target, self.batch.port) if self.side == "client" else None
        if target is not None and self.batch.writer_waits:
            endpoint.sock.setblocking(False)
            endpoint.sock.connect_ex(target)
            target = None
        self.outcomes[index] = play(endpoint, index, self.side, target)

    def finish(self) -> list[Outcome]:
        self.loop.expected = self.polled
        for thread in self.threads:
            thread.join()
        self.looping.join()
        self.outcomes.update({done.index: done for done in self.loop.outcomes})
        missing = "its connection never came"
        return [
            self.outcomes.get(index, Outcome(index, self.side, 0, 0, 0, missing))
            for index in range(len(self.batch.plans))
        ]
