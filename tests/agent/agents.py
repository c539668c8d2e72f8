"""The agent as its users run it: a process of its own, on the bed's cgroup and pins."""

from __future__ import annotations

import http.client
import json
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.kernel.bed import BPFFS, Bed, cgroup2
from tests.kernel.commands import DEADLINE, command
from tests.kernel.waiting import wait_until
from underpass.agent.lock import place
from underpass.kept import DIRECTORY

#: Quick looks, no measuring, a port of its own.
USUAL = {"listen": '"127.0.0.1:0"', "calibrate": "false", "check": "0.2", "adopt": "0.5"}


class Agent:
    """One process of `underpass agent`; killed when the test ends."""

    def __init__(
        self,
        bed: Bed,
        directory: Path,
        *words: str,
        inside: Sequence[str] = (),
        top: str = "",
        **options: str,
    ) -> None:
        self.config = directory / "agent.toml"
        self.write(top, **options)
        arguments = ["agent", "--config", str(self.config), "--cgroup", str(bed.cgroup), *words]
        self.process = subprocess.Popen(
            [*inside, *command(bed.pins, *arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        bed.undo.callback(remove_lock, bed.pins)
        bed.undo.callback(self.kill)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def write(self, top: str = "", **options: str) -> None:
        """Write its configuration file."""
        fields = "\n".join(f"{k} = {v}" for k, v in {**USUAL, **options}.items())
        self.config.write_text(f"{top}\n[guard]\nadmit_unknown = true\n[agent]\n{fields}\n")

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it has told so far of one kind."""
        told = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in told if event["event"] == name]

    def wait(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait until it has told so many of one kind; the last of them."""

        def told() -> list[dict[str, Any]]:
            found = self.events(name)
            return found if len(found) >= count else []

        return wait_until(told, f"the agent tells {name} ({count})")[count - 1]

    def wait_ready(self) -> None:
        """Wait until `/readyz` says so."""
        wait_until(lambda: self.get("/readyz")[0] == http.client.OK, "the agent is ready")

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page."""
        host, _, port = self.wait("start")["listen"].rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Value by labels by the name of the sample."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return found

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """End it as systemd and the kubelet do; its exit code."""
        self.tell(signal.SIGTERM)
        return self.process.wait(DEADLINE)

    def kill(self) -> None:
        """Kill it, if it is still there."""
        self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE)
        if self.process.stderr:
            self.process.stderr.close()


def measuring(agent: int) -> list[Path]:
    """Cgroup and pins of the calibration that an agent has started; empty: not both are there."""
    children = Path(f"/proc/{agent}/task").glob("*/children")
    for pid in (word for path in children for word in path.read_text().split()):
        made = [place / f"underpass-bench-{pid}" for place in (cgroup2(), BPFFS)]
        if all(path.exists() for path in made):
            return made
    return []


def remove_lock(pins: Path) -> None:
    """What a killed agent leaves for the next one."""
    for kept in DIRECTORY.glob(f"*-{pins.name}.json"):
        kept.unlink()
    lock = place(pins).with_name(f"{place(pins).name}-lock")
    if lock.is_dir():
        lock.rmdir()


class Systemd:
    """The socket that systemd would listen on; read at once, since few datagrams may wait."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._said: queue.Queue[str] = queue.Queue()
        self._listening = threading.Thread(target=self._listen)
        self._listening.start()
        self.told: list[str] = []

    def _listen(self) -> None:
        while said := self._socket.recv(4096).decode():
            self._said.put(said)

    def wait(self, word: str) -> str:
        """The next datagram that begins so."""
        while True:
            said = self._said.get(timeout=DEADLINE)
            self.told.append(said)
            if said.startswith(word):
                return said

    def close(self) -> None:
        """Listen no more."""
        self._socket.shutdown(socket.SHUT_RD)
        self._listening.join()
        self._socket.close()
