"""Who may take the shortcut: rules, what the kernel is told of them, and what it will say. Pure.

A rule holds for an end of a connection if all that it names holds; the first that holds decides,
and both ends must be allowed. :func:`first_match` says that word for word, :func:`decide` as the
kernel does it, by masks of at most 64 bits: bit 0 is the first rule. The tests compare the two.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from underpass import pod as pods_
from underpass.errors import Usage
from underpass.pod import MARK, Pod

#: Bits of the kernel's masks, and those that remain beside the two of the marks.
MASK_BITS = 64
MOST_RULES = MASK_BITS - 2
#: Ports and prefixes that all rules may name together.
MOST_PORTS = 4096
MOST_CIDRS = 1024
ANY = "*"
"""Stands for every value of a label."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Connection = TypeVar("_Connection")
_Labels = Mapping[str, tuple[str, ...]]


class Mode(enum.StrEnum):
    """What holds where no rule does. OPT_OUT is another word for DEFAULT_ON."""

    DEFAULT_ON = "default-on"
    OPT_OUT = "opt-out"
    OPT_IN = "opt-in"


@dataclass(frozen=True)
class Rule:
    """One rule. What it does not name may be anything; what it names must all hold.

    Attributes:
        allow: the shortcut may be used; else this end stays on TCP.
        name: for people; empty if it has none.
        namespaces: names of Kubernetes namespaces, one of which is the pod's.
        namespace_labels: label -> values; the pod's namespace has each, with one of its values.
        pod_labels: the same of the pod.
        annotations: the same of the pod's annotations.
        ports: (first, last) of the server's port, one of which holds it.
        cidrs: prefixes; one holds the local or the remote address, as this end sees them.
        cgroups: paths below the cgroup-v2 root; the process is in one of them or below.
        mark: only built-in rules: what the pod's mark is.
    """

    allow: bool
    name: str = ""
    namespaces: tuple[str, ...] = ()
    namespace_labels: _Labels = field(default_factory=dict)
    pod_labels: _Labels = field(default_factory=dict)
    annotations: _Labels = field(default_factory=dict)
    ports: tuple[tuple[int, int], ...] = ()
    cidrs: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    mark: str = ""

    @property
    def of_pods(self) -> bool:
        """It is about pods: what is in none does not match."""
        return bool(
            self.namespaces
            or self.namespace_labels
            or self.pod_labels
            or self.annotations
            or self.mark
        )

    @property
    def of_connections(self) -> bool:
        """It is about some of a process's connections only."""
        return bool(self.ports or self.cidrs)


#: The built-in rules, before all others.
_OUT = Rule(allow=False, name=f"{MARK}: off", mark="off")
_IN = Rule(allow=True, name=f"{MARK}: on", mark="on")


@dataclass(frozen=True)
class Policy:
    """The rules of a node, in order, and what holds where none does.

    Attributes:
        mode: what holds where no rule does.
        rules: in order; the first that holds decides.
        namespace_marks: a namespace's label may be the mark of its pods. Without, and without
            rules that name namespaces' labels, nobody has to ask for them.
    """

    mode: Mode = Mode.DEFAULT_ON
    rules: tuple[Rule, ...] = ()
    namespace_marks: bool = True

    @property
    def default_allow(self) -> bool:
        """What holds where no rule does."""
        return self.mode is not Mode.OPT_IN

    @property
    def clauses(self) -> tuple[Rule, ...]:
        """The built-in rules and the others, a bit each.

        Raises:
            Usage: they are too many.
        """
        if len(self.rules) > MOST_RULES:
            cause = f"it has {len(self.rules)} rules, the kernel's masks hold {MOST_RULES}"
            raise Usage("use", "the policy", cause, "join rules: each may name many things")
        built_in = (_OUT,) if self.default_allow else (_OUT, _IN)
        return (*built_in, *self.rules)

    @property
    def wants_namespaces(self) -> bool:
        """The labels of namespaces have to be known before a pod can be judged."""
        return self.namespace_marks or any(rule.namespace_labels for rule in self.rules)


