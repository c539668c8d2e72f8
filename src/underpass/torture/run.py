"""One run: lanes that carry connections, a disturber beside them, and what came of it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field
from os import kill

from underpass.bench.processes import wait_for
from underpass.errors import UnderpassError
from underpass.model import Fault
from underpass.torture import schedule
from underpass.torture.bed import Bed, remove_pins
from underpass.torture.churn import Churn, churn_abandon, churn_connect, churn_serve
from underpass.torture.disturber import Disturber
from underpass.torture.endpoints import Outcome
from underpass.torture.generation import Generation, path_switches
from underpass.torture.plans import Batch
from underpass.torture.schedule import LANES, TORTURED, Kind, Lane
from underpass.torture.traffic import Report, Running
from underpass.torture.worker import Worker, WorkerGoneError

_CHURN_LIMIT = 60.0
_SURVIVES = (
    "ConnectionResetError",
    "ConnectionRefusedError",
    "ConnectionAbortedError",
    "BrokenPipeError",
    "EarlyError",
    "EOFError",
    "OSError: [Errno 107]",
    "its connection never came",
)
"""What the end of a connection may meet whose other end's process was killed."""
_BEGIN = 20.0
"""Seconds that a lane's processes may take to start."""
_GRACE = 5.0
"""Seconds that lanes have to end by themselves after an error."""


@dataclass
class Tally:
    """What has happened so far; written by many threads."""

    connections: int = 0
    open: int = 0
    bytes: int = 0
    woken: int = 0
    killed: int = 0
    adopted: int = 0
    disturbances: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, connections: int, size: int, woken: int = 0) -> None:
        """Count connections that have ended, and the bytes that they carried."""
        with self.lock:
            self.connections += connections
            self.bytes += size
            self.woken += woken

    def opened(self, connections: int) -> None:
        """Count connections as under way, or no longer."""
        with self.lock:
            self.open += connections

    def fail(self, lines: list[str]) -> None:
        """Take errors."""
        with self.lock:
            self.errors += lines


@dataclass(frozen=True)
class Result:
    """What a run has shown."""

    seed: int
    plan: str
    seconds: float
    connections: int
    bytes: int
    path_switches: int
    messages: dict[str, object]
    disturbances: dict[str, int]
    killed: int
    adopted: int
    woken: int
    errors: list[str]
    leaks: list[str]


