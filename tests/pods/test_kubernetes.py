"""Pods as a real API server, kubelet and containerd tell of them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.bed import cgroup2, run
from tests.kernel.waiting import wait_until
from tests.pods.relay import Relay
from tests.pods.testbed import NODE, Kubernetes
from underpass import apiserver, cgroups, cri, pods
from underpass.errors import UnderpassError
from underpass.pod import MARK, Pod
from underpass.pods import Pods


@contextlib.contextmanager
def _following(
    access: apiserver.Access | None, runtime: Path | None, *, namespaces: bool = True
) -> Iterator[Pods]:
    found = Pods(cgroup2(), access, runtime, namespaces=namespaces)
    found.start()
    try:
        yield found
    finally:
        found.close()


def _pod(found: Pods, namespace: str, name: str) -> Pod | None:
    every = {(pod.namespace, pod.name): pod for pod in found.snapshot()}
    return every.get((namespace, name))


def _wait(found: Pods, cluster: Kubernetes, name: str, what: Callable[[Pod], bool]) -> Pod:
    def seen() -> Pod | None:
        pod = _pod(found, cluster.namespace, name)
        return pod if pod and what(pod) else None

    pod = wait_until(seen, f"{name} as it shall be: {_pod(found, cluster.namespace, name)}", 30)
    assert isinstance(pod, Pod)
    return pod


def _placed(pod: Pod) -> bool:
    return bool(pod.cgroup_id and pod.netns)


def _running(pod: Pod) -> bool:
    return _placed(pod) and bool(pod.containers)


def _told(pod: Pod) -> bool:
    """Running, by a source that is not behind: one is for a while where processors are short."""
    return _running(pod) and not pod.stale


def _check(pod: Pod, *containers: str) -> None:
    """Its cgroup is there, its processes are in its network namespace, its containers are named."""
    assert cgroups.number(cgroup2(), pod.cgroup) == pod.cgroup_id

    def spaces() -> set[int]:
        inside = dict(cgroups.processes(cgroup2(), pod.cgroup))
        return {cgroups.net_namespace(pid) for pid in inside}

    # A process that starts a container is in the pod's cgroup before it enters the namespace.
    wait_until(lambda: spaces() == {pod.netns}, f"processes of {pod.netns} only in {pod.cgroup}")
    assert sorted(pod.containers.values()) == sorted(containers)


def _watches(cluster: Kubernetes, resource: str) -> int:
    """Watches that the API server has open, of all kinds of clients."""
    metrics = cluster.kubectl("get", "--raw", "/metrics")
    rows = re.findall(r"^apiserver_longrunning_gauge\{(.*)\} (\S+)$", metrics, re.MULTILINE)
    return sum(
        int(float(count))
        for labels, count in rows
        if f'resource="{resource}"' in labels and 'verb="WATCH"' in labels
    )


def test_the_api_server_tells_of_every_change(kubernetes: Kubernetes) -> None:
    """Claim: pods that are there, that come, change and go are known, with marks and places."""
    kubernetes.run("first", "web", "sidecar", app="web")
    with _following(kubernetes.access, None) as found:
        first = _wait(found, kubernetes, "first", _placed)
        _check(first, "web", "sidecar")
        assert (first.labels["app"], first.mark(), first.host_network) == ("web", "", False)
        kubernetes.run("second")
        second = _wait(found, kubernetes, "second", _running)
        _check(second, "main")
        assert first.netns != second.netns
        own = ("-n", kubernetes.namespace)
        kubernetes.kubectl(*own, "annotate", "pod", "first", f"{MARK}=off")
        _wait(found, kubernetes, "first", lambda pod: pod.mark() == "off")
        kubernetes.kubectl("label", "namespace", kubernetes.namespace, f"{MARK}=off")
        _wait(found, kubernetes, "second", lambda pod: pod.mark() == "off")
        kubernetes.kubectl("label", "namespace", kubernetes.namespace, f"{MARK}-")
        _wait(found, kubernetes, "second", lambda pod: pod.mark() == "")
        kubernetes.kubectl(*own, "delete", "pod", "second", "--wait=true")
        wait_until(lambda: not _pod(found, kubernetes.namespace, "second"), "second has gone")
        [source] = found.sources()
        assert (source.errors, source.error, source.stale) == (0, "", False)


@pytest.mark.parametrize("namespaces", [True, False])
def test_one_watch(kubernetes: Kubernetes, namespaces: bool) -> None:
    """Claim: it costs the API server one watch of pods, and one of namespaces if wanted."""
    kinds = ("pods", "namespaces")
    before = {kind: _watches(kubernetes, kind) for kind in kinds}
    with _following(kubernetes.access, None, namespaces=namespaces) as found:
        [watch, *others] = found._watches()
        wait_until(lambda: all(w.connected for w in (watch, *others)), "the watches are open")
        wanted = {"pods": 1, "namespaces": int(namespaces)}

        def counted() -> bool:
            now = {kind: _watches(kubernetes, kind) for kind in kinds}
            return all(now[kind] - before[kind] == wanted[kind] for kind in kinds)

        wait_until(counted, "as many watches as wanted")
        assert watch.lists == watch.watches == 1


def test_containerd_tells_the_same(kubernetes: Kubernetes) -> None:
    """Claim: the runtime alone gives names, labels, containers and places of the same pods."""
    kubernetes.run("first", "web", "sidecar", app="web")
    kubernetes.run("host", host_network=True)
    with (
        _following(kubernetes.access, None) as by_api,
        _following(None, kubernetes.socket) as by_runtime,
    ):
        for name, containers in (("first", ("web", "sidecar")), ("host", ("main",))):
            one = _wait(by_api, kubernetes, name, _told)
            two = _wait(by_runtime, kubernetes, name, _told)
            _check(one, *containers)
            same = replace(two, labels=one.labels, annotations=one.annotations, namespace_labels={})
            assert same == replace(one, namespace_labels={})
            assert one.labels.items() <= two.labels.items()
            assert two.namespace_labels is None
            assert one.host_network == (name == "host")
        kubernetes.run("later")
        _wait(by_runtime, kubernetes, "later", _placed)


def test_the_api_server_goes_away(
    kubernetes: Kubernetes, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: names outlive it, what comes meanwhile is told by the runtime, and it is caught up."""
    monkeypatch.setattr(pods, "STALE", 0.5)
    kubernetes.run("before", app="web")
    with _following(kubernetes.access, kubernetes.socket) as found:
        web = {"app": "web"}  # the server tells no more, the runtime would
        before = _wait(found, kubernetes, "before", lambda p: _placed(p) and p.labels == web)
        relay.go_away()
        wait_until(lambda: found.sources()[0].stale and relay.refused >= 2, "it is missed")
        wait_until(lambda: found.sources()[0].errors >= 2, "both refusals are counted")
        still = _wait(found, kubernetes, "before", _placed)
        assert (still.labels, still.cgroup_id) == (before.labels, before.cgroup_id)
        kubernetes.run("meanwhile")
        _wait(found, kubernetes, "meanwhile", _placed)
        kubernetes.kubectl("-n", kubernetes.namespace, "label", "pod", "before", "late=yes")
        relay.away = False
        late = _wait(found, kubernetes, "before", lambda pod: "late" in pod.labels)
        assert not late.stale
        wait_until(lambda: not found.sources()[0].stale, "it is caught up")


