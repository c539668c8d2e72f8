"""Where the kubelet keeps this node's pods: one cgroup, elsewhere on every kind of node."""

from __future__ import annotations

import re
from pathlib import Path

from underpass.errors import Usage

#: What stands for the place in a configuration.
WORD = "kubepods"
#: ``kubepods`` (cgroupfs), ``kubepods.slice`` (systemd), ``kubelet-kubepods.slice`` (in a slice).
_NAME = re.compile(r"^(?:[a-z0-9_.-]+-)?kubepods(?:\.slice)?$")
_POD = re.compile(r"^(?:.*-)?pod[0-9a-f]{8}[-_]?[0-9a-f]{4}")
#: How deep `--cgroup-root` and node images nest it.
_DEPTH = 4


def find(root: Path) -> Path:
    """The cgroup that holds every pod's.

    Args:
        root: mount point of the cgroup v2 hierarchy.

    Raises:
        Usage: there is none: no kubelet has made pods here.
    """
    level = [root]
    for _ in range(_DEPTH):
        level = [child for path in level for child in _children(path)]
        named = [path for path in level if _NAME.match(path.name)]
        if named:  # of several, as where nodes run in containers, the one that is in use
            return max(named, key=_pods)
    step = 'name its directory instead, as in cgroup = "/sys/fs/cgroup/kubepods.slice"'
    raise Usage("find", WORD, f"no pod's cgroup is below {root}", step)


def _children(path: Path) -> list[Path]:
    try:
        return sorted(each for each in path.iterdir() if each.is_dir())
    except OSError:
        return []  # it has gone


def _pods(path: Path) -> int:
    """How many pods it holds."""
    below = [path, *_children(path)]
    return sum(bool(_POD.match(each.name)) for place in below for each in _children(place))
