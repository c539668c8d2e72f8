"""The reference's experiment on a node of a real cluster: two pods, qperf, without and with.

By `kubectl`, from wherever that works. The pods of default runs opt out by annotation, so that no
other pod of the node is touched. What carried a run is read from underpass's own pod there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from underpass.bench import qperf
from underpass.bench.compare import HALF, Mode, Moved, Outcome, Placement, Sample, schedule
from underpass.bench.processes import wait_for
from underpass.bench.programs import Measure
from underpass.bench.runner import Plan, moved
from underpass.bench.way import Reach
from underpass.errors import UnderpassError, Usage
from underpass.model import Counters
from underpass.pod import MARK

#: Has the reference's qperf, as `qperf` in PATH, and `sleep`.
IMAGE = "docker.io/testbed/perf:1"
NAMESPACE = "underpass-bench"
PORT = 19765
_AGENT = "app.kubernetes.io/name=underpass"
_CLIENT, _SERVER = "client", "server"
#: What the pods of a mode say of themselves.
MARKS = {Mode.DEFAULT: "off", Mode.SHORTCUT: "on"}
_START, _WARM = 120.0, 60.0


@dataclass(frozen=True)
class Kubectl:
    """kubectl against one cluster."""

    kubeconfig: Path | None = None

    def run(self, *arguments: str, stdin: str = "", seconds: float = 60) -> str:
        """Run it; what it printed.

        Raises:
            UnderpassError: it is not here, or it failed.
        """
        program = shutil.which("kubectl")
        if not program:
            raise UnderpassError("run", "kubectl", "it is not in PATH", "install it")
        where = ["--kubeconfig", str(self.kubeconfig)] if self.kubeconfig else []
        try:
            done = subprocess.run(
                [program, *where, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                start_new_session=True,  # Ctrl-C is for us: what tidies up runs to its end
            )
        except subprocess.TimeoutExpired:
            shown = " ".join(arguments)
            raise UnderpassError("run kubectl", shown, "no end", "see how the cluster is") from None
        if done.returncode:
            cause = " ".join((done.stderr or done.stdout).split())[-300:]
            step = "run it by hand to see"
            raise UnderpassError("run kubectl", " ".join(arguments), cause, step)
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """An object, or a list."""
        return dict(json.loads(self.run("get", *arguments, "-o", "json")))


@dataclass(frozen=True)
class Node(Placement):
    """Where the two pods are: any core of that node.

    Attributes:
        agent: namespace and name of underpass's pod there.
        about: what the API server says of the node.
    """

    name: str
    client_cpus: tuple[int, ...] = ()
    server_cpus: tuple[int, ...] = ()
    agent: tuple[str, str] = ("", "")
    about: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"two pods on node {self.name}"


def find_node(kubectl: Kubectl, name: str | None) -> Node:
    """The node of this name, or the first on which underpass is ready.

    Raises:
        UnderpassError: there is none, or underpass is not ready there.
    """
    pods = kubectl.get("pods", "--all-namespaces", "-l", _AGENT)["items"]
    ready = {pod["spec"]["nodeName"]: pod["metadata"] for pod in pods if _ready(pod)}
    chosen = name or next(iter(sorted(ready)), "")
    if chosen not in ready:
        cause = f"underpass is ready on {', '.join(sorted(ready)) or 'no node'}"
        raise UnderpassError("measure on node", name or "(any)", cause, "see docs/KUBERNETES.md")
    agent = ready[chosen]
    about = kubectl.get("node", chosen)
    return Node(chosen, agent=(agent["namespace"], agent["name"]), about=about)


def _ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", ())
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def objects(node: Node, image: str) -> list[dict[str, Any]]:
    """What is made: a namespace, and on the node a client and a server for either mode. Pure."""
    labels = {"app.kubernetes.io/managed-by": NAMESPACE}
    made: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
    ]
    hostname = node.about["metadata"]["labels"]["kubernetes.io/hostname"]
    for mode, mark in MARKS.items():
        for end, command in ((_SERVER, ["qperf"]), (_CLIENT, ["sleep", "1000000"])):
            container = {
                "name": "perf",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": command,
            }
            spec = {
                "nodeSelector": {"kubernetes.io/hostname": hostname},
                "tolerations": [{"operator": "Exists"}],
                "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": False,
                "containers": [container],
            }
            where = {
                "name": f"{mode.value}-{end}",
                "namespace": NAMESPACE,
                "labels": labels,
                "annotations": {MARK: mark},
            }
            made.append({"apiVersion": "v1", "kind": "Pod", "metadata": where, "spec": spec})
    return made


class Bed:
    """The pods, and underpass on their node."""

    def __init__(self, kubectl: Kubectl, node: Node, image: str) -> None:
        self.kubectl, self.node, self._image = kubectl, node, image
        self._servers: dict[Mode, str] = {}

    @contextmanager
    def made(self) -> Iterator[None]:
        """Make the pods; they go afterwards, whatever comes.

        Raises:
            UnderpassError: a pod does not start, or another benchmark is at work.
        """
        state = self.status()["state"]
        if state != "active":
            step = f"`{self.told('resume')}` if somebody paused it"
            raise UnderpassError("measure on node", self.node.name, f"it is {state} there", step)
        try:
            self.kubectl.run("create", "namespace", NAMESPACE)
        except UnderpassError as error:
            step = f"wait for it; if one was killed: kubectl delete namespace {NAMESPACE}"
            raise UnderpassError("make namespace", NAMESPACE, error.cause, step) from None
        try:
            made = {"apiVersion": "v1", "kind": "List", "items": objects(self.node, self._image)}
            self.kubectl.run("apply", "-f", "-", stdin=json.dumps(made))
            if not wait_for(self._running, _START):
                raise UnderpassError("start", "the pods", self._why(), "name another --image")
            yield
        finally:
            self.kubectl.run("delete", "namespace", NAMESPACE, "--wait=false")

    def _running(self) -> bool:
        pods = self.kubectl.get("pods", "-n", NAMESPACE)["items"]
        addresses = {p["metadata"]["name"]: p["status"].get("podIP", "") for p in pods}
        self._servers = {mode: addresses.get(f"{mode.value}-{_SERVER}", "") for mode in MARKS}
        return len(pods) == 2 * len(MARKS) and all(_ready(pod) for pod in pods)

    def _why(self) -> str:
        events = self.kubectl.get("events", "-n", NAMESPACE)["items"]
        warnings = [e["message"] for e in events if e.get("type") == "Warning"]
        return warnings[-1] if warnings else "no word of why"

    # -- underpass there ---------------------------------------------------------------------

    def _underpass(self, *arguments: str) -> str:
        namespace, name = self.node.agent
        return self.kubectl.run("exec", "-n", namespace, name, "--", "underpass", *arguments)

    def told(self, command: str) -> str:
        """How people run a command of underpass's there."""
        namespace, name = self.node.agent
        return f"kubectl exec -n {namespace} {name} -- underpass {command}"

    def status(self) -> dict[str, Any]:
        """What `underpass status` says."""
        return dict(json.loads(self._underpass("status", "--json")))

    def counters(self) -> Counters:
        """Totals of the node."""
        return Counters(**self.status()["counters"])

    # -- runs --------------------------------------------------------------------------------

    def run(self, mode: Mode, test: str, size: int, seconds: int) -> str:
        """Run qperf's client of a mode to its end."""
        argv = qperf.client(self._servers[mode], PORT, test, size, seconds)
        where = ("exec", "-n", NAMESPACE, f"{mode.value}-{_CLIENT}", "--")
        return self.kubectl.run(*where, *argv, seconds=seconds + 60)

    def warm(self) -> None:
        """Let qperf run until its program may take the shortcut.

        Raises:
            UnderpassError: it does not come to that; says where to look.
        """
        size, seconds, until = qperf.SIZES[3], 3, time.monotonic() + _WARM
        while time.monotonic() < until:
            before = self.counters().shortcut_messages_total
            said = self.run(Mode.SHORTCUT, "tcp_lat", size, seconds)
            carried = self.counters().shortcut_messages_total - before
            if carried > HALF * qperf.parse(said, size, seconds).messages:
                return
        step = f"see `{self.told('guard list')}`"
        cause = "its connections stay on TCP"
        raise UnderpassError("measure with", "qperf of this image", cause, step)

    def sample(self, measure: Measure, mode: Mode, number: int, seconds: int) -> Sample:
        """One run in one mode."""
        before = self.counters()
        said = self.run(mode, measure.test, int(measure.label), seconds)
        after = self.counters()
        found = moved(before, after)
        kept_out = after.refused_total["policy"] - before.refused_total["policy"]
        if mode is Mode.DEFAULT and kept_out:
            found = own_share(found)
        return Sample(mode, number, measure.parse(said), found)


