"""The pods of this node: who tells of them, put together with the cgroups that they have.

The API server knows all and every change; the container runtime knows what a pod was made with.
Either may be away: what was known last stays known. Nothing that they do is raised: it is counted.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from underpass import apiserver, cgroups, cri
from underpass.apiserver import Access, Watch
from underpass.errors import UnderpassError
from underpass.pod import Pod

#: Seconds between looks while something is about to be there, and else.
SOON, LOOK = 0.5, 10.0
#: Seconds in which news are gathered.
_GATHER = 0.05
#: Seconds between questions to the runtime while no pod is new.
ASK = 30.0
#: Seconds after which what a source told is called stale.
STALE = 60.0
API, RUNTIME = "apiserver", "cri"


@dataclass(frozen=True)
class Source:
    """How one of those who tell does.

    Attributes:
        name: ``apiserver`` or ``cri``.
        synced: it has told of the pods at least once.
        age: seconds since it was last in touch; infinite if it never was.
        errors: how often it failed.
        error: how it failed last; empty if it never did.
    """

    name: str
    synced: bool
    age: float
    errors: int
    error: str

    @property
    def stale(self) -> bool:
        """It has been away for a while."""
        return self.age > STALE


class Runtime:
    """The container runtime, asked whenever there is a pod that nobody has told of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.pods: list[Pod] = []
        self.synced = False
        self.heard = self.asked = float("-inf")
        self.errors = 0
        self.last_error = ""

    def ask(self) -> None:
        """Take what it tells in place of what is known; an error is counted."""
        self.asked = time.monotonic()
        try:
            self.pods = cri.pods(self._path)
        except UnderpassError as error:
            self.errors += 1
            self.last_error = str(error)
            return
        self.synced, self.heard = True, time.monotonic()


