"""The pods and the policy of a node, brought into force again and again: what the agent calls."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from underpass import apiserver, cgroups, config, dataplane, kept, namespaces, policy
from underpass.apiserver import Access
from underpass.errors import UnderpassError
from underpass.generation import Dataplane
from underpass.pod import Pod
from underpass.pods import Pods, Source
from underpass.policy import Compiled, Policy

#: Where runtimes put their socket.
_SOCKETS = (
    "/run/containerd/containerd.sock",
    "/run/k3s/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/cri-dockerd.sock",
)
#: Seconds for which what is in force is left alone while the sources have not told of all pods.
_PATIENCE = 30.0

Say = Callable[..., None]


class Change(NamedTuple):
    """Another policy is in force than before; None: all may take the shortcut.

    Attributes:
        before: what was in force; one that nobody knows counts as none that allows anything.
        after: what is.
    """

    before: Compiled | None
    after: Compiled | None


_NOBODY = Compiled(
    allow=0,
    default_allow=False,
    any_port=0,
    any_cidr=0,
    unknown_group=None,
    groups={},
    ports={},
    cidrs={},
)


def access(options: config.Pods) -> Access | None:
    """How the API server is reached, if it is to be asked.

    Raises:
        UnderpassError: a file that is named cannot be read.
    """
    node = options.node
    if node == "auto":
        node = os.environ.get("NODE_NAME") or socket.gethostname().lower()
    if options.apiserver == "auto":
        return apiserver.in_cluster(node)
    server = config.server_of(options)
    if not server:
        return None
    token = Path(options.token) if options.token else None
    return Access(*server, token, Path(options.authority), node)


def runtime(options: config.Pods) -> Path | None:
    """The runtime's socket, if it is to be asked."""
    if options.cri == "auto":
        return next((Path(p) for p in _SOCKETS if Path(p).is_socket()), None)
    return Path(options.cri) if options.cri else None


def compiled(
    rules: Policy, pods: Sequence[Pod] | None, known: Mapping[str, int], root: Path
) -> Compiled | None:
    """What the kernel is to be told; None where all may take the shortcut.

    Args:
        rules: the policy.
        pods: the node's; None: nobody tells of pods here.
        known: path -> id of cgroups; those that rules name are looked up.
        root: where cgroup v2 is mounted.

    Raises:
        Usage: the kernel's tables cannot hold it.
    """
    if pods is None and not rules.rules and rules.default_allow:
        return None
    named = {path: cgroups.number(root, path) for rule in rules.rules for path in rule.cgroups}
    there = {path: number for path, number in named.items() if number and path}
    return policy.compile(rules, pods, {**known, **there})


