"""underpass on a real Kubernetes node, from `kubectl apply` to `kubectl delete`.

The load's pods compare every byte that comes back and hold their connections; whether those take
the shortcut is read from the kernel, without the agent.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.agent.agents import measuring
from tests.kernel.kernel_objects import sock_ops_on
from tests.kernel.waiting import wait_until
from tests.kubernetes import cluster as beds
from tests.kubernetes.cluster import MANIFEST, PINS, Cluster, Load, by_shortcut, pod, service
from tests.pods.testbed import NODE, STATE
from underpass import calibration, dataplane, kubepods, namespaces, pinning
from underpass.agent.lock import place
from underpass.bench import kubernetes, qperf
from underpass.bench.compare import HALF, failures
from underpass.bench.processes import run_tool
from underpass.bench.runner import Plan
from underpass.bench.way import Reach
from underpass.bench.workloads import choose
from underpass.torture.kernel_objects import Object, pinned

pytestmark = pytest.mark.timeout(400)

#: The manifest as it is, but what a node keeps is kept in a directory of the test's own.
_AS_IT_IS = MANIFEST.read_text().replace(
    "path: /var/lib/underpass", f"path: {STATE}/underpass-state-{os.getpid()}"
)
#: And programs are not watched first, nothing is measured: the tests would wait for that.
_ADMITTING = _AS_IT_IS.replace("observe = 4", "admit_unknown = true").replace(
    "    [agent]", "    [agent]\n    calibrate = false"
)
_SERVER, _DATA = 19765, 19766


@pytest.fixture(scope="session")
def perf(cluster: Cluster) -> str:
    """The reference's two pods and a service before one of them; the server's address."""
    # without a probe: qperf sends urgent data when a client goes at once, which keeps it on TCP
    server = pod("perf-server", ["/bin/sh", "-c", "exec qperf"])
    client = pod("perf-client", ["/bin/sleep", "100000"])
    cluster.apply(server, client, service("perf-server", _SERVER, _DATA))
    cluster.ready("perf-client")
    address = cluster.ready("perf-server")
    table = ("exec", "perf-server", "--", "cat", "/proc/net/tcp", "/proc/net/tcp6")
    wait_until(lambda: f":{_SERVER:04X} " in cluster.kubectl(*table), "qperf listens")
    return address


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Iterator[Cluster]:
    """underpass, by the manifest, ready; gone afterwards."""
    cluster.kubectl("apply", "-f", "-", stdin=_ADMITTING)
    try:
        cluster.agent_ready()
        yield cluster
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "-f", str(MANIFEST), seconds=120)
        nothing_left()


@pytest.fixture(scope="module")
def loaded(installed: Cluster) -> Iterator[Load]:
    """Ten connections, all of them pairs."""
    with beds.load(installed) as load:
        load.goes_on()
        all_pairs(installed)
        yield load


def all_pairs(cluster: Cluster) -> None:
    """Wait until all connections of a load are pairs; else say what is known of the others."""
    try:
        wait_until(lambda: len(beds.to(7000)) == 10, "all connections are pairs")
    except AssertionError as error:
        with dataplane.opened(PINS) as planes:
            refused = dataplane.counters(planes).refused_total
        why = {reason: count for reason, count in refused.items() if count}
        told = [*beds.to(7000)], why, cluster.logs()
        raise AssertionError(f"{error}: {told}") from None


def nothing_left(objects: set[Object] | None = None) -> None:
    """No pin, no program on the pods' cgroup, and none of these objects in the kernel."""
    locked = pinning.lock(place(PINS))  # by the agent, to its end
    wait_until(lambda: not dataplane.places(PINS) and not locked.exists(), "all pins are gone")
    assert sock_ops_on(kubepods.find(namespaces.find_cgroup2())) == []
    wait_until(
        lambda: not any(each.exists() for each in objects or ()), "programs and maps are gone"
    )


@dataclass(frozen=True)
class Found:
    """What qperf says (microseconds or Mb/s), and the share that the shortcut carried."""

    figure: float
    carried: float


def measure(cluster: Cluster, address: str, test: str, size: int) -> Found:
    """Run qperf once between the two pods."""
    argv = qperf.client(address, _SERVER, test, size, 2)
    argv[1:1] = ["-ip", str(_DATA)]  # a service has named ports only
    before = beds.counters()
    said = cluster.kubectl("exec", "perf-client", "--", *argv)
    reading = qperf.parse(said, size, 2)
    moved = beds.counters() - before
    return Found(reading.figure, moved / reading.messages)


