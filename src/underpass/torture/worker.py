"""Processes that live in one network namespace and one cgroup and do what they are asked.

A socket belongs to the cgroup and the namespace its process is in when it is made, so a worker
enters both before it does anything else. It dies with whoever started it, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from underpass.torture.patience import patient

P = ParamSpec("P")
T = TypeVar("T")

CALL_DEADLINE = patient(60.0)
"""Seconds a call may take before it counts as hung."""
_Call = tuple[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Where a worker lives: a namespace of /run/netns and a directory of the cgroup-v2 tree."""

    netns: str
    cgroup: Path

    def enter(self) -> None:
        """Move the calling process (its only thread) there."""
        (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        with Path("/run/netns", self.netns).open("rb") as handle:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(handle.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.netns}")


def die_with(parent: int) -> None:
    """Let the calling process end as soon as `parent`, which has just made it, is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before that was asked
        os._exit(1)


class WorkerGoneError(Exception):
    """The worker process has ended."""


class Worker:
    """The commanding end of one worker process. It dies with the thread that made it.

    Args:
        place: where it lives.
        label: the last argument of its program, which tells it from others for the guard.
    """

    def __init__(self, place: Place, label: str = "worker") -> None:
        self.place = place
        self._connection, theirs = Pipe()
        self._pending: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._calls = 0
        self._gone = threading.Event()
        words = [str(theirs.fileno()), str(os.getpid()), label]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "underpass.torture.worker", *words],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._connection.send((place, sys.path))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process answers; it stops to a moment before it can be waited for."""
        return not self._gone.is_set()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `function` in a thread of the worker; the future gets its result."""
        future: Future[T] = Future()
        with self._lock:
            self._calls += 1
            self._pending[self._calls] = future
            try:
                self._connection.send((self._calls, function, args, kwargs))
            except OSError as error:
                self._gone.set()
                future.set_exception(WorkerGoneError(str(error)))
        return future

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in the worker; raises what it raises, TimeoutError when it hangs."""
        return self.submit(function, *args, **kwargs).result(CALL_DEADLINE)

    def kill(self) -> None:
        """End the process at once, as kill -9 does, and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        try:
            while True:
                number, result, error = self._connection.recv()
                future = self._pending.pop(number)
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        except (EOFError, OSError):
            self._gone.set()
            with self._lock:
                for future in self._pending.values():
                    if not future.done():
                        future.set_exception(WorkerGoneError(f"worker {self.pid} is gone"))


def _answer(connection: Connection[Any, Any], lock: threading.Lock, call: _Call) -> None:
    number, function, args, kwargs = call
    result, error = None, None
    try:
        result = function(*args, **kwargs)
    except BaseException as raised:  # noqa: BLE001 - handed to the caller, whatever it is
        error = raised
    with lock:
        connection.send((number, result, error))


def main() -> None:
    """Body of a worker process: enter the place, then answer calls until the commander is gone."""
    die_with(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's; the commander's to answer
        signal.signal(number, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    place: Place
    place, sys.path[:] = connection.recv()  # its functions come from where ours do
    place.enter()
    lock = threading.Lock()
    try:
        while True:
            arguments = (connection, lock, connection.recv())
            threading.Thread(target=_answer, args=arguments, daemon=True).start()
    except EOFError:
        os._exit(0)


if __name__ == "__main__":
    main()
