"""What tests do with a real Kubernetes node, and with underpass on it."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.kernel.waiting import wait_until
from tests.pods.testbed import STATE
from underpass import dataplane
from underpass.errors import NotLoaded, UnderpassError
from underpass.model import Pair

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PINS = dataplane.DEFAULT_PINS
MANIFEST = ROOT / "deploy/underpass.yaml"
IMAGE = "docker.io/underpass/underpass"


class Cluster:
    """One node that runs."""

    def __init__(self, k8s: Path) -> None:
        self.k8s = k8s
        self.state = STATE
        self.kubeconfig = self.state / "admin.kubeconfig"

    def run(self, *arguments: str, stdin: str | None = None, seconds: float = 90) -> str:
        """Run the script; its output. AssertionError if it fails."""
        done = subprocess.run(
            [self.k8s, *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}{done.stdout}"
        return done.stdout

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 90) -> str:
        """Run kubectl; its output."""
        return self.run("kubectl", *arguments, stdin=stdin, seconds=seconds)

    def get(self, *arguments: str) -> dict[str, Any]:
        """An object, or a list."""
        return dict(json.loads(self.kubectl("get", *arguments, "-o", "json")))

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply objects."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(_list(objects)))

    def delete(self, *objects: dict[str, Any]) -> None:
        """Delete pods, at once and without waiting."""
        arguments = ("--ignore-not-found", "--wait=false", "--force", "--grace-period=0")
        self.kubectl("delete", *arguments, "-f", "-", stdin=json.dumps(_list(objects)))

    def ready(self, name: str, namespace: str = "default") -> str:
        """Wait until the pod is ready; its address."""

        def address() -> str:
            status = self.get("pod", "-n", namespace, name)["status"]
            there = any(c["type"] == "Ready" and c["status"] == "True"
                        for c in status.get("conditions", ()))  # fmt: skip
            return str(status["podIP"]) if there else ""

        return wait_until(address, f"pod {name} is ready", 60)

    def process(self, name: str) -> int:
        """The number of one of the cluster's own processes."""
        return int((self.state / "pid" / name).read_text())

    # -- underpass on it --------------------------------------------------------------------

    def agent(self) -> dict[str, Any]:
        """The pod of the agent that is not on its way out."""
        pods = self.get("pods", "-n", "underpass", "-l", "app.kubernetes.io/name=underpass")
        live = [p for p in pods["items"] if "deletionTimestamp" not in p["metadata"]]
        return dict(live[0]) if live else {}

    def agent_ready(self, other_than: str = "") -> str:
        """Wait for an agent that is ready, and no older one; its uid."""

        def uid() -> str:
            pod = self.agent()
            states = pod.get("status", {}).get("containerStatuses", ())
            uid = str(pod.get("metadata", {}).get("uid", ""))
            return uid if uid != other_than and any(s["ready"] for s in states) else ""

        # an old kubelet that misses the end of a pod looks again after a minute
        return wait_until(uid, "the agent is ready", 150)

    def logs(self) -> list[dict[str, Any]]:
        """What the agent tells."""
        text = self.kubectl("logs", "-n", "underpass", self.agent()["metadata"]["name"])
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _list(objects: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


def pod(
    name: str,
    argv: list[str],
    *,
    image: str = "docker.io/testbed/perf:1",
    namespace: str = "default",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    port: int = 0,
) -> dict[str, Any]:
    """A pod of an ordinary user, on the node; with a port it is ready when it listens there."""
    container: dict[str, Any] = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "Never",
        "command": argv,
        "securityContext": {"runAsUser": 1000, "allowPrivilegeEscalation": False},
    }
    if port:
        container["readinessProbe"] = {"tcpSocket": {"port": port}, "periodSeconds": 1}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app": name, **(labels or {})},
            "annotations": annotations or {},
        },
        "spec": {
            "terminationGracePeriodSeconds": 5,
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "containers": [container],
        },
    }


