"""The benchmark with real programs, for one short round: that it runs, not what it finds."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

from tests.kernel.bed import BPFFS, cgroup2
from tests.kernel.commands import DEADLINE, command
from underpass.dataplane import DEFAULT_PINS


def bench(*words: str) -> dict[str, Any]:
    argv = command(DEFAULT_PINS, "bench", "--json", "--rounds", "1", *words)
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = child.communicate(timeout=DEADLINE)
    finally:
        child.send_signal(signal.SIGINT)  # lets a late one clear up; nothing to one that has ended
        child.wait(DEADLINE)
    assert child.returncode == 0, err
    for place in (cgroup2(), BPFFS):
        assert not (place / f"underpass-bench-{child.pid}").exists()
    return dict(json.loads(out))


def test_many_connections_at_once() -> None:
    """Claim: every number of connections has a rate and percentiles, by both ways."""
    told = bench("--workload", "parallel", "--size", "512")
    assert told["settings"]["size"] == 512
    assert [row["label"].split()[0] for row in told["rows"]] == ["1", "4", "16", "64", "256"]
    for row in told["rows"]:
        for mode in ("default", "shortcut"):
            also = row["also"][mode]
            assert row[mode]["median"] > 0
            assert also["p50_us"]["median"] <= also["p99_us"]["median"]
            assert also["p99_us"]["median"] <= also["p99.9_us"]["median"]
            assert also["cpu_seconds_per_gigabyte"]["median"] > 0


def test_idle_pairs() -> None:
    """Claim: pairs that stand idle are held by both ways, and each way's memory is told."""
    told = bench("--workload", "idle", "--pairs", "300")
    (row,) = told["rows"]
    assert told["settings"]["pairs"] == 300
    assert row["label"] == "300 idle pairs"
    for run in row["runs"]:
        assert set(run["also"]) == {"slab_bytes_per_pair", "tcp_bytes_per_pair"}
        assert run["counters"]["pairs"] == (300 if run["mode"] == "shortcut" else 0)


def test_the_naive_column() -> None:
    """Claim: `--naive` runs a third way, redirected by the bypass alone, and nothing else by it."""
    told = bench("--workload", "redis", "--naive")
    assert told["settings"]["naive"] is True
    for row in told["rows"]:
        by_mode = {run["mode"]: run["counters"] for run in row["runs"]}
        for mode, counters in by_mode.items():
            assert (counters["naive_messages"] > 0) == (mode == "naive")
            assert (counters["shortcut_messages"] > 0) == (mode == "shortcut")
        assert ("naive" in by_mode) != bool(row["naive_broken"])
