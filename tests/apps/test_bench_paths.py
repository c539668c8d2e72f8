"""The benchmark's paths: every one with real programs, each what its name says, and gone after."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.apps.test_bench import bench
from tests.kernel.bed import BPFFS, NETNS, cgroup2, inside, run
from tests.kernel.commands import DEADLINE, command, finish, start, underpass, underpass_where
from tests.kernel.waiting import wait_until
from underpass.bench import bed as beds
from underpass.bench import qperf
from underpass.bench.compare import Mode, Placement
from underpass.bench.processes import alive, members
from underpass.bench.runner import Stage
from underpass.bench.way import SERVER_ADDRESS, Way
from underpass.dataplane import DEFAULT_PINS

PATHS = ("bridge", "ipv6", "iptables:500", "ovs")
_PORT = 19790


@pytest.mark.parametrize("path", PATHS)
def test_a_comparison_by_every_path(path: str, tmp_path: Path) -> None:
    """Claim: default runs take the path by its own counter, shortcut runs the shortcut."""
    page = tmp_path / "page.html"
    words = ("--workload", "nginx", "--path", path, "--report", str(page))
    told = bench(*words)
    assert told["ok"]
    assert told["path"] == str(Way.parse(path))
    assert told["path"] in page.read_text()
    for row in told["rows"]:
        by_mode = {run["mode"]: run for run in row["runs"]}
        default, shortcut = by_mode["default"], by_mode["shortcut"]
        assert default["counters"]["path_packets"] >= default["volume"]["amount"] / 2**17
        assert default["counters"]["pairs"] == 0
        assert shortcut["counters"]["pairs"] > 0
        assert shortcut["carried"] > 0.5
        # What is carried past the path is no packet on it.
        fewer = shortcut["volume"]["amount"] / default["volume"]["amount"]
        assert shortcut["counters"]["path_packets"] < fewer * default["counters"]["path_packets"]


@contextmanager
def laid(path: str) -> Iterator[beds.Bed]:
    """A path with nothing on it, taken away again."""
    beds.sweep(cgroup2())
    with beds.Bed(cgroup2(), Way.parse(path)) as here:
        yield here
    assert _left(os.getpid()) == []


def _packets(here: beds.Bed, address: str) -> int:
    """What the path's counter says of one qperf run by this address."""
    core = min(os.sched_getaffinity(0))
    stage = Stage(here, Placement("one-core", (core,), (core,)))
    if not members(here.default.path):
        stage.serve(Mode.DEFAULT, qperf.server(_PORT), _PORT)
    before = here.passed()
    stage.client(Mode.DEFAULT, qperf.client(address, _PORT, "tcp_lat", 64, 1), 1)
    return here.passed() - before


def test_rules_are_all_there_and_the_service_is_the_way() -> None:
    """Claim: every packet meets all rules; who does not use the service address is not counted."""
    with laid("iptables:500") as here:
        switch = (*inside(here.client_netns.removesuffix("a") + "sw"), "iptables", "-nvxL")
        rules = run(*switch, "UNDERPASS-FORWARD").splitlines()[2:]
        assert len(rules) == 500
        assert _packets(here, here.reach.server) > 1000
        jump = int(run(*switch, "FORWARD").splitlines()[2].split()[0])
        assert jump >= here.passed() > 1000
        assert _packets(here, SERVER_ADDRESS) == 0
        again = int(run(*switch, "FORWARD").splitlines()[2].split()[0])
        assert again > jump + 1000  # the other way met the rules too, so 0 is the service's


def test_no_ipv4_by_the_way_of_ipv6() -> None:
    """Claim: both ends have IPv6 addresses alone, and connections are counted as IPv6."""
    with laid("ipv6") as here:
        for netns in (here.client_netns, here.server_netns):
            assert run(*inside(netns), "ip", "-4", "addr", "show", "dev", "eth0") == ""
        assert _packets(here, here.reach.server) > 1000


def test_open_vswitch_is_our_own() -> None:
    """Claim: packets are flows of a user-space switch that runs in our cgroup, in our directory."""
    with laid("ovs") as here:
        aside = members(here.cgroup / "aside")
        names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in aside}
        assert names == {"ovsdb-server", "ovs-vswitchd"}
        database = ("ovs-vsctl", f"--db=unix:{here.directory}/ovs/db.sock")
        assert run(*database, "get", "bridge", "br0", "datapath_type") == "netdev\n"
        assert _packets(here, here.reach.server) > 1000
        before = here.passed()
        assert here.passed() - before < 10  # ARP at most: idle is not counted


def _left(pid: int) -> list[str]:
    """What a benchmark's process left behind."""
    names = (f"underpass-bench-{pid}", *(f"up-bench-{pid}-{part}" for part in ("a", "b", "sw")))
    places = (cgroup2(), BPFFS, NETNS, Path(tempfile.gettempdir()))
    return [str(place / name) for place in places for name in names if (place / name).exists()]


def _forwarding(process: subprocess.Popen[str]) -> Callable[[], list[int]]:
    """The pids of the switch's programs once a benchmark has come so far that servers run."""
    cgroup = cgroup2() / f"underpass-bench-{process.pid}"

    def ready() -> list[int]:
        assert process.poll() is None, process.communicate()
        return members(cgroup / "aside") if members(cgroup / "shortcut") else []

    return ready


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_switch_goes_with_its_benchmark(number: signal.Signals) -> None:
    """Claim: Ctrl-C and SIGTERM undo all; after a kill the next benchmark does."""
    process = start(command(DEFAULT_PINS, "bench", "--workload", "iperf3", "--path", "ovs"))
    try:
        pids = wait_until(_forwarding(process), "the benchmark runs")
        assert len(pids) == 2
        assert _left(process.pid)
        process.send_signal(number)
        done = finish(process)
    finally:
        process.kill()
        process.wait(DEADLINE)
        left = _left(process.pid)
        swept = beds.sweep(cgroup2())
    if number is signal.SIGKILL:
        assert left
        assert process.pid in swept
    else:
        assert (done.code, left) == (130 if number is signal.SIGINT else 1, [])
        assert f"{number.name} came; all it made is removed" in done.err
    assert _left(process.pid) == []
    wait_until(lambda: not any(map(alive, pids)), "its switch's programs are gone")


@pytest.mark.parametrize(
    ("path", "program", "package"),
    [
        ("ovs", "ovs-vswitchd", "openvswitch-switch"),
        ("ovs", "ethtool", "ethtool"),
        ("iptables:5", "iptables-restore", "iptables"),
    ],
)
def test_what_is_missing_is_named(path: str, program: str, package: str) -> None:
    """Claim: without a path's program nothing is made, and one line tells what to install."""
    hide = f'mount --bind /dev/null "$(readlink -f "$(command -v {program})")"'
    words = ("bench", "--workload", "iperf3", "--path", path)
    done = underpass_where(DEFAULT_PINS, hide, *words)
    done.failed(1, f"{program} is not here; run `apt-get install {package}`")


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "--path", "iptables:20001"),
        ("bench", "--path", "tun"),
        ("bench", "--path", "ipv6", "--naive"),
        ("bench", "--path", "iptables:5", "--naive"),
        ("calibrate", "--path", "ipv6"),
    ],
)
def test_what_a_path_cannot_is_a_usage_error(words: tuple[str, ...]) -> None:
    """Claim: it is refused in one line before anything is made."""
    underpass(DEFAULT_PINS, *words).failed(2, "--path", ": ", "; ")