def kept(load: Load, disturb: str, act: Callable[[], object]) -> str:
    """Whatever ``act`` does, no connection breaks and open pairs stay on the shortcut; figures."""
    before, began = beds.to(7000), time.monotonic()
    assert len(before) == 10
    act()
    load.goes_on()
    after, seconds = beds.to(7000), time.monotonic() - began
    assert set(after) == set(before), disturb
    total = [0, 0]
    for name, pair in after.items():
        (shortcut, tcp), (shortcut0, tcp0) = beds.messages(pair), beds.messages(before[name])
        # some of them prove the path anew
        assert shortcut - shortcut0 > 4 * (tcp - tcp0), (disturb, pair, before[name])
        total = [total[0] + shortcut - shortcut0, total[1] + tcp - tcp0]
    return f"{disturb}: {seconds:.1f} s, by the shortcut {total[0]} messages, by TCP {total[1]}"


def test_the_manifest_as_it_is(
    cluster: Cluster, perf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One `kubectl apply`: ready, programs admitted after 4 s of running, and accelerated.

    Meanwhile it measures; deleted in the middle of that it leaves nothing of it either.
    """
    before = {test: measure(cluster, perf, test, 4096).figure for test in qperf.TESTS}
    started = time.monotonic()
    cluster.kubectl("apply", "-f", "-", stdin=_AS_IT_IS)
    made: list[Path] = []
    try:
        wait_until(lambda: beds.generation() == 1, "the data plane is up")
        live = time.monotonic() - started
        cluster.agent_ready()
        ready = time.monotonic() - started
        [start] = [line for line in cluster.logs() if line["event"] == "start"]
        made = wait_until(lambda: measuring(start["pid"]), "it measures")
        pods = kubepods.find(namespaces.find_cgroup2())
        assert sock_ops_on(pods)
        assert sock_ops_on(namespaces.find_cgroup2()) == []
        wait_until(
            lambda: measure(cluster, perf, "tcp_lat", 4096).carried > HALF, "accelerated", 60
        )
        fast = time.monotonic() - started
        after = {test: measure(cluster, perf, test, 4096) for test in qperf.TESTS}
        address = cluster.get("service", "perf-server")["spec"]["clusterIP"]
        after["ClusterIP tcp_lat"] = measure(cluster, address, "tcp_lat", 4096)
        for test, found in after.items():
            assert found.carried > 0.9, (test, found)
        told = {line["event"] for line in cluster.logs()}
        assert {"start", "up", "calibration-begins"} <= told
    finally:
        objects = pinned(PINS) if PINS.exists() else set()
        cluster.kubectl("delete", "-f", str(MANIFEST), seconds=120)
    nothing_left(objects)
    assert not any(path.exists() for path in made)
    figures = {test: found.figure for test, found in after.items()}
    with capsys.disabled():
        sys.stdout.write(
            f"\napply to live {live:.1f} s, to ready {ready:.1f} s, to accelerated {fast:.1f} s\n"
            f"default {before}\nshortcut {figures}\n"
        )


def in_agent(cluster: Cluster, *words: str) -> str:
    """Run `underpass` in the agent's container; what it prints."""
    there = ("exec", "-n", "underpass", "daemonset/underpass", "--", "underpass")
    return cluster.kubectl(*there, *words)


def calibrated(cluster: Cluster) -> dict[str, Any]:
    """What the agent tells of the node's calibration; empty: nothing yet."""
    told = (line for line in cluster.logs() if line["event"] == "calibrated")
    return next(told, {})


def test_restarts_and_a_rolling_upgrade(
    loaded: Load, installed: Cluster, long_run: bool, measured: Callable[[str], None]
) -> None:
    """The pod is deleted again and again, then image and size change: no connection notices.

    Nor does one notice that the node is measured before, in the agent's container. What was found
    is in force at once, and kept: later agents have it, too.
    """
    kept(loaded, "calibration", lambda: in_agent(installed, "calibrate", "--quick"))
    found = wait_until(lambda: calibrated(installed), "the agent puts it in force")
    with dataplane.Dataplane.open(PINS) as plane:
        assert plane.settings.small._asdict() == found["small"]
    assert "measured on " in in_agent(installed, "doctor")
    for count in range(10 if long_run else 3):
        old = installed.agent()["metadata"]

        def restart(name: str = old["name"], uid: str = old["uid"]) -> None:
            installed.kubectl("delete", "pod", "-n", "underpass", name, "--wait=false")
            installed.agent_ready(other_than=uid)

        began = time.time()
        figures = kept(loaded, f"restart {count + 1}", restart)
        measured(f"{figures}; {beds.milestones(installed.agent(), began)}")
    assert beds.generation() == 1
    later = wait_until(lambda: calibrated(installed), "the last agent tells")
    assert later["measured"] == found["measured"]
    old = installed.agent()["metadata"]

    def upgrade() -> None:
        other = _ADMITTING.replace("    [guard]", "    capacity = 5000\n    [guard]")
        other = re.sub(r"image: (.*):[0-9.]+\n", r"image: \1:latest\n", other)
        installed.kubectl("apply", "-f", "-", stdin=other)
        installed.agent_ready(other_than=old["uid"])
        wait_until(lambda: beds.generation() == 2, "the new generation is in charge")

    measured(kept(loaded, "rolling upgrade", upgrade))


def test_a_killed_agent_comes_back(loaded: Load, installed: Cluster) -> None:
    """A kill -9 of the agent changes no traffic; the kubelet starts another, which takes over."""

    def kill() -> None:
        start = next(line for line in installed.logs() if line["event"] == "start")
        os.kill(start["pid"], signal.SIGKILL)
        wait_until(
            lambda: installed.agent()["status"]["containerStatuses"][0]["restartCount"] == 1,
            "the kubelet starts it again",
        )
        installed.agent_ready()

    before = beds.generation()
    kept(loaded, "kill -9", kill)
    events = [line["event"] for line in installed.logs()]
    assert "running" in events
    assert beds.generation() == before


def test_an_api_server_that_goes_away(loaded: Load, installed: Cluster) -> None:
    """While it does not answer, an agent that is told to end leaves the data plane as it is."""
    start = next(line for line in installed.logs() if line["event"] == "start")
    process = installed.process("apiserver")
    before = beds.to(7000)
    os.kill(process, signal.SIGSTOP)
    try:
        os.kill(start["pid"], signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{start['pid']}").exists(), "the agent has ended", 60)
        assert PINS.exists()
        grown = beds.to(7000)
        assert set(grown) == set(before)
        wait_until(
            lambda: all(
                by_shortcut(pair) > by_shortcut(grown[name]) for name, pair in beds.to(7000).items()
            ),
            "all pairs go on by the shortcut without agent and API server",
        )
    finally:
        os.kill(process, signal.SIGCONT)
    kept(loaded, "the API server is back", installed.agent_ready)


def test_a_pod_and_a_namespace_opt_out(installed: Cluster) -> None:
    """By annotation, and by a namespace's label: TCP, which is explained; others are pairs.

    Open connections are taken in soon after the mark has gone, not at the next turn a minute later.
    """
    off = {"underpass.io/shortcut": "off"}
    meta = {"name": "slow", "labels": off}
    installed.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    with (
        beds.load(installed, 7002, connections=2, annotations=off) as by_pod,
        beds.load(installed, 7003, connections=2) as other,
        beds.load(installed, 7004, connections=2, namespace="slow") as by_namespace,
    ):
        wait_until(lambda: len(beds.to(7003)) == 2, "others are pairs")
        other.goes_on()
        assert all(by_shortcut(pair) for pair in beds.to(7003).values())
        for out, port in ((by_pod, 7002), (by_namespace, 7004)):
            out.goes_on()
            assert not any(by_shortcut(pair) for pair in beds.to(port).values())
            client = installed.get("pod", "-n", out.namespace, out.client)["status"]["podIP"]
            said = in_agent(installed, "explain", client, f"{out.server}:{port}")
            assert "policy" in said
        installed.kubectl("annotate", "pod", by_pod.client, "underpass.io/shortcut-")
        installed.kubectl("label", "namespace", "slow", "underpass.io/shortcut-")
        try:
            wait_until(
                lambda: all(
                    len(beds.to(port)) == 2 and all(map(by_shortcut, beds.to(port).values()))
                    for port in (7002, 7004)
                ),
                "they are taken in",
                30,
            )
        except AssertionError as late:
            told = [line for line in installed.logs() if line["event"] in ("adopted", "policy")]
            raise AssertionError(f"{late}\n{told}\n{in_agent(installed, 'adopt')}") from None
    installed.kubectl("delete", "namespace", "slow", "--wait=false")


def test_a_drop_rule_stops_a_running_stream(installed: Cluster) -> None:
    """As a NetworkPolicy does: within the interval of re-proof; without the rule it goes on."""
    with beds.load(installed, 7005, connections=2) as load:
        wait_until(lambda: len(beds.to(7005)) == 2, "both connections are pairs")
        load.goes_on()
        rule = ("INPUT", "-p", "tcp", "--dport", "7005", "-j", "DROP")
        iptables = ("ip", "netns", "exec", _netns_of(load.server), "iptables")
        run_tool([*iptables, "-A", *rule])

        def stands() -> bool:
            before = load.said()["messages"]
            time.sleep(1.5)  # it tells twice a second
            return bool(load.said()["messages"] == before)

        wait_until(stands, "the stream stops", 60)
        run_tool([*iptables, "-D", *rule])
        load.goes_on()


def _netns_of(address: str) -> str:
    """The network namespace of the pod with this address, as the runtime named it."""
    for netns in Path("/run/netns").glob("cni-*"):
        if f" {address}/" in run_tool(["ip", "-n", netns.name, "-4", "-o", "addr"]):
            return netns.name
    raise AssertionError(address)


def test_the_benchmark(installed: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of it: default runs stay on TCP, shortcut runs do not, by the kernel's counters."""
    monkeypatch.setenv("PATH", f"{installed.state}/bin:{os.environ['PATH']}")
    kubectl = kubernetes.Kubectl(installed.kubeconfig)
    node = kubernetes.find_node(kubectl, None)
    assert node.name == NODE
    qperfs = choose("qperf")
    few = [m for m in qperfs.measures(Reach(Path()), 1) if m.label == "1024"]
    workload = replace(qperfs, measures=lambda *_: few)
    bed = kubernetes.Bed(kubectl, node, kubernetes.IMAGE)
    with bed.made():
        bed.warm()
        outcomes = kubernetes.compare(bed, Plan(workload, (node,), 1, 1), lambda _: None)
    assert [outcome.row.test for outcome in outcomes] == list(qperf.TESTS)
    assert failures(outcomes) == []
    assert kubernetes.machine(node)["kernel"]
    wait_until(lambda: not _namespaces(installed) & {kubernetes.NAMESPACE}, "it is gone", 150)


def test_an_interrupted_benchmark_leaves_nothing(installed: Cluster) -> None:
    """Ctrl-C in the middle: one line, and its namespace goes."""
    command = [*("underpass", "bench", "--kubernetes"), "--kubeconfig", str(installed.kubeconfig)]
    environment = {**os.environ, "PATH": f"{beds.ROOT}/.venv/bin:{installed.state}/bin:/usr/bin"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as bench:
        wait_until(lambda: kubernetes.NAMESPACE in _namespaces(installed), "it has begun", 60)
        bench.send_signal(signal.SIGINT)
        said = bench.communicate(timeout=60)[1]
    assert bench.returncode == 130
    assert "SIGINT came; all it made is removed" in said
    # an old node may take minutes to end pods that had just begun
    wait_until(
        lambda: kubernetes.NAMESPACE not in _namespaces(installed, "Active"), "it is on its way out"
    )


def _namespaces(cluster: Cluster, phase: str = "") -> set[str]:
    found = cluster.get("namespaces")["items"]
    return {str(n["metadata"]["name"]) for n in found if phase in n["status"]["phase"]}


def test_deleted_under_load(loaded: Load, installed: Cluster) -> None:
    """`kubectl delete -f` drains: every byte arrives, and the kernel has nothing left of it."""
    objects = pinned(PINS)
    assert objects
    installed.kubectl("delete", "-f", str(MANIFEST), seconds=120)
    nothing_left(objects)
    loaded.goes_on()
    assert loaded.finish()["messages"] > 0


def test_by_helm(cluster: Cluster, helm: str) -> None:
    """`helm install` is as good; a node that loses the label is left; uninstall leaves nothing."""

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [helm, *arguments, "--kubeconfig", str(cluster.kubeconfig), "-n", "underpass"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    cluster.kubectl("delete", "--ignore-not-found", "-f", str(MANIFEST), seconds=120)
    chart = str(beds.ROOT / "deploy/helm/underpass")
    cluster.kubectl("label", "node", NODE, "underpass-test=yes")
    values = [
        "--set",
        "nodeSelector.underpass-test=yes",
        "--set",
        "config=[guard]\nadmit_unknown=true",
        "--set",
        "agent.calibrate=false",
    ]
    existed = calibration.PLACE.parent.exists()
    try:
        run("install", "underpass", chart, "--create-namespace", *values, "--wait", "--timeout=60s")
        objects = pinned(PINS)
        with beds.load(cluster) as load:
            load.goes_on()
            all_pairs(cluster)
            cluster.kubectl("label", "node", NODE, "underpass-test-")
            wait_until(lambda: not PINS.exists(), "the node is left", 60)
            load.goes_on()
            nothing_left(objects)
            cluster.kubectl("label", "node", NODE, "underpass-test=yes")
            cluster.agent_ready()
            objects = pinned(PINS)
            run("uninstall", "underpass", "--wait")
            wait_until(lambda: not PINS.exists(), "the data plane is down", 60)
            nothing_left(objects)
            load.finish()
    finally:
        cluster.kubectl("label", "node", NODE, "underpass-test-")
        cluster.kubectl("delete", "namespace", "underpass", "--ignore-not-found", seconds=120)
        if not existed:
            calibration.PLACE.parent.rmdir()