@dataclass(frozen=True)
class Compiled:
    """A policy as the kernel has it. A mask has a bit for each rule, bit 0 is the first.

    Attributes:
        allow: bits of rules that allow.
        default_allow: what holds if no rule does.
        any_port: bits of rules that name no port.
        any_cidr: bits of rules that name no prefix.
        unknown_group: mask for a socket in no known group; None: it stays on TCP (as a pod that
            is not known yet).
        groups: cgroup id -> mask of the rules that may hold for a process in it or below, unless
            a nearer one has a mask.
        ports: server's port -> mask of rules that name it.
        cidrs: prefix -> mask of rules that name it or one that contains it.
    """

    allow: int
    default_allow: bool
    any_port: int
    any_cidr: int
    unknown_group: int | None
    groups: Mapping[int, int]
    ports: Mapping[int, int]
    cidrs: Mapping[str, int]


def compile(  # noqa: A001 - `policy.compile` says what it is
    policy: Policy, pods: Sequence[Pod] | None, cgroups: Mapping[str, int]
) -> Compiled:
    """What the kernel is to be told.

    Args:
        policy: the rules.
        pods: the node's, as far as they are known; None: no source tells of pods, so none is
            waited for.
        cgroups: path below the cgroup-v2 root -> id, of cgroups that exist: those that rules name,
            those that pods are made in, and those whose processes are in no pod.

    Raises:
        Usage: too many rules, ports or prefixes.
    """
    clauses = policy.clauses
    ports: dict[int, int] = {}
    networks: dict[_Network, int] = {}
    for bit, rule in enumerate(clauses):
        for first, last in rule.ports:
            for port in range(first, last + 1):
                ports[port] = ports.get(port, 0) | 1 << bit
        for text in rule.cidrs:
            network = ipaddress.ip_network(text)
            networks[network] = networks.get(network, 0) | 1 << bit
    _bound("ports", len(ports), MOST_PORTS)
    _bound("prefixes", len(networks), MOST_CIDRS)
    return Compiled(
        allow=_mask(rule.allow for rule in clauses),
        default_allow=policy.default_allow,
        any_port=_mask(not rule.ports for rule in clauses),
        any_cidr=_mask(not rule.cidrs for rule in clauses),
        unknown_group=_mask(_may_hold(policy, r, None, None) for r in clauses)
        if pods is None
        else None,
        groups=_groups(policy, pods, cgroups),
        ports=ports,
        cidrs={str(network): _with_shorter(network, networks) for network in networks},
    )


def _bound(what: str, count: int, most: int) -> None:
    if count > most:
        cause = f"its rules name {count} {what}, the kernel's table holds {most}"
        raise Usage("use", "the policy", cause, "name fewer, or let a rule without any decide")


def _mask(bits: Iterable[bool]) -> int:
    return sum(1 << bit for bit, is_set in enumerate(bits) if is_set)


def _with_shorter(network: _Network, networks: Mapping[_Network, int]) -> int:
    mask = 0
    for length in range(network.prefixlen + 1):
        mask |= networks.get(network.supernet(new_prefix=length), 0)
    return mask


def _groups(
    policy: Policy, pods: Sequence[Pod] | None, cgroups: Mapping[str, int]
) -> dict[int, int]:
    known = {pod.cgroup: pod for pod in pods or () if pod.cgroup_id and usable(policy, pod)}
    everywhere = {**cgroups, **{path: pod.cgroup_id for path, pod in known.items()}}
    keeping = {path for path in everywhere if pods_.keeps_pods(path)}
    keeping |= {above for path in keeping for above in _lineage(path)}
    found = {}
    for path, number in everywhere.items():
        pod = next((known[above] for above in _lineage(path) if above in known), None)
        unknown = pod is None and (path in keeping or pods_.place(path).uid)
        if pods is not None and unknown:
            continue  # or a pod that is not known yet would take the mask of what it is made in
        found[number] = _mask(_may_hold(policy, rule, pod, path) for rule in policy.clauses)
    return found