def own_share(found: Moved) -> Moved:
    """What of the node's counters is of a run whose connections the policy kept out: nothing."""
    return replace(found, pairs=0, shortcut_messages=0, shortcut_bytes=0, small_streams=0)


def compare(bed: Bed, plan: Plan, done: Callable[[str], None]) -> list[Outcome]:
    """All rows of the plan, with the pods made."""
    outcomes = []
    for measure in plan.workload.measures(Reach(Path()), plan.seconds):
        row = measure.row(bed.node.name)
        samples = []
        for number, mode in schedule(tuple(MARKS), plan.rounds):
            samples.append(bed.sample(measure, mode, number, plan.seconds))
            done(f"{row}: {mode.value}")
        outcomes.append(Outcome(row, tuple(samples)))
    return outcomes


def machine(node: Node) -> dict[str, Any]:
    """The node, as reports describe a machine."""
    info, room = node.about["status"]["nodeInfo"], node.about["status"]["capacity"]
    memory = str(room.get("memory", "0Ki"))
    return {
        "cpu": f"node {node.name} ({info['osImage']}, {info['containerRuntimeVersion']})",
        "architecture": info["architecture"],
        "cores": int(room["cpu"]) if str(room["cpu"]).isdigit() else room["cpu"],
        "memory_mib": int(memory.removesuffix("Ki")) >> 10 if memory.endswith("Ki") else None,
        "kernel": info["kernelVersion"],
        "congestion_control": None,
    }


def refuse(options: Mapping[str, object], *, with_cluster: bool) -> None:
    """Options that make no sense with ``--kubernetes``, or none without it.

    Raises:
        Usage: one was given.
    """
    for name, value in options.items():
        if value and with_cluster:
            cause = "it is for namespaces on this machine"
            raise Usage("use", f"{name} with --kubernetes", cause, "leave it out")
        if value:
            raise Usage("use", name, "it is for a cluster", "say --kubernetes with it")
