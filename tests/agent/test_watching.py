"""`top` in a real terminal, and `bugreport`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tarfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.conftest import StartAgent
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.commands import DEADLINE, command, underpass
from tests.kernel.remote import couple, exchange
from tests.kernel.waiting import wait_until

ADDRESS = (SERVER4, 8080)
SECRETS = {
    "environment": "env-secret-5519",
    "command": "cmd-secret-7731",
    "config": "cfg-secret-1187",
    "log": "log-secret-9923",
    "payload": "pay-secret-4410",
}


class _Terminal:
    """A terminal of some columns and lines with one program in it."""

    def __init__(self, words: list[str], columns: int, lines: int, kind: str = "xterm") -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": kind}
        )
        self.shown = ""

    def wait(self, text: str) -> None:
        """Wait until something is shown; what was shown before does not count afterwards."""

        def seen() -> bool:
            while select.select([self.ours], [], [], 0)[0]:
                self.shown += os.read(self.ours, 65536).decode(errors="replace")
            return text in self.shown

        wait_until(seen, f"the terminal shows {text!r}")
        self.shown = self.shown.rpartition(text)[2]

    def press(self, key: str) -> None:
        """Press a key."""
        os.write(self.ours, key.encode())

    def as_it_was(self) -> bool:
        """Whether the terminal's settings are those from before."""
        return termios.tcgetattr(self._theirs) == self.before

    def close(self) -> None:
        """End the program and the terminal."""
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self._theirs)


@contextlib.contextmanager
def _terminal(
    words: list[str], columns: int, lines: int, kind: str = "xterm"
) -> Iterator[_Terminal]:
    with contextlib.closing(_Terminal(words, columns, lines, kind)) as terminal:
        yield terminal


def test_top_in_terminals(bed: Bed) -> None:
    """Claim: it shows pairs, sorts, goes to pods, ends with `q`, and leaves the terminal whole."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    exchange(*couple(bed.worker("client"), bed.worker("server"), ADDRESS), 1)
    for columns, lines in ((160, 24), (40, 8)):
        words = command(bed.pins, "top", "--interval", "0.2")
        with _terminal(words, columns, lines) as terminal:
            terminal.wait("1 open pair,")
            terminal.wait("RATE*")
            terminal.wait("8080" if columns > 100 else "~")
            terminal.press("s")
            terminal.wait("MSGS/S*")
            terminal.press("p")
            terminal.wait(bed.netns["client"] if columns > 100 else "q quit")
            terminal.press("q")
            assert terminal.process.wait(DEADLINE) == 0
            assert terminal.as_it_was()
    bed.kill_workers()
    underpass(bed.pins, "down").ok()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_top_that_is_ended(bed: Bed, number: signal.Signals) -> None:
    """Claim: whatever signal ends it, the terminal is as it was, with its cursor and its text."""
    with _terminal(command(bed.pins, "top"), 80, 24) as terminal:
        terminal.wait("q quit")
        terminal.process.send_signal(number)
        terminal.wait("\x1b[?25h")
        terminal.wait("\x1b[?1049l")
        assert terminal.process.wait(DEADLINE) == (130 if number is signal.SIGINT else -number)
        assert terminal.as_it_was()


def test_top_in_a_terminal_that_is_too_simple(bed: Bed) -> None:
    """Claim: where no cursor can be moved, `top` says what to do instead."""
    with _terminal(command(bed.pins, "top"), 80, 24, "dumb") as terminal:
        terminal.wait("--once")
        assert terminal.process.wait(DEADLINE) == 2


def test_top_without_a_terminal(bed: Bed) -> None:
    """Claim: `--once` prints a picture into a pipe; without it that is a usage error of a line."""
    assert (
        underpass(bed.pins, "top", "--once", "--interval", "0.1")
        .ok()
        .out.startswith("underpass is not up")
    )
    underpass(bed.pins, "top").failed(2, "--once")
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    shown = underpass(bed.pins, "top", "--once", "--interval", "0.1", "--sort", "total").ok().out
    head, titles, row = shown.splitlines()
    assert head.startswith("1 open pair,")
    assert "TOTAL*" in titles
    assert f"{SERVER4}:8080 {bed.netns['server']}" in row
    assert "shortcut" in row
    pods = underpass(bed.pins, "top", "--once", "--interval", "0.1", "--pods").ok().out
    assert pods.splitlines()[2].split()[:3] == [bed.netns["client"], bed.netns["server"], "1"]
    bed.kill_workers()
    underpass(bed.pins, "down").ok()


def test_a_bugreport_tells_no_secrets(bed: Bed, agent: StartAgent, tmp_path: Path) -> None:
    """Claim: an archive holds what is needed, and none of the secrets that surround it.

    `guard list` does show one of them, so they are where they could be found.
    """
    running = agent()
    running.wait_ready()
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    near.worker.call(_send_text, near.number, SECRETS["payload"])
    served = (
        f"'{SECRETS['command']}'; import socket; s=socket.create_server(('127.0.0.1', 0)); "
        "c=socket.create_connection(s.getsockname()); s.accept(); print('up', flush=True); input()"
    )
    enter = f'echo $$ > {bed.cgroup}/cgroup.procs; exec "$@"'
    strange = subprocess.Popen(
        ["sh", "-c", enter, "sh", sys.executable, "-c", served],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "API_TOKEN": SECRETS["environment"]},
    )
    with strange:
        assert strange.stdout
        assert strange.stdout.readline() == b"up\n"
        assert SECRETS["command"] in underpass(bed.pins, "guard", "list", "--json").ok().out
        config = tmp_path / "report.toml"
        config.write_text(f"# password = {SECRETS['config']}\ncapacity = 77\n")
        logs = tmp_path / "agent.log"
        logs.write_text(
            "\n".join([*running.lines, f'{{"token": "{SECRETS["log"]}", "event": "strange"}}'])
        )
        archive = tmp_path / "report.tar.gz"
        words = ("--output", archive, "--config", config, "--logs", logs)
        environment = os.environ.get("API_TOKEN")
        os.environ["API_TOKEN"] = SECRETS["environment"]
        try:
            underpass(bed.pins, "bugreport", *words).ok()
        finally:
            os.environ.pop("API_TOKEN")
            assert environment is None
        strange.kill()
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as packed:
        parts = {
            Path(member.name).name: file.read().decode()
            for member in packed
            if (file := packed.extractfile(member))
        }
    everything = "".join(parts.values())
    assert [kind for kind, secret in SECRETS.items() if secret in everything] == []
    assert '"capacity": 77' in parts["config.json"]
    assert '"state": "active"' in parts["status.json"]
    assert str(ADDRESS[1]) in parts["connections.json"]
    assert "listeners" in parts["reasons.json"]
    assert "up_steer" in parts["generations.json"]
    assert '"verdict"' in parts["guard.json"]
    assert "self-test" in parts["doctor.json"]
    assert '"event": "up"' in parts["logs.txt"]
    assert '"event": "strange"' in parts["logs.txt"]
    assert not any("cannot be had" in text for n, text in parts.items() if n != "metrics.txt")


def _send_text(number: int, text: str) -> None:
    from tests.kernel.remote import _SOCKETS  # noqa: PLC0415 - the worker's own

    _SOCKETS[number].sendall(text.encode())