class Pods:
    """Keeps the node's pods, in threads of its own.

    Args:
        root: where cgroup v2 is mounted.
        access: the API server; None: it is not asked.
        runtime: the CRI socket; None: it is not asked.
        namespaces: the labels of namespaces are wanted; one watch more.
        known: what was known before; it holds until the API server has told.
    """

    def __init__(
        self,
        root: Path,
        access: Access | None,
        runtime: Path | None,
        *,
        namespaces: bool = True,
        known: Sequence[Pod] = (),
    ) -> None:
        self._root, self._known = root, known
        self._stirred = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = threading.Event()
        self._watch = apiserver.pods(access, self._stir) if access else None
        wanted = access if namespaces else None
        self._namespaces = apiserver.namespaces(wanted, self._stir) if wanted else None
        self._runtime = Runtime(runtime) if runtime else None
        self._lock = threading.Lock()
        self._pods: list[Pod] = []
        self._found = cgroups.find(root)
        self._netns: dict[tuple[str, int], int] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)
        self.errors = 0
        self.changed = threading.Event()
        """Set when :meth:`snapshot` is another than before; whoever waits for it clears it."""

    # -- what is known ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin; returns at once."""
        for watch in self._watches():
            watch.start()
        self._thread.start()

    def close(self) -> None:
        """End the threads and connections."""
        self._stop.set()
        self._stir()
        for watch in self._watches():
            watch.close()
        self._thread.join(cri_patience())
        os.close(self._wake)
        os.close(self._stirred)

    def once(self) -> None:
        """Ask everybody once, without threads.

        Raises:
            UnderpassError: one of them cannot be asked.
        """
        for watch in self._watches():
            watch.once()
        self._look()
        if self._runtime and not self._runtime.synced:
            raise UnderpassError("list", "pods", self._runtime.last_error, "name another socket")

    @property
    def of_kubernetes(self) -> bool:
        """Pods are made on this node, or will be."""
        with self._lock:
            return bool(self._watch or self._found.keeping)

    def snapshot(self) -> list[Pod]:
        """The pods, by namespace and name; also those that have no cgroup yet or any more."""
        with self._lock:
            return self._pods

    def known_cgroups(self) -> Mapping[str, int]:
        """Path -> id of the cgroups that pods are made in, and of those beside them."""
        with self._lock:
            return {**self._found.keeping, **self._found.others}

    def fileno(self) -> int:
        """Readable when :attr:`changed` has been set; :meth:`drain` makes it wait again."""
        return self._wake

    def drain(self) -> None:
        """See :meth:`fileno`."""
        self.changed.clear()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def sources(self) -> list[Source]:
        """How those who tell do, the API server first."""
        now, found = time.monotonic(), []
        if self._watch:
            every = self._watches()
            ages = [0.0 if w.connected else now - w.heard if w.heard else float("inf")
                    for w in every]  # fmt: skip
            synced = all(w.synced for w in every)
            errors, error = sum(w.errors for w in every), self._watch.last_error
            error = error or (self._namespaces.last_error if self._namespaces else "")
            found.append(Source(API, synced, max(ages), errors, error))
        if self._runtime:
            age, errors = now - self._runtime.heard, self._runtime.errors
            age = max(age - ASK, 0.0)
            found.append(
                Source(RUNTIME, self._runtime.synced, age, errors, self._runtime.last_error)
            )
        return found

    def trouble(self) -> str:
        """Who has not told of the pods yet, and how that failed; empty if nothing is wrong."""
        lacking = [each for each in self.sources() if each.error and not each.synced]
        return f"{lacking[0].name} does not tell: {lacking[0].error}" if lacking else ""

    def _watches(self) -> list[Watch]:
        return [watch for watch in (self._watch, self._namespaces) if watch]

    # -- the loop --------------------------------------------------------------------------

    def _stir(self) -> None:
        """Somebody has told something."""
        os.eventfd_write(self._stirred, 1)

    def _run(self) -> None:
        with contextlib.ExitStack() as undo:
            births = None
            with contextlib.suppress(OSError):
                births = undo.enter_context(contextlib.closing(cgroups.Births(self._root)))
            renewed = float("-inf")
            while not self._stop.is_set():
                try:
                    if births:
                        births.drain()
                        births.watch(("", *self._found.keeping))
                    if time.monotonic() - renewed >= LOOK:
                        self._netns.clear()  # a sandbox may have been made anew
                        renewed = time.monotonic()
                    self._look()
                except Exception:  # noqa: BLE001 - a file system that changes meanwhile
                    self.errors += 1
                self._wait(births)

    def _wait(self, births: cgroups.Births | None) -> None:
        """Until there is something new to look at, or may be."""
        poll = select.poll()
        poll.register(self._stirred, select.POLLIN)
        if births:
            poll.register(births, select.POLLIN)
        coming = any(pod.cgroup_id and not pod.netns for pod in self._pods)
        poll.poll((SOON if coming or not births else LOOK) * 1000)
        self._stop.wait(_GATHER)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._stirred)

    def _look(self) -> None:
        """Put together what is known now; tell if it is something new."""
        found = cgroups.find(self._root)
        told = self._told()
        if self._runtime and self._unasked(set(found.pods) - {pod.uid for pod in told}):
            self._runtime.ask()
            told = self._told()
        pods = [self._placed(pod, found) for pod in told]
        pods.sort(key=lambda pod: (pod.namespace, pod.name, pod.uid))
        with self._lock:
            news = pods != self._pods or found != self._found
            self._pods, self._found = pods, found
        if news:
            self.changed.set()
            os.eventfd_write(self._wake, 1)

    def _unasked(self, unknown: set[str]) -> bool:
        """Is the runtime to be asked?"""
        assert self._runtime
        since = time.monotonic() - self._runtime.asked
        return since >= ASK or (bool(unknown) and since >= SOON)

    def _told(self) -> list[Pod]:
        """What the sources tell; where both do, the API server knows better."""
        stale = {source.name: source.stale for source in self.sources()}
        labels = self._labels()
        found = {}
        if self._watch and not self._watch.synced:
            found = {pod.uid: replace(pod, stale=True) for pod in self._known}
        for pod in self._runtime.pods if self._runtime else ():
            found[pod.uid] = replace(pod, stale=stale[RUNTIME])
        for thing in self._watch.objects() if self._watch else ():
            pod = apiserver.pod_of(thing)
            before = found.get(pod.uid)
            containers = {**(before.containers if before else {}), **pod.containers}
            late = stale[API] and (before is None or before.stale)
            found[pod.uid] = replace(pod, containers=containers, stale=late)
        return [replace(pod, namespace_labels=labels.get(pod.namespace)) for pod in found.values()]

    def _labels(self) -> dict[str, Mapping[str, str]]:
        if not self._namespaces:
            return {}
        if not self._namespaces.synced:
            before = ((pod.namespace, pod.namespace_labels) for pod in self._known)
            return {name: labels for name, labels in before if labels is not None}
        objects = self._namespaces.objects()
        return {one.metadata.name: one.metadata.labels or {} for one in objects}

    def _placed(self, pod: Pod, found: cgroups.Found) -> Pod:
        path, number = found.pods.get(pod.uid, ("", 0))
        if not number:
            return pod
        ours = {cgroups.net_namespace(1), cgroups.net_namespace("self")} - {0}
        key = (pod.uid, number)
        if not self._netns.get(key):
            pids = (pid for pid, _ in cgroups.processes(self._root, path))
            spaces = [space for space in map(cgroups.net_namespace, pids) if space]
            self._netns[key] = _own_namespace(spaces, ours, pod.host_network)
        netns = self._netns[key]
        host = pod.host_network or netns in ours
        return replace(pod, cgroup=path, cgroup_id=number, netns=netns, host_network=host)


def _own_namespace(spaces: Sequence[int], ours: AbstractSet[int], host_network: bool | None) -> int:
    """The network namespace of a pod, of those that its processes are in; 0: not known yet. Pure.

    A process that starts a container is in the pod's cgroup before it enters the pod's namespace:
    of a pod with one of its own, the node's says nothing. The runtime, which does not tell of
    which kind a pod is, tells of it only when its first process is where it belongs.
    """
    own = [space for space in spaces if space not in ours]
    if host_network or (host_network is None and not own):
        own = list(spaces)
    return next(iter(own), 0)


def cri_patience() -> float:
    """Seconds within which a question to the runtime has ended."""
    return 2 * 5.0 + 1.0
