"""Processes in cgroups of the benchmark's own: started there, and ended by that membership."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from underpass.errors import UnderpassError

#: Joins the cgroup before the program runs, so that every socket of it belongs there.
_JOIN = 'echo $$ > "$0" && exec "$@"'
_LISTEN_STATE = "0A"


def alive(pid: int) -> bool:
    """Whether a process of this number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    """Ask ``done`` until it says yes or the time is over; whether it did."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def inside(netns: str) -> list[str]:
    """Words that run a command in a namespace; `ip -n` would remount /, which a chroot forbids."""
    return ["nsenter", f"--net=/run/netns/{netns}"]


def run_tool(argv: Sequence[str], stdin: str | None = None) -> str:
    """Run a set-up command and return what it printed.

    Raises:
        UnderpassError: it is not installed, or it failed.
    """
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        raise UnderpassError("run", argv[0], "it is not installed", "install it") from None
    except subprocess.TimeoutExpired:
        raise UnderpassError(
            "run", " ".join(argv), "no end after 30 s", "run it by hand to see"
        ) from None
    if done.returncode:
        cause = " ".join(done.stderr.split())[:200] or f"exit {done.returncode}"
        raise UnderpassError("run", " ".join(argv), cause, "run it by hand to see")
    return done.stdout


class Group:
    """A cgroup; what runs in it was started here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._children: list[subprocess.Popen[str]] = []
        self._below: dict[str, Group] = {}

    def __enter__(self) -> Group:
        try:
            self.path.mkdir()
        except OSError as error:
            raise UnderpassError(
                "make the cgroup", self.path, error.strerror or "?", "run as root"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for group in self._below.values():
            group.__exit__()
        remove_group(self.path)

    def below(self, name: str) -> Group:
        """The cgroup of this name below it, made at first use and removed with it."""
        if name not in self._below:
            self._below[name] = Group(self.path / name).__enter__()
        return self._below[name]

    def end(self) -> None:
        """End everything that runs here or below."""
        for group in self._below.values():
            group.end()
        end_members(self.path)
        for child in self._children:
            child.wait()
        self._children.clear()

    def cpu_seconds(self) -> float | None:
        """CPU time of what ran in it or below it, ended or not; None where cgroups do not tell."""
        try:
            words = (self.path / "cpu.stat").read_text().split()
        except OSError:
            return None
        told = dict(zip(words[::2], words[1::2], strict=True))
        return int(told["usage_usec"]) / 1e6 if "usage_usec" in told else None

    def spawn(
        self,
        argv: Sequence[str],
        netns: str | None,
        cpus: Sequence[int],
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program in this cgroup and stay its parent. Output goes to the file ``log``."""
        with log.open("a") as out:
            child = subprocess.Popen(
                self._command(argv, netns, cpus),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                text=True,
                start_new_session=True,
                env={**os.environ, **env} if env else None,
            )
        self._children.append(child)
        return child

    def run(
        self, argv: Sequence[str], netns: str | None, cpus: Sequence[int], seconds: float
    ) -> str:
        """Run a program to its end and return its standard output.

        Raises:
            UnderpassError: it failed, or had not ended after ``seconds``.
        """
        return self._finish(self._command(argv, netns, cpus), " ".join(argv), seconds)

    def run_joining(self, argv: Sequence[str], seconds: float) -> str:
        """The same for a program that joins the cgroup by itself, told where by one more word."""
        return self._finish([*argv, str(self.path / "cgroup.procs")], " ".join(argv), seconds)

    def _finish(self, command: Sequence[str], shown: str, seconds: float) -> str:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._children.append(child)
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise UnderpassError(
                "run", shown, f"no end after {seconds:.0f} s", "see whether its server answers"
            ) from None
        self._children.remove(child)
        if child.returncode:
            said = " ".join((err or out).split())[-200:]
            cause = said or f"exit {child.returncode}"
            raise UnderpassError("run", shown, cause, "run it by hand to see")
        return out

    def _command(self, argv: Sequence[str], netns: str | None, cpus: Sequence[int]) -> list[str]:
        enter = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
        pin = ["taskset", "-c", ",".join(map(str, cpus))]
        return ["sh", "-c", _JOIN, str(self.path / "cgroup.procs"), *enter, *pin, *argv]


def members(cgroup: Path) -> list[int]:
    """The processes in a cgroup; none when it does not exist."""
    try:
        return [int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def end_members(cgroup: Path) -> None:
    """End the processes of a cgroup that we made: asked first, then without asking."""
    for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        for pid in members(cgroup):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if wait_for(lambda: not members(cgroup), seconds):
            return


def remove_group(cgroup: Path) -> None:
    """Delete a cgroup that we made and ended everything in."""

    def gone() -> bool:
        # Its last process may be on its way out still, after it has left the list.
        with suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    wait_for(gone, 2.0)


def listens(pid: int, port: int) -> bool:
    """Whether something listens at a TCP port in the network namespace of a process."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN_STATE and fields[1].endswith(f":{port:04X}"):
                return True
    return False
