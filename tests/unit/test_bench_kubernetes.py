"""`underpass bench --kubernetes`: what it makes, and how it judges what the node counted."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]
import pytest

from underpass.bench import kubernetes
from underpass.bench.compare import Moved
from underpass.bench.kubernetes import Kubectl, Node
from underpass.errors import UnderpassError, Usage

_NODE = Node(
    "worker-1",
    agent=("underpass", "underpass-x"),
    about={
        "metadata": {"labels": {"kubernetes.io/hostname": "worker-1.example"}},
        "status": {
            "capacity": {"cpu": "8", "memory": "32768000Ki"},
            "nodeInfo": {
                "osImage": "Debian GNU/Linux 12",
                "containerRuntimeVersion": "containerd://1.6.20",
                "architecture": "amd64",
                "kernelVersion": "6.1.0-9-amd64",
            },
        },
    },
)


def test_what_it_makes_is_valid_and_on_the_node() -> None:
    """A client and a server for either mode; those of default runs have opted out."""
    made = kubernetes.objects(_NODE, "some/perf:1")
    for each in made:
        kubernetes_validate.validate(each, "1.31.0", strict=True)
    pods = {each["metadata"]["name"]: each for each in made if each["kind"] == "Pod"}
    assert set(pods) == {"default-client", "default-server", "shortcut-client", "shortcut-server"}
    for name, pod in pods.items():
        assert pod["spec"]["nodeSelector"] == {"kubernetes.io/hostname": "worker-1.example"}
        mark = pod["metadata"]["annotations"]["underpass.io/shortcut"]
        assert mark == ("off" if name.startswith("default") else "on")


def test_a_node_is_described_as_a_machine() -> None:
    """What the report says it was measured on is the node, not the machine that runs kubectl."""
    found = kubernetes.machine(_NODE)
    assert (found["cores"], found["memory_mib"], found["kernel"]) == (8, 32000, "6.1.0-9-amd64")
    assert "worker-1" in found["cpu"]
    assert str(_NODE) == "two pods on node worker-1"


def test_other_pods_messages_are_not_counted_to_a_run_that_was_kept_out() -> None:
    """The counters are the node's; its packets and its refusals stay."""
    found = kubernetes.own_share(Moved(3, 1000, 5000, {"policy": 2}, not_local=7, small_streams=1))
    assert found == Moved(0, 0, 0, {"policy": 2}, not_local=7)


def test_options_of_a_cluster_are_refused_without_one() -> None:
    """They would be ignored."""
    with pytest.raises(Usage, match="--node"):
        kubernetes.refuse({"--kubeconfig": None, "--node": "x"}, with_cluster=False)
    kubernetes.refuse({"--kubeconfig": None, "--node": None}, with_cluster=False)


def test_options_of_this_machine_are_refused() -> None:
    """Cores cannot be chosen in a cluster."""
    with pytest.raises(Usage, match="--cpus with --kubernetes"):
        kubernetes.refuse({"--naive": False, "--cpus": "0,1"}, with_cluster=True)
    kubernetes.refuse({"--naive": False, "--cpus": None}, with_cluster=True)


def test_no_kubectl_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And so is a cluster that is not there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnderpassError, match="cannot run kubectl: it is not in PATH"):
        Kubectl().run("get", "pods")