class LaneThread(threading.Thread):
    """Plays a lane's batches one after the other until told to stop."""

    def __init__(
        self, lane: Lane, bed: Bed, seed: int, tally: Tally, stop: threading.Event
    ) -> None:
        super().__init__(name=str(lane), daemon=True)
        self.lane = lane
        self._bed = bed
        self._seed = seed
        self._tally = tally
        self._stopping = stop
        self._workers: list[Worker] = []
        self._killed = threading.Event()
        self.begun = threading.Event()
        """Set: its workers are at work."""

    def kill(self, side: int) -> bool:
        """Kill -9 the client's (0) or the server's (1) process; whether there was one."""
        if len(self._workers) < 2 or self._killed.is_set():
            return False
        self._killed.set()
        with contextlib.suppress(ProcessLookupError):
            kill(self._workers[side].pid, signal.SIGKILL)
        return True

    def run(self) -> None:
        """Body of the thread."""
        number = 0
        try:
            while not self._stopping.is_set():
                self._raise_workers()
                errors = self._play(number)
                if errors:
                    head = f"seed {self._seed}, lane {self.lane.number} ({self.lane})"
                    self._tally.fail([f"{head}, batch {number}: {line}" for line in errors])
                    self._stopping.set()
                number += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, the run must say it
            if not self._stopping.is_set():
                where = f"seed {self._seed}, lane {self.lane.number} ({self.lane}), batch {number}"
                self._tally.fail([f"{where}: no end: {type(error).__name__}: {error}"])
                self._stopping.set()
        finally:
            self._end_workers()

    def end(self) -> None:
        """Kill the workers: what they do ends at once."""
        for worker in list(self._workers):
            with contextlib.suppress(ProcessLookupError):
                kill(worker.pid, signal.SIGKILL)

    def _raise_workers(self) -> None:
        if self._killed.is_set():  # the other one is ended too: both begin anew
            self._end_workers()
            self._killed.clear()
        if not self._workers:
            lane = self.lane
            self._workers = [self._bed.worker(pod) for pod in (lane.client, lane.server)]

    def _end_workers(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()

    def _play(self, number: int) -> list[str]:
        """Play a batch; lines that tell what was wrong."""
        try:
            if self.lane.kind is Kind.CHURN:
                return self._play_churn(schedule.churn(self._seed, self.lane, number))
            return self._play_batch(schedule.batch(self._seed, self.lane, number))
        except WorkerGoneError:
            if not self._killed.is_set() and not self._stopping.is_set():
                raise
            return []

    def _play_batch(self, batch: Batch) -> list[str]:
        client, server = self._workers
        self._tally.opened(len(batch.plans))
        try:
            running = Running(client, server, batch)
            self.begun.set()
            ends = running.ends()
        finally:
            self._tally.opened(-len(batch.plans))
        received = sum(end.received for side in ends for end in side)
        woken = sum(end.woken for side in ends for end in side)
        self._tally.add(len(batch.plans), received, woken)
        where = f"{batch.target} port {batch.port}, "
        if all(ends):
            report = Report(batch, tuple(ends[0]), tuple(ends[1]))
            return [where + line for line in report.wrong]
        if not self._killed.is_set():
            raise WorkerGoneError("a worker has died by itself")
        return [where + line for side in ends for line in _survivors(batch, side)]

    def _play_churn(self, churn: Churn) -> list[str]:
        client, server = self._workers
        self._tally.opened(1)
        try:
            futures = server.submit(churn_serve, churn), client.submit(churn_connect, churn)
            self.begun.set()
            wait(futures, _CHURN_LIMIT, FIRST_EXCEPTION)
            if not server.alive:
                client.submit(churn_abandon)
            elif not client.alive:
                server.kill()  # it would wait for connections that do not come
            complaints: list[str] = []
            for future in futures:
                with contextlib.suppress(WorkerGoneError):
                    complaints += future.result(_CHURN_LIMIT)
        finally:
            self._tally.opened(-1)
        if self._killed.is_set():
            return [line for line in complaints if not _allowed(line.partition(": ")[2])]
        if not (client.alive and server.alive):
            raise WorkerGoneError("a worker has died by itself")
        self._tally.add(churn.count, churn.size)
        return [f"{churn.address[0]} port {churn.address[1]}: {line}" for line in complaints]


def _allowed(text: str) -> bool:
    return text.startswith(_SURVIVES)


def _survivors(batch: Batch, ends: list[Outcome]) -> list[str]:
    """What was wrong at ends whose other end was killed: they may be cut short, no more."""
    return [
        f"connection {end.index} (port {batch.first_port + end.index}, "
        f"{batch.plans[end.index].name}, other end killed): {end.side} {end.error}"
        for end in ends
        if end.wrong or (end.error and not _allowed(end.error))
    ]


class Torture:
    """A run: made, started, watched and ended by :func:`torture`."""

    def __init__(self, bed: Bed, seed: int, fault: Fault) -> None:
        self.seed = seed
        self.tally = Tally()
        self.stop = threading.Event()
        self.generation = Generation(bed.pins, bed.cgroup, fault)
        self.lanes = [LaneThread(lane, bed, seed, self.tally, self.stop) for lane in LANES]
        self.disturber = Disturber(
            self.generation, seed, self.stop, self.tally, [lane.kill for lane in self.lanes]
        )

    def start(self) -> None:
        """Bring the generation up and let all go."""
        self.generation.up(TORTURED[-1])
        for lane in self.lanes:
            lane.start()
        for lane in self.lanes:
            lane.begun.wait(_BEGIN)
        self.disturber.start()

    def join(self, seconds: float) -> bool:
        """Wait for all threads; whether they ended in time."""
        threads = [thread for thread in (*self.lanes, self.disturber) if thread.ident]
        return wait_for(lambda: not any(thread.is_alive() for thread in threads), seconds)

    def end(self) -> None:
        """End whatever still runs, and the generation."""
        self.stop.set()
        for lane in self.lanes:
            lane.end()
        self.join(60.0)
        self.generation.close()


def torture(
    seconds: float,
    connections: int | None,
    seed: int,
    fault: Fault,
    watch: Callable[[float, Torture], None],
) -> Result:
    """Torture for so many seconds, or until so many connections have ended.

    Args:
        seconds: how long.
        connections: end earlier, after so many.
        seed: draws the plan.
        fault: planted in the data plane.
        watch: called every half second with the seconds gone and the run.

    Raises:
        UnderpassError: the surroundings cannot be made.
    """
    with Bed() as bed, contextlib.ExitStack() as undo:
        run = Torture(bed, seed, fault)
        undo.callback(_remove, run)
        undo.callback(run.end)
        run.start()
        began = time.monotonic()
        while not run.stop.wait(0.5):
            gone = time.monotonic() - began
            watch(gone, run)
            if gone >= seconds or (connections and run.tally.connections >= connections):
                run.stop.set()
        lasted = time.monotonic() - began
        if run.tally.errors:
            run.join(_GRACE)
        else:
            _finish(run)
        run.end()
        return _result(run, lasted)


def _finish(run: Torture) -> None:
    """Let all connections end, then see that nothing of them is left."""
    if not run.join(90.0):
        run.tally.fail(["lanes do not end"])
    if run.tally.errors:
        return
    run.tally.leaks += run.generation.leaks()
    run.tally.leaks += run.generation.down(10.0)
    if run.generation.live:
        run.tally.leaks.append("the generation does not drain though every connection is closed")


def _remove(run: Torture) -> None:
    """Take down whatever generation is left."""
    with contextlib.suppress(UnderpassError):
        remove_pins(run.generation.pins)


def _result(run: Torture, seconds: float) -> Result:
    tally, messages = run.tally, run.generation.messages()
    return Result(
        seed=run.seed,
        plan=schedule.digest(run.seed),
        seconds=round(seconds, 1),
        connections=tally.connections,
        bytes=tally.bytes,
        path_switches=path_switches(messages),
        messages={
            "shortcut": messages.pop("shortcut", 0),
            "tcp": messages,
        },
        disturbances=dict(tally.disturbances),
        killed=tally.killed,
        adopted=tally.adopted,
        woken=tally.woken,
        errors=tally.errors,
        leaks=tally.leaks,
    )