class Reconciler:
    """Knows the pods and keeps the policy in force. Not for several threads.

    Args:
        pins: the generation that it is for.
        path: the configuration; None: the defaults.
        say: is told of events: a word, and fields.

    Raises:
        Usage: the configuration is wrong.
    """

    def __init__(self, pins: Path, path: Path | None, say: Say) -> None:
        self._pins, self._say, self._path = pins, say, path
        self._root = namespaces.find_cgroup2()
        self._policy, self._options = _read(path)
        before = kept.read_pods(pins, fresh=False)
        self._remembered = before.pods if before else ()
        self._pods = self._begin()
        self._in_force: Compiled | None = None
        self._anew = self._due = True
        self._asked = False
        self._began = time.monotonic()
        self._looked = self._written = float("-inf")

    def _begin(self) -> Pods:
        server, socket_ = access(self._options), runtime(self._options)
        wanted = self._policy.wants_namespaces
        pods = Pods(self._root, server, socket_, namespaces=wanted, known=self._remembered)
        self._say(
            "pods",
            apiserver=f"{server.host}:{server.port}" if server else "",
            node=server.node if server else "",
            cri=str(socket_ or ""),
            namespaces=wanted and bool(server),
        )
        pods.start()
        return pods

    def close(self) -> None:
        """End the threads; what is in force stays, and what is known is kept for the next one."""
        with contextlib.suppress(UnderpassError):
            kept.write_pods(self._pins, replace(self._kept(), written=0.0))
        self._pods.close()
        if not self._pins.exists():
            kept.remove(self._pins)

    def reload(self, path: Path | None) -> None:
        """Read the configuration again.

        Raises:
            Usage: it is wrong; what was in force stays.
        """
        rules, options = _read(path)
        before = (self._options, self._policy.wants_namespaces)
        self._policy, self._options, self._path = rules, options, path
        if before != (options, rules.wants_namespaces):
            self._remembered = tuple(self._pods.snapshot())
            self._pods.close()
            self._pods = self._begin()
            self._began = time.monotonic()
        self._due = self._asked = True

    def fileno(self) -> int:
        """Readable when :meth:`apply` has something to do."""
        return self._pods.fileno()

    def pods(self) -> list[Pod]:
        """The pods as they are known now."""
        return self._pods.snapshot()

    def sources(self) -> list[Source]:
        """How those who tell of pods do."""
        return self._pods.sources()

    def trouble(self) -> str:
        """As :meth:`Pods.trouble`."""
        return self._pods.trouble()

    def apply(self, planes: list[Dataplane], *, fresh: bool) -> Change | None:
        """Bring into force what has changed. Never waits.

        Args:
            planes: the generations that hold pairs, the one in charge first.
            fresh: that one is new, and has been told nothing yet.

        Returns:
            What has changed in what is in force; None: nothing.

        Raises:
            UnderpassError: the kernel or the file system refuses.
        """
        now = time.monotonic()
        pods, change = self._pods, None
        self._anew |= fresh
        self._due |= fresh or pods.changed.is_set() or now - self._looked >= kept.HEARTBEAT
        pods.drain()
        if self._due and self._settled(planes, now):
            change = self._enforce(self.wanted())
            self._due = self._asked = False
            self._looked = now
            self._written = float("-inf")
        if now - self._written >= kept.HEARTBEAT:
            kept.write_pods(self._pins, self._kept())
            self._written = now
        return change

    def wanted(self) -> Compiled | None:
        """What is to be in force by what is known now."""
        known = self._pods.known_cgroups()
        return compiled(self._policy, _told(self._pods), known, self._root)

    def _settled(self, planes: list[Dataplane], now: float) -> bool:
        """Is enough known to replace what is in force? Where nothing is, anything is better."""
        synced = [source.synced for source in self._pods.sources()]
        waited = now - self._began >= _PATIENCE
        enough = any(synced) or self._asked or not self._pods.of_kubernetes
        return all(synced) or (waited and enough) or not any(p.policy for p in planes)

    def _enforce(self, new: Compiled | None) -> Change | None:
        old = self._in_force
        if new == old and not self._anew:
            return None
        change = Change(_NOBODY if self._anew else old, new)
        only_groups = not self._anew and new and old and replace(new, groups=old.groups) == old
        if only_groups and new:
            dataplane.set_groups(self._pins, new.groups)
        else:
            dataplane.set_policy(self._pins, new)
        self._in_force, self._anew = new, False
        if only_groups:
            return change
        source = str(self._path or "")
        kept.write_policy(self._pins, kept.InForce(self._policy, source) if new else None)
        self._say(
            "policy",
            mode=self._policy.mode.value if new else "",
            rules=len(self._policy.rules),
            pods=len(self.pods()),
        )
        return change

    def _kept(self) -> kept.Pods:
        told = _told(self._pods)
        return kept.Pods(
            written=kept.now(),
            pid=os.getpid(),
            told=told is not None,
            cgroups=dict(self._pods.known_cgroups()),
            pods=tuple(told or ()),
            trouble=self.trouble(),
        )


def _read(path: Path | None) -> tuple[Policy, config.Pods]:
    """The policy, and who is asked; see :func:`config.read_policy`.

    Where no API server is asked nobody tells of namespaces' labels: pods need not wait for them.
    """
    rules, options = config.read_policy(path)
    return (rules if access(options) else replace(rules, namespace_marks=False)), options


def _told(pods: Pods) -> list[Pod] | None:
    """The pods; None where none are made."""
    return pods.snapshot() if pods.of_kubernetes else None


def look(pins: Path, options: config.Pods) -> kept.Pods:
    """The pods, for a command: as an agent keeps them, else as the sources tell right now.

    Args:
        pins: the generation that the agent is for.
        options: who is asked if there is no agent.

    Raises:
        UnderpassError: nobody can be asked.
    """
    found = kept.read_pods(pins)
    if found:
        return found
    pods = Pods(namespaces.find_cgroup2(), access(options), runtime(options))
    pods.once()
    told = pods.of_kubernetes
    known = tuple(pods.snapshot()) if told else ()
    return kept.Pods(kept.now(), 0, told, dict(pods.known_cgroups()), known)


def fitting(rules: Policy, seen: kept.Pods) -> Policy:
    """The policy, without namespaces' marks where nobody tells of them."""
    told = any(pod.namespace_labels is not None for pod in seen.pods)
    return rules if told else replace(rules, namespace_marks=False)


def of_kept(rules: Policy, seen: kept.Pods) -> Compiled | None:
    """A policy for pods that were kept; see :func:`compiled`."""
    pods = seen.pods if seen.told else None
    return compiled(rules, pods, seen.cgroups, namespaces.find_cgroup2())


def enforce_once(pins: Path, rules: Policy, options: config.Pods, source: Path) -> kept.Pods:
    """Put a policy in force without an agent; the pods that it was made for.

    Raises:
        UnderpassError: nothing is up, nobody tells of pods, its rules cannot be kept for the other
            commands, or the kernel refuses. What was in force stays.
    """
    seen = look(pins, options)
    rules = fitting(rules, seen)
    before, wanted = kept.read_policy(pins), of_kept(rules, seen)
    kept.write_policy(pins, kept.InForce(rules, str(source.absolute())))
    try:
        dataplane.set_policy(pins, wanted)
    except BaseException:
        kept.write_policy(pins, before)
        raise
    return seen