def test_the_runtime_goes_away(kubernetes: Kubernetes, tmp_path: Path) -> None:
    """Claim: without its socket the API server's word is enough; later it is asked again."""
    kubernetes.run("first")
    link = tmp_path / "cri.sock"
    with _following(kubernetes.access, link) as found:
        _wait(found, kubernetes, "first", _placed)
        by_runtime = found.sources()[1]
        assert by_runtime.errors >= 1
        assert not by_runtime.synced
        link.symlink_to(kubernetes.socket)
        assert found._runtime
        found._runtime.asked = float("-inf")  # its turn would come within half a minute
        wait_until(lambda: found.sources()[1].synced, "it is asked again")


def test_nobody_may_read(kubernetes: Kubernetes) -> None:
    """Claim: an account without rights is told so in words, and tries again without an end."""
    kubernetes.kubectl("delete", "clusterrolebinding", kubernetes.namespace)
    with _following(kubernetes.access, None) as found:
        wait_until(lambda: found.sources()[0].errors >= 2, "two refusals")
        [source] = found.sources()
        assert "403" in source.error
        assert "cannot list resource" in source.error
        assert "service account" in source.error
        assert not source.synced


def test_a_server_that_is_another(kubernetes: Kubernetes, tmp_path: Path) -> None:
    """Claim: a server that the authority does not vouch for is told nothing, not even the token."""
    other = tmp_path / "other.crt"
    run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", os.devnull,
        "-out", other, "-days", "1", "-subj", "/CN=other",
    )  # fmt: skip
    with _following(replace(kubernetes.access, authority=other), None) as found:
        wait_until(lambda: found.sources()[0].errors >= 1, "a refusal")
        assert "certificate verify failed" in found.sources()[0].error
        assert found.snapshot() == []


def test_once(kubernetes: Kubernetes, tmp_path: Path) -> None:
    """Claim: asked once, without threads, both tell; who cannot be asked is an error in words."""
    kubernetes.run("first")
    found = Pods(cgroup2(), kubernetes.access, kubernetes.socket)
    found.once()
    pod = _pod(found, kubernetes.namespace, "first")
    assert pod
    _check(pod, "main")
    with pytest.raises(UnderpassError, match="cannot list pods at"):
        cri.pods(tmp_path / "none.sock")
    wrong = replace(kubernetes.access, port=1)
    with pytest.raises(UnderpassError, match="cannot list /api/v1/pods"):
        Pods(cgroup2(), wrong, None).once()


def test_only_this_node(kubernetes: Kubernetes) -> None:
    """Claim: pods of other nodes are not told of."""
    kubernetes.run("first")
    elsewhere = replace(kubernetes.access, node=f"not-{NODE}")
    watch = apiserver.pods(elsewhere, lambda: None)
    watch.once()
    assert watch.objects() == []
    watch = apiserver.pods(kubernetes.access, lambda: None)
    watch.once()
    assert watch.objects()
