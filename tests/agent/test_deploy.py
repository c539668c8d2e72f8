"""What is deployed beside the wheel: the unit of systemd and the dashboard of Grafana."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.agent.agents import Agent
from tests.agent.conftest import StartAgent
from tests.kernel.adopting import in_flight
from tests.kernel.bed import REPOSITORY, SERVER4, Bed
from tests.kernel.commands import DEADLINE, command
from tests.kernel.remote import couple, exchange
from tests.kernel.waiting import wait_until
from underpass import adoption

UNIT = REPOSITORY / "deploy/underpass.service"
DASHBOARD = REPOSITORY / "deploy/grafana/underpass.json"
#: Panels that rightly stay empty here, with so many queries: the kernel counts no runs unless it
#: is told to, and there are no pods.
EMPTY = {"Time of a program's run": 1, "Those who tell of pods": 3}


def _service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser["Service"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """Claim: systemd finds nothing wrong in the unit; it would find an unknown field."""
    program = Path(sys.executable).with_name("underpass")
    text = UNIT.read_text().replace("/usr/bin/underpass", str(program))

    def verify(text: str) -> tuple[int, str]:
        unit = tmp_path / "underpass.service"
        unit.write_text(text)
        words = ["systemd-analyze", "verify", "--man=no", str(unit)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert verify(text) == (0, "")
    assert "Unknown key" in verify(text.replace("WatchdogSec", "WatchdogSecs"))[1]


def test_the_units_privileges_are_enough(bed: Bed, agent: StartAgent) -> None:
    """Claim: with the unit's capabilities and no others the agent does all of its work."""
    held = _service()["CapabilityBoundingSet"].lower().replace("cap_", "").split()
    wanted = ",".join(["-all", *(f"+{name}" for name in held)])
    run = ["setpriv", f"--bounding-set={wanted}", "--no-new-privs"]
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    without = agent(inside=[*run[:1], f"{run[1]},-bpf,-sys_admin", *run[2:]])
    assert without.process.wait(DEADLINE) == 1
    wait_until(lambda: any("CAP_BPF" in line for line in without.lines), "it says what is missing")
    running = agent(inside=run)
    running.wait_ready()
    text = Path(f"/proc/{running.process.pid}/status").read_text()
    [effective] = re.findall(r"CapEff:\s*(\w+)", text)
    assert int(effective, 16).bit_count() == len(held)
    if adoption.possible():
        running.wait("adopted")
    exchange(near, far, 1)
    assert running.metrics()["process_resident_memory_bytes"][()] > 0
    assert not running.events("error")
    tried = subprocess.run(
        [*run, *command(bed.pins, "doctor", "--json")], capture_output=True, check=False
    )
    assert json.loads(tried.stdout)["ok"], tried.stdout  # the self-test's bed, too


class _Prometheus:
    """A Prometheus of the test's own that scrapes one agent every second."""

    def __init__(self, bed: Bed, directory: Path, running: Agent) -> None:
        program = shutil.which("prometheus")
        assert program, "./dev test installs it"
        target = running.wait("start")["listen"]
        config = directory / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\n"
            f"scrape_configs: [{{job_name: agent, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        self._log = (directory / "prometheus.log").open("w+")
        self._directory = directory
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        bed.undo.callback(self.close)
        self._port = wait_until(self._found_port, "Prometheus listens", 60)

    def _found_port(self) -> str:
        text = (self._directory / "prometheus.log").read_text()
        found = re.search(r"Listening on.*address=127\.0\.0\.1:(\d+)", text)
        return found.group(1) if found else ""

    def ask(self, query: str) -> list[Any]:
        """The result of an instant query."""
        at = f"http://127.0.0.1:{self._port}/api/v1/query?"
        url = at + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
                return found
        except urllib.error.HTTPError as error:
            if error.code != 503:  # it has not read its own files yet
                raise
            return []

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def test_every_query_of_the_dashboard_finds_data(
    bed: Bed, agent: StartAgent, tmp_path: Path
) -> None:
    """Claim: a real Prometheus answers each query with data, save one that is rightly empty."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    waiting = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8082))
    strange = bed.worker("client", outside=True), bed.worker("server")
    running = agent()
    staying = "underpass_adoption_staying_connections"
    with in_flight(waiting[0]):  # adoption has to leave it on TCP
        running.wait_ready()
        wait_until(lambda: staying in running.metrics(), "a pass of adoption leaves it on TCP")
    prometheus = _Prometheus(bed, tmp_path, running)
    wait_until(lambda: prometheus.ask("underpass_agent_ready == 1"), "it is scraped", 60)
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [
        (
            panel["title"],
            target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*"),
        )
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    assert len(queries) > 25
    names = set(re.findall(r"\bunderpass_\w+", " ".join(query for _, query in queries)))
    assert names >= {name for name in running.metrics() if name.startswith("underpass_")}

    silent: list[str] = []
    ports = iter(range(9000, 10000))

    def answered() -> bool:
        exchange(near, far, 1)
        for end in couple(*strange, (SERVER4, next(ports))):
            end.close()
        silent[:] = [f"{t}: {query}" for t, query in queries if not prometheus.ask(query)]
        return len(silent) == sum(EMPTY.values())

    try:
        wait_until(answered, "every query finds data", 30)
    except AssertionError:
        pytest.fail(f"no data for {silent}")
    assert Counter(line.partition(": ")[0] for line in silent) == EMPTY
