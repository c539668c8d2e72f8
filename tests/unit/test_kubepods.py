"""Where the kubelet keeps its pods, on the nodes that people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from underpass import kubepods
from underpass.errors import Usage

_UID = "d9825635-7420-442e-b322-08c7027a7cb7"
_SYSTEMD = _UID.replace("-", "_")


def _made(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("place", "pod"),
    [
        ("kubepods", f"besteffort/pod{_UID}"),
        ("kubepods", f"pod{_UID}"),
        ("kubepods.slice", f"kubepods-pod{_SYSTEMD}.slice"),
        ("kubelet.slice/kubelet-kubepods.slice", f"kubelet-kubepods-pod{_SYSTEMD}.slice"),
        ("docker/abc/kubelet/kubepods", f"burstable/pod{_UID}"),
    ],
)
def test_every_layout_is_found(tmp_path: Path, place: str, pod: str) -> None:
    """The cgroupfs and systemd drivers, kind's nested root, nodes that are containers."""
    root = _made(tmp_path, "init.scope", "system.slice/kubepods-like.service", f"{place}/{pod}")
    assert kubepods.find(root) == root / place


def test_of_two_the_one_in_use(tmp_path: Path) -> None:
    """A driver that was changed leaves an empty tree behind."""
    root = _made(tmp_path, "kubepods/besteffort", f"kubepods.slice/kubepods-pod{_SYSTEMD}.slice")
    assert kubepods.find(root).name == "kubepods.slice"


def test_none_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    """A machine without a kubelet says so, and how to go on."""
    _made(tmp_path, "system.slice", "user.slice/user-0.slice")
    with pytest.raises(Usage, match=r"no pod's cgroup .* cgroup = "):
        kubepods.find(tmp_path)