def _lineage(path: str) -> list[str]:
    """The cgroup, then those above it up to the root."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def usable(policy: Policy, pod: Pod) -> bool:
    """Is enough known of the pod to judge it?"""
    return pod.namespace_labels is not None or not policy.wants_namespaces


def _may_hold(policy: Policy, rule: Rule, pod: Pod | None, path: str | None) -> bool:
    """Does it hold for a process in this pod and cgroup, for some of its connections at least?

    ``path`` None is a cgroup that no rule names and nobody knows.
    """
    if rule.of_pods and (pod is None or not _selects(policy, rule, pod)):
        return False
    return not rule.cgroups or any(
        not cgroup or (path is not None and pods_.within(path, cgroup)) for cgroup in rule.cgroups
    )


def _selects(policy: Policy, rule: Rule, pod: Pod) -> bool:
    return (
        (not rule.mark or pod.mark(policy.namespace_marks) == rule.mark)
        and (not rule.namespaces or pod.namespace in rule.namespaces)
        and _has(pod.namespace_labels or {}, rule.namespace_labels)
        and _has(pod.labels, rule.pod_labels)
        and _has(pod.annotations, rule.annotations)
    )


def _has(labels: Mapping[str, str], wanted: _Labels) -> bool:
    return all(
        key in labels and (ANY in values or labels[key] in values) for key, values in wanted.items()
    )


@dataclass(frozen=True)
class End:
    """One end of a connection, as the kernel judges it.

    Attributes:
        groups: ids of its process's cgroup and of those above it, the nearest first.
        local: its own address.
        remote: the other's, as it sees it.
        server_port: as it sees it: a client's remote port, a server's local one.
    """

    groups: tuple[int, ...]
    local: str
    remote: str
    server_port: int


def decide(
    compiled: Compiled, groups: Iterable[int], server_port: int, local: str, remote: str
) -> bool:
    """May this end take the shortcut? As the kernel decides; see :class:`End` for the arguments."""
    return judge(compiled, End(tuple(groups), local, remote, server_port))[0]


def judge(compiled: Compiled, end: End) -> tuple[bool, int | None]:
    """May this end take the shortcut, and the bit that says so; None: no rule holds."""
    mask = next(
        (compiled.groups[group] for group in end.groups if group in compiled.groups),
        compiled.unknown_group,
    )
    if mask is None:
        return False, None
    mask &= compiled.ports.get(end.server_port, 0) | compiled.any_port
    mask &= (
        _longest(compiled.cidrs, end.remote)
        | _longest(compiled.cidrs, end.local)
        | compiled.any_cidr
    )
    if not mask:
        return compiled.default_allow, None
    lowest = mask & -mask
    return bool(compiled.allow & lowest), lowest.bit_length() - 1


def _plain(text: str) -> _Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _longest(cidrs: Mapping[str, int], text: str) -> int:
    address = _plain(text)
    network = ipaddress.ip_network(address)
    for length in range(network.prefixlen, -1, -1):
        key = str(network.supernet(new_prefix=length))
        if key in cidrs:
            return cidrs[key]
    return 0


def first_match(policy: Policy, pod: Pod | None, cgroup: str, end: End) -> Rule | None:
    """The rule that decides for an end, found one by one; None: the default does.

    What the masks must come to. ``end.groups`` has no say: ``pod`` and ``cgroup`` (a path) are what
    they stand for.
    """
    for rule in policy.clauses:
        if _may_hold(policy, rule, pod, cgroup) and _is_at(rule, end):
            return rule
    return None


def _is_at(rule: Rule, end: End) -> bool:
    """Do its ports and prefixes hold?"""
    if rule.ports and not any(first <= end.server_port <= last for first, last in rule.ports):
        return False
    addresses = (_plain(end.local), _plain(end.remote))
    networks = [ipaddress.ip_network(text) for text in rule.cidrs]
    return not networks or any(a in network for a in addresses for network in networks)


def outcomes(policy: Policy, end: End, *, in_pod: bool) -> set[bool]:
    """What may come of it for an end whose pod and cgroup nobody knows.

    Args:
        policy: the rules.
        end: the end; ``end.groups`` has no say.
        in_pod: its process may be in a pod.
    """
    found: set[bool] = set()
    for rule in policy.clauses:
        if (rule.of_pods and not in_pod) or not _is_at(rule, end):
            continue
        found.add(rule.allow)
        if not rule.of_pods and (not rule.cgroups or "" in rule.cgroups):
            return found
    return found | {policy.default_allow}


def describe(rule: Rule) -> str:
    """A rule in words."""
    if rule.mark:
        return rule.name
    spans = [f"{a}-{b}" if b > a else str(a) for a, b in rule.ports]
    labels = {
        "namespace labelled": rule.namespace_labels,
        "pod labelled": rule.pod_labels,
        "pod annotated": rule.annotations,
    }
    parts = [f"namespace {' or '.join(rule.namespaces)}" if rule.namespaces else ""]
    for word, wanted in labels.items():
        parts += [f"{word} {key}={'|'.join(values)}" for key, values in wanted.items()]
    parts += [f"port {' or '.join(spans)}" if spans else ""]
    parts += [f"address in {' or '.join(rule.cidrs)}" if rule.cidrs else ""]
    parts += [f"cgroup {' or '.join(c or '/' for c in rule.cgroups)}" if rule.cgroups else ""]
    what = ", ".join(part for part in parts if part) or "all"
    return f"{'allow' if rule.allow else 'deny'} {what}" + (f" ({rule.name})" if rule.name else "")


# -- dry run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change(Generic[_Connection]):
    """A connection for which another policy says something else.

    Attributes:
        connection: what was given.
        allowed: by the new policy; the old one says the contrary.
        rule: bit of the new policy's rule that says so; None: no rule, or an unknown pod.
    """

    connection: _Connection
    allowed: bool
    rule: int | None


def both(compiled: Compiled | None, ends: Sequence[End]) -> tuple[bool, int | None]:
    """May a connection take the shortcut, and the bit that says so of the end that decides."""
    if compiled is None:
        return True, None
    verdicts = [judge(compiled, end) for end in ends]
    return next((verdict for verdict in verdicts if not verdict[0]), verdicts[0])


def difference(
    old: Compiled | None,
    new: Compiled | None,
    connections: Iterable[tuple[_Connection, Sequence[End]]],
) -> list[Change[_Connection]]:
    """The connections of which two policies say different things; None is no policy."""
    changes = []
    for connection, ends in connections:
        before, (after, rule) = both(old, ends)[0], both(new, ends)
        if before != after:
            changes.append(Change(connection, after, rule))
    return changes


class Standing(enum.StrEnum):
    """What a policy says of a pod, all in all."""

    ON = "on"
    OFF = "off"
    PARTLY = "partly"
    UNKNOWN = "unknown"


def standing(policy: Policy, pod: Pod) -> Standing:
    """What a policy says of a pod: PARTLY where it depends on ports or addresses."""
    if not usable(policy, pod):
        return Standing.UNKNOWN
    verdicts = {rule.allow for rule in applying(policy, pod)}
    if len(verdicts) == 2:
        return Standing.PARTLY
    return Standing.ON if verdicts == {True} else Standing.OFF


def applying(policy: Policy, pod: Pod) -> list[Rule]:
    """The rules that may hold for a pod, in order, up to the first that holds for all it does."""
    found = []
    for rule in policy.clauses:
        if _may_hold(policy, rule, pod, pod.cgroup or None):
            found.append(rule)
            if not rule.of_connections:
                return found
    return [*found, Rule(allow=policy.default_allow, name=f"mode {policy.mode.value}")]


def changed_pods(old: Policy, new: Policy, pods: Iterable[Pod]) -> list[Pod]:
    """The pods for which other rules hold, whatever their names."""

    def says(policy: Policy, pod: Pod) -> list[Rule]:
        if not usable(policy, pod):
            return []
        rules = applying(policy, pod)
        return [Rule(allow=r.allow, ports=r.ports, cidrs=r.cidrs) for r in rules]

    return [pod for pod in pods if says(old, pod) != says(new, pod)]