def service(name: str, *ports: int) -> dict[str, Any]:
    """A ClusterIP service before the pod of this name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "selector": {"app": name},
            "ports": [{"name": f"p{port}", "port": port} for port in ports],
        },
    }


def milestones(pod: dict[str, Any], began: float) -> str:
    """When a pod was made, its container ran, and it was ready: in seconds after a moment."""
    status = pod["status"]
    [container] = status["containerStatuses"]
    ready = next(c for c in status["conditions"] if c["type"] == "Ready")
    moments = {
        "made": pod["metadata"]["creationTimestamp"],
        "runs": container["state"]["running"]["startedAt"],
        "ready": ready["lastTransitionTime"],
    }
    after = {k: datetime.fromisoformat(v).timestamp() - began for k, v in moments.items()}
    return ", ".join(f"{name} after {seconds:.0f} s" for name, seconds in after.items())


# -- the data plane, looked at from the node, without the agent -------------------------------


def pairs() -> dict[str, Pair]:
    """The open pairs by the client's address; none while nothing is up."""
    with contextlib.suppress(NotLoaded), dataplane.opened(PINS) as planes:
        return {str(pair.client): pair for plane in planes for pair in plane.pairs()}
    return {}


def to(port: int) -> dict[str, Pair]:
    """Those whose server is at this port."""
    return {name: pair for name, pair in pairs().items() if str(pair.server).endswith(f":{port}")}


def by_shortcut(pair: Pair) -> int:
    """Bytes that both directions have sent by the shortcut."""
    return pair.client_to_server.shortcut_bytes + pair.server_to_client.shortcut_bytes


def messages(pair: Pair) -> tuple[int, int]:
    """Messages that both directions have sent by the shortcut, and by TCP."""
    ways = (pair.client_to_server, pair.server_to_client)
    return sum(w.shortcut_messages for w in ways), sum(w.tcp_messages for w in ways)


def counters() -> int:
    """Messages that went by the shortcut so far; 0 while nothing is up."""
    with contextlib.suppress(NotLoaded), dataplane.opened(PINS) as planes:
        return int(dataplane.counters(planes).shortcut_messages_total)
    return 0


def generation() -> int:
    """The number of the generation in charge; 0: there is none."""
    with contextlib.suppress(UnderpassError), dataplane.Dataplane.open(PINS) as plane:
        return int(plane.number)
    return 0


# -- load -----------------------------------------------------------------------------------

_PYTHON = ["/usr/bin/python3.11", "-c", (HERE / "load.py").read_text()]


@dataclass
class Load:
    """Connections that are held and checked, from one pod to another.

    Attributes:
        client: name of the client's pod.
        server: address of the server's pod.
        namespace: of both.
    """

    cluster: Cluster
    client: str
    server: str
    namespace: str

    def said(self) -> dict[str, Any]:
        """How it goes."""
        lines = self._kubectl("logs", self.client, "--tail=1").split("\n")
        found = dict(json.loads(lines[0])) if lines[0] else {"messages": 0, "wrong": ""}
        assert not found["wrong"], found
        return found

    def goes_on(self) -> None:
        """Wait until more has been passed on than now, every connection intact."""
        now = time.time()
        before = self.said()["messages"]
        wait_until(
            lambda: (said := self.said()).get("at", 0) > now and said["messages"] > before + 20,
            "the load goes on",
        )

    def finish(self) -> dict[str, Any]:
        """End it; what it says. AssertionError if a byte was wrong or a connection broke."""
        with contextlib.suppress(AssertionError):  # it may be ended with the container
            self._kubectl("exec", self.client, "--", *_END)
        wait_until(
            lambda: (
                self._kubectl("get", "pod", self.client, "-o", "jsonpath={.status.phase}")
                in ("Succeeded", "Failed")
            ),
            "the load ends",
        )
        said = self.said()
        assert said["end"], said
        return said

    def _kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments)


_END = ["/usr/bin/python3.11", "-c", "import os; os.kill(1, 15)"]


_NUMBERS = itertools.count(1)


@contextlib.contextmanager
def load(
    cluster: Cluster,
    port: int = 7000,
    *,
    connections: int = 10,
    annotations: dict[str, str] | None = None,
    namespace: str = "default",
) -> Iterator[Load]:
    """Two pods, one that serves and one that drives ``connections``; they go afterwards."""
    name, image = f"load{next(_NUMBERS)}", f"{IMAGE}:latest"
    server = [*_PYTHON, "serve", str(port)]
    made = [pod(f"{name}-server", server, image=image, namespace=namespace, port=port)]
    try:
        cluster.apply(*made)
        address = cluster.ready(f"{name}-server", namespace)
        words = [*_PYTHON, "drive", address, str(port), str(connections), "0.01"]
        client = f"{name}-client"
        made.append(pod(client, words, image=image, namespace=namespace, annotations=annotations))
        cluster.apply(made[-1])
        cluster.ready(client, namespace)
        yield Load(cluster, client, address, namespace)
    finally:
        cluster.delete(*made)
