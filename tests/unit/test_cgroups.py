"""Pods' cgroups in hierarchies as kubelets make them: a directory tree stands for cgroup v2."""

from __future__ import annotations

import select
from pathlib import Path

import pytest

from underpass import cgroups

UIDS = ("0f7a1a2b-3c4d-5e6f-8a9b-0c1d2e3f4a5b", "1f7a1a2b-3c4d-5e6f-8a9b-0c1d2e3f4a5b")
UNDER = tuple(uid.replace("-", "_") for uid in UIDS)
BOX = "ab" * 32


@pytest.mark.parametrize(
    ("pods", "keeping", "others"),
    [
        (
            (f"kubepods/pod{UIDS[0]}/{BOX}", f"kubepods/burstable/pod{UIDS[1]}/{BOX}"),
            ("kubepods", "kubepods/burstable"),
            ("system.slice", "user.slice", "init.scope"),
        ),
        (
            (
                f"kubepods.slice/kubepods-pod{UNDER[0]}.slice/cri-containerd-{BOX}.scope",
                f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDER[1]}.slice",
            ),
            ("kubepods.slice", "kubepods.slice/kubepods-burstable.slice"),
            ("system.slice/deep/deeper", "user.slice"),
        ),
        (
            (f"kubelet/kubepods/pod{UIDS[0]}", f"kubelet/kubepods/besteffort/pod{UIDS[1]}"),
            ("kubelet/kubepods", "kubelet/kubepods/besteffort"),
            ("kubelet/kubelet.service", "system.slice"),
        ),
        ((), ("kubepods",), ("system.slice",)),
        ((), (), ("system.slice", "user.slice")),
    ],
)
def test_where_pods_are(
    tmp_path: Path, pods: tuple[str, ...], keeping: tuple[str, ...], others: tuple[str, ...]
) -> None:
    """Claim: each pod is found by its uid, and what is beside the pods' cgroups is known, too."""
    for path in (*pods, *keeping, *others):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
    found = cgroups.find(tmp_path)
    tops = {other.split("/deep")[0] for other in others}
    assert found.keeping.keys() == set(keeping)
    assert found.others.keys() == tops
    assert found.pods.keys() == {uid for uid in UIDS if any(uid in p or uid.replace("-", "_") in p
                                                           for p in pods)}  # fmt: skip
    for path, number in (*found.pods.values(), *found.keeping.items(), *found.others.items()):
        assert (tmp_path / path).stat().st_ino == number == cgroups.number(tmp_path, path)


def test_births(tmp_path: Path) -> None:
    """Claim: what is made and removed in a watched place is told, and nothing else."""
    (tmp_path / "kubepods").mkdir()
    births = cgroups.Births(tmp_path)
    try:
        births.watch(("", "kubepods", "gone"))
        assert not _readable(births)
        for act in (Path.mkdir, Path.rmdir):
            act(tmp_path / "kubepods/pod")
            assert _readable(births)
            births.drain()
            assert not _readable(births)
        (tmp_path / "kubepods/burstable").mkdir()
        births.drain()
        (tmp_path / "kubepods/burstable/pod").mkdir()
        assert not _readable(births)
    finally:
        births.close()


def _readable(births: cgroups.Births) -> bool:
    return bool(select.select([births], [], [], 0)[0])


def test_what_is_not_there(tmp_path: Path) -> None:
    """Claim: a hierarchy that has gone has nothing in it."""
    gone = tmp_path / "gone"
    assert cgroups.find(gone) == cgroups.Found()
    assert cgroups.number(gone, "a") == 0
    assert cgroups.lineage(gone, "a/b") == (0, 0)
    assert list(cgroups.processes(gone, "a")) == []
    assert cgroups.of_process(1 << 30) == ""
    assert cgroups.net_namespace(1 << 30) == 0
