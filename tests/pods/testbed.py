"""A real Kubernetes node, where the testbed is beside this checkout."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.bed import REPOSITORY
from tests.kernel.waiting import wait_until
from underpass.apiserver import Access
from underpass.bench.processes import run_tool
from underpass.torture.patience import patient

STATE = Path(os.environ.get("K8S_DIR", "/tmp/underpass-k8s"))
HOST, PORT, NODE = "10.205.0.1", 16443, "node1"
IMAGE = "docker.io/testbed/perf:1"
_NUMBERS = itertools.count(1)


def script() -> Path | None:
    """The testbed's command, beside this checkout or a directory above it."""
    places = (above / "shared/testbed/k8s" for above in REPOSITORY.parents)
    return next((place for place in places if place.exists()), None)


@dataclass
class Kubernetes:
    """A node with a namespace of the test's own, and an account that may read pods."""

    namespace: str
    access: Access
    socket: Path

    def kubectl(self, *words: str, stdin: str = "") -> str:
        """Run kubectl as administrator."""
        return kubectl(*words, stdin=stdin)

    def get(self, *words: str) -> Any:
        """What `kubectl get -o json` says."""
        return json.loads(kubectl("get", *words, "-o", "json"))

    def run(self, name: str, *containers: str, host_network: bool = False, **labels: str) -> None:
        """Run a pod of sleeping containers; returns when it is ready."""
        spec = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": self.namespace, "labels": labels},
            "spec": {
                "hostNetwork": host_network,
                "terminationGracePeriodSeconds": 1,
                "containers": [
                    {
                        "name": one,
                        "image": IMAGE,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["/bin/sh", "-c", "sleep 100000"],
                    }
                    for one in containers or ("main",)
                ],
            },
        }
        kubectl("apply", "-f", "-", stdin=json.dumps(spec))
        ready = ("wait", "--for=condition=Ready", f"--timeout={patient(60):.0f}s")
        kubectl("-n", self.namespace, *ready, f"pod/{name}")


def kubectl(*words: str, stdin: str = "") -> str:
    """Run kubectl as administrator."""
    command = [str(STATE / "bin/kubectl"), "--kubeconfig", str(STATE / "admin.kubeconfig"), *words]
    return run_tool(command, stdin)


def _testbed(place: Path, act: str) -> None:
    done = subprocess.run(
        [place, act], check=False, capture_output=True, text=True, timeout=patient(240)
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def node() -> Iterator[None]:
    """The testbed, up; one that was up before stays up."""
    place = script()
    if place is None:
        pytest.skip("no Kubernetes testbed beside this checkout (shared/testbed/k8s)")
    if os.geteuid() != 0:
        pytest.skip("a Kubernetes node needs root")
    with contextlib.ExitStack() as undo:
        if not os.environ.get("UNDERPASS_TESTBED_UP"):  # somebody's, who lets us use it
            lock = undo.enter_context(Path(tempfile.gettempdir(), "k8s-testbed.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            undo.callback(_testbed, place, "down")
            _testbed(place, "up")
        yield


_ROLE = """
{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "%s"},
 "rules": [{"apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": ["list", "watch"]}]}
"""


@pytest.fixture
def kubernetes(node: None, tmp_path: Path) -> Iterator[Kubernetes]:  # noqa: ARG001 - it is up
    """A namespace of the test's own in the testbed."""
    name = f"underpass-test-{os.getpid()}-{next(_NUMBERS)}"
    with contextlib.ExitStack() as undo:
        undo.callback(kubectl, "delete", "namespace", name, "--wait=false")
        kubectl("create", "namespace", name)
        undo.callback(kubectl, "delete", "clusterrole", name, "--ignore-not-found")
        kubectl("apply", "-f", "-", stdin=_ROLE % name)
        undo.callback(kubectl, "delete", "clusterrolebinding", name, "--ignore-not-found")
        account = f"{name}:default"
        binding = ("create", "clusterrolebinding", name, f"--clusterrole={name}")
        kubectl(*binding, f"--serviceaccount={account}")
        token = tmp_path / "token"
        token.write_bytes(_token(name))
        access = Access(HOST, PORT, token, STATE / "pki/apiserver.crt", NODE)
        yield Kubernetes(name, access, STATE / "containerd.sock")


def _token(namespace: str) -> bytes:
    """The token of a namespace's default account."""

    def secret() -> str:
        account = json.loads(kubectl("-n", namespace, "get", "serviceaccounts", "-o", "json"))
        named = [s["name"] for one in account["items"] for s in one.get("secrets", ())]
        return named[0] if named else ""

    name = wait_until(secret, "a token for the account")
    found = json.loads(kubectl("-n", namespace, "get", "secret", str(name), "-o", "json"))
    return base64.b64decode(found["data"]["token"])
