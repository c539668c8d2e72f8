"""What a pod is, and which cgroup is whose. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: The annotation and the label, of a pod or a namespace, by which it opts out ("off") or in ("on").
MARK = "underpass.io/shortcut"

_UID = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
#: ``pod<uid>`` (cgroupfs), ``kubepods-burstable-pod<uid>.slice`` (systemd, - written as _).
_POD = re.compile(
    rf"^(?:[a-z0-9_.-]*kubepods(?:-burstable|-besteffort)?-)?pod({_UID})(?:\.slice)?$"
)
_CONTAINER = re.compile(r"^(?:[a-z-]+-)?([0-9a-f]{64})(?:\.scope)?$")
_PODS = re.compile(r"^(?:[a-z0-9_.-]*-)?kubepods(?:-burstable|-besteffort)?(?:\.slice)?$")
_QOS = ("burstable", "besteffort")


@dataclass(frozen=True)
class Pod:
    """A pod of this node.

    Attributes:
        namespace: its Kubernetes namespace.
        name: its name there.
        uid: as its cgroup is named after it (a static pod's differs from the API server's).
        labels: its own.
        annotations: its own.
        containers: id -> name.
        namespace_labels: of its namespace; None if they are not known (the CRI does not tell).
        host_network: it lives in the node's network namespace; None: nobody has told.
        cgroup: path below the cgroup-v2 root, without a slash in front; empty while there is none.
        cgroup_id: the kernel's number of it; 0 while there is none.
        netns: inode of its network namespace; 0 while it is not known.
        stale: no source has told of it for a while; this is what was known last.
    """

    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    containers: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] | None = None
    host_network: bool | None = None
    cgroup: str = ""
    cgroup_id: int = 0
    netns: int = 0
    stale: bool = False

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def mark(self, of_namespace: bool = True) -> str:
        """``on``, ``off``, or empty: what it says of itself, else what its namespace says.

        A word that is neither counts as ``off``: in doubt, plain TCP.

        Args:
            of_namespace: its namespace has a say.
        """
        whose, word = self._marked(of_namespace)
        return whose and ("on" if word.strip().lower() == "on" else "off")

    def mark_in_words(self, of_namespace: bool = True) -> str:
        """Which mark counts, and what it says; empty without one."""
        whose, word = self._marked(of_namespace)
        return whose and f"{whose} {MARK}: {word}"

    def _marked(self, of_namespace: bool) -> tuple[str, str]:
        above = (self.namespace_labels if of_namespace else None) or {}
        kinds = {"annotation": self.annotations, "label": self.labels, "namespace's label": above}
        found = ((whose, source[MARK]) for whose, source in kinds.items() if MARK in source)
        return next(found, ("", ""))


@dataclass(frozen=True)
class Place:
    """Whose a cgroup is: a pod's uid, and a container's id or empty. Both empty: no pod's."""

    uid: str = ""
    container: str = ""


def place(path: str) -> Place:
    """The pod, and the container in it, that a cgroup belongs to.

    Args:
        path: below the cgroup-v2 root, as ``/proc/PID/cgroup`` shows it.
    """
    parts = path.split("/")
    for depth, part in enumerate(parts):
        if found := _POD.match(part):
            uid = found[1].replace("_", "-")
            inside = (_CONTAINER.match(p) for p in parts[depth + 1 :])
            return Place(uid, next((match[1] for match in inside if match), ""))
    return Place()


def keeps_pods(path: str) -> bool:
    """Is it a cgroup that the kubelet makes pods' cgroups in?"""
    above, _, last = path.rpartition("/")
    return bool(_PODS.match(last)) or (last in _QOS and bool(_PODS.match(above.rpartition("/")[2])))


def within(path: str, cgroup: str) -> bool:
    """Is ``path`` the cgroup, or below it? The empty one is the root."""
    return not cgroup or path == cgroup or path.startswith(f"{cgroup}/")
