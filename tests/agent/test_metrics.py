"""What Prometheus is told is what `status` says, and is named as Prometheus wants it."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.agent.conftest import StartAgent
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.commands import DEADLINE, underpass
from tests.kernel.crowd import crowd_accept, crowd_answer, crowd_ask, crowd_connect
from tests.kernel.remote import couple, exchange
from tests.kernel.waiting import wait_until
from underpass import dataplane
from underpass.generation import PROGRAMS

PAIRS = 500
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")


@contextlib.contextmanager
def _counted_by_the_kernel() -> Iterator[None]:
    before = STATS.read_text()
    STATS.write_text("1")
    try:
        yield
    finally:
        STATS.write_text(before)


def _lint(text: str) -> subprocess.CompletedProcess[str]:
    promtool = shutil.which("promtool")
    assert promtool, "./dev test installs it"
    return subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )


def test_metrics_are_the_truth(bed: Bed, agent: StartAgent) -> None:
    """Claim: every figure of `status --json` is in /metrics, refusals and TCP reasons included."""
    running = agent(adopt="0")
    running.wait_ready()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    strange = bed.worker("client", outside=True), bed.worker("server")
    apart = couple(*strange, (SERVER4, 8081))
    exchange(*apart, 2)
    underpass(bed.pins, "pause").ok()
    exchange(near, far, 1)
    with _counted_by_the_kernel():
        exchange(near, far, 1)
        metrics = running.metrics()
    status = underpass(bed.pins, "status", "--json").document()
    counters = status["counters"]
    assert metrics["underpass_pairs_total"][()] == counters["pairs_total"] == 1
    assert metrics["underpass_open_pairs"][()] == status["open_pairs"] == 1
    assert metrics["underpass_capacity_pairs"][()] == status["capacity"]
    assert metrics["underpass_shortcut_bytes_total"][()] == counters["shortcut_bytes_total"] > 0
    messages = metrics["underpass_messages_total"]
    assert messages.pop(("shortcut", "shortcut")) == counters["shortcut_messages_total"] > 0
    assert {reason: n for (path, reason), n in messages.items() if path == "tcp"} == counters[
        "tcp_messages_total"
    ]
    assert messages["tcp", "paused"] > 0
    refused = metrics["underpass_connections_refused_total"]
    assert {reason: n for (reason,), n in refused.items()} == counters["refused_total"]
    assert sum(refused.values()) > 0
    assert metrics["underpass_generation_state"]["paused",] == 1
    assert sum(metrics["underpass_generation_state"].values()) == 1
    with dataplane.opened(bed.pins) as planes:
        known = len(planes[0].programs())
    assert sum(metrics["underpass_guard_programs"].values()) == known > 0
    assert metrics["underpass_map_entries"]["sockets",] == 2
    assert metrics["underpass_program_runs_total"]["1", "up_steer"] > 0
    assert metrics["underpass_program_run_seconds_total"]["1", "up_steer"] > 0
    assert {name for _, name in metrics["underpass_program_runs_total"]} == set(PROGRAMS)


def test_names_are_prometheus_own(bed: Bed, agent: StartAgent) -> None:
    """Claim: `promtool check metrics` finds nothing, up or down; it would find a wrong name."""
    running = agent(check="86400", adopt="0")
    running.wait_ready()
    with _counted_by_the_kernel():
        text = running.get("/metrics")[1]
    assert "underpass_program_runs_total" in text
    done = _lint(text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    underpass(bed.pins, "down").ok()
    absent = running.get("/metrics")[1]
    assert 'underpass_generation_state{state="absent"} 1.0' in absent
    done = _lint(absent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert _lint(text.replace("_pairs_total", "_pairs_counter")).returncode != 0


def test_slow_clients_do_not_keep_others_out(
    bed: Bed,  # noqa: ARG001 - the agent's
    agent: StartAgent,
) -> None:
    """Claim: clients that say nothing do not keep Prometheus and the kubelet waiting."""
    running = agent()
    running.wait_ready()
    host, _, port = running.wait("start")["listen"].rpartition(":")
    with contextlib.ExitStack() as held:
        for _ in range(30):
            held.enter_context(socket.create_connection((host, int(port))))
        assert running.get("/healthz")[0] == 200
        assert running.get("/metrics")[0] == 200
    assert running.get("/nothing")[0] == 404


def test_it_stays_small(bed: Bed, agent: StartAgent, measured: Callable[[str], None]) -> None:
    """Claim: with 500 pairs, scraped and adopting, the agent's memory never passed 64 MiB."""
    running = agent(adopt="0.3")
    running.wait_ready()
    server, client = bed.worker("server"), bed.worker("client")
    accepted = server.submit(crowd_accept, (SERVER4, 8080), PAIRS)
    wait_until(lambda: _listens(bed), "the server listens")
    client.call(crowd_connect, (SERVER4, 8080), PAIRS)
    accepted.result(DEADLINE)
    asked = client.submit(crowd_ask, 0, 0)
    assert server.call(crowd_answer, 0) == asked.result(DEADLINE) == PAIRS
    wait_until(lambda: running.metrics()["underpass_open_pairs"][()] == PAIRS, "all are pairs")
    passes = running.metrics()["underpass_adoption_passes_total"][()]
    wait_until(
        lambda: running.metrics()["underpass_adoption_passes_total"][()] > passes + 1, "it adopts"
    )
    text = Path(f"/proc/{running.process.pid}/status").read_text()
    [most] = re.findall(r"VmHWM:\s*(\d+) kB", text)
    measured(f"agent with {PAIRS} pairs: {int(most) / 1024:.0f} MiB at most")
    assert int(most) < 64 * 1024


def _listens(bed: Bed) -> bool:
    return ":8080 " in bed.within("server", "ss", "-Htln")
