"""Names of pods for endpoints, and whose cgroups they are in. Reads /proc, no BPF of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from underpass import abi, cgroups, holders, namespaces, pod, records
from underpass.generation import Dataplane
from underpass.model import Endpoint, Pair
from underpass.pod import Pod
from underpass.policy import End


def of_namespaces(pods: Iterable[Pod]) -> dict[int, Pod]:
    """Inode of a network namespace -> the pod that has it to itself."""
    return {each.netns: each for each in pods if each.netns and not each.host_network}


def full(found: Pod, container: str = "") -> str:
    """``namespace/pod/container``, without the last if it is not known.

    Args:
        found: the pod.
        container: its id; empty: the only one, if it has only one.
    """
    names = found.containers
    only = next(iter(names.values())) if len(names) == 1 else ""
    name = names.get(container) or only
    return f"{found}/{name}" if name else str(found)


def by_label(pods: Sequence[Pod]) -> dict[str, Pod]:
    """A network namespace, as endpoints name it -> the pod that has it to itself."""
    known = of_namespaces(pods)
    if not known:
        return {}
    every = namespaces.net_namespaces()
    return {ns.label: known[ns.inode] for ns in every if ns.inode in known}


def with_pod(endpoint: Endpoint, pods: Mapping[str, Pod]) -> Endpoint:
    """The endpoint with its pod, as far as its namespace tells; see :func:`by_label`."""
    found = pods.get(endpoint.netns)
    return replace(endpoint, pod=full(found)) if found else endpoint


def pairs(planes: Iterable[Dataplane], pods: Sequence[Pod]) -> list[Pair]:
    """The open pairs, with the names of pods and containers."""
    ends = _matched(planes)
    return _pairs(ends, pods)


def _matched(planes: Iterable[Dataplane]) -> list[tuple[abi.Record, abi.Record]]:
    return [two for plane in planes for two in records.matched(plane.endpoints())]


def _pairs(ends: list[tuple[abi.Record, abi.Record]], pods: Sequence[Pod]) -> list[Pair]:
    labels = {ns.inode: ns.label for ns in namespaces.net_namespaces()}
    names = _names([record for two in ends for record in two], pods)

    def named(endpoint: Endpoint, record: abi.Record) -> Endpoint:
        return replace(endpoint, pod=names.get(record.cookie))

    found = []
    for client, server in ends:
        pair = records.pair(client, server, labels)
        both = named(pair.client, client), named(pair.server, server)
        found.append(replace(pair, client=both[0], server=both[1]))
    return found


def _names(ends: list[abi.Record], pods: Sequence[Pod]) -> dict[int, str]:
    """Cookie -> pod. Processes are looked at only where a namespace alone does not tell."""
    if not pods:
        return {}
    alone, root = of_namespaces(pods), namespaces.find_cgroup2()
    shared = {each.netns for each in pods if each.netns and each.host_network}
    names, unsure = {}, defaultdict(list)
    for record in ends:
        found = alone.get(record.netns)
        if found:
            names[record.cookie] = full(found)
        if record.inode and (record.netns in shared or (found and len(found.containers) > 1)):
            unsure[record.netns].append(record)
    for netns, several in unsure.items():
        where = {
            pid: path
            for each in pods
            if each.netns == netns and each.cgroup
            for pid, path in cgroups.processes(root, each.cgroup)
        }
        of_uid = {each.uid: each for each in pods}
        held = holders.of_sockets({record.inode for record in several}, where)
        for record in several:
            if record.inode in held:
                at = pod.place(where[min(held[record.inode].pids)])
                if at.uid in of_uid:
                    names[record.cookie] = full(of_uid[at.uid], at.container)
    return names


@dataclass(frozen=True)
class Judged:
    """An open pair as a policy judges it."""

    pair: Pair
    ends: tuple[End, End]


def judged(planes: Iterable[Dataplane], pods: Sequence[Pod]) -> list[Judged]:
    """The open pairs, with what a policy asks of their ends. Looks at every process."""
    matched = _matched(planes)
    every = [record for two in matched for record in two]
    held = holders.of_sockets({r.inode for r in every if r.inode}, holders.processes())
    alone, root = of_namespaces(pods), namespaces.find_cgroup2()

    def end(record: abi.Record) -> End:
        holding = held.get(record.inode)
        path = cgroups.of_process(min(holding.pids)) if holding else ""
        if not path and record.netns in alone:
            path = alone[record.netns].cgroup
        return End(
            groups=cgroups.lineage(root, path),
            local=abi.address(record.local_ip),
            remote=abi.address(record.remote_ip),
            server_port=record.remote_port if record.role == abi.CLIENT else record.local_port,
        )

    named = _pairs(matched, pods)
    return [Judged(p, (end(c), end(s))) for p, (c, s) in zip(named, matched, strict=True)]
