"""The policy: the kernel's masks say what the rules say one by one, and the marks come first."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from tests.unit.fuzz import FUZZED
from underpass import policy
from underpass.errors import Usage
from underpass.pod import MARK, Pod
from underpass.policy import Compiled, End, Mode, Policy, Rule, Standing

#: A node's cgroups by path and id; what is below a pod's is added by the tests.
HOST = {
    "system.slice": 10,
    "user.slice": 11,
    "kubepods": 12,
    "kubepods/burstable": 13,
    "system.slice/sshd.service": 14,
}
UIDS = [f"{n:08x}-0000-4000-8000-{n:012x}" for n in range(1, 5)]
PATHS = [f"kubepods/{'burstable/' if n % 2 else ''}pod{uid}" for n, uid in enumerate(UIDS)]
_KEYS, _VALUES = ("app", "tier"), ("a", "b")
_ADDRESSES = ("10.0.0.1", "10.0.1.1", "10.1.0.1", "::ffff:10.0.0.1", "fd00::1", "fd00:0:1::1")
_CIDRS = ("10.0.0.0/8", "10.0.0.0/16", "10.0.1.0/24", "10.0.0.1/32", "0.0.0.0/0", "fd00::/8",
          "fd00:0:1::/48", "::/0")  # fmt: skip

_labels = st.dictionaries(st.sampled_from(_KEYS), st.sampled_from(_VALUES), max_size=2)
_wanted = st.dictionaries(
    st.sampled_from(_KEYS),
    st.lists(st.sampled_from([*_VALUES, "*"]), min_size=1, max_size=2).map(tuple),
    max_size=1,
)
_marks = st.sampled_from([{}, {}, {MARK: "on"}, {MARK: "off"}, {MARK: "what"}])


def _some(values: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True).map(tuple)


_SELECTORS: dict[str, st.SearchStrategy[object]] = {
    "namespaces": _some(("default", "db")),
    "namespace_labels": _wanted,
    "pod_labels": _wanted,
    "annotations": _wanted,
    "ports": st.sampled_from([((80, 80),), ((80, 90), (443, 443))]),
    "cidrs": _some(_CIDRS),
    "cgroups": _some(("", "system.slice", "kubepods", "kubepods/burstable", f"{PATHS[0]}/inner")),
}


@st.composite
def _rule(draw: st.DrawFn) -> Rule:
    """With few selectors: one with many hardly ever decides."""
    named = draw(st.lists(st.sampled_from(sorted(_SELECTORS)), max_size=2, unique=True))
    selectors: dict[str, Any] = {name: draw(_SELECTORS[name]) for name in named}
    return Rule(allow=draw(st.booleans()), **selectors)


#: Rules of all kinds, or all about prefixes, of which some hold others.
_rules = st.one_of(
    st.lists(_rule(), max_size=6).map(tuple),
    st.lists(st.builds(Rule, allow=st.booleans(), cidrs=_some(_CIDRS)), min_size=2, max_size=6).map(
        tuple
    ),
)
_policies = st.builds(
    Policy, mode=st.sampled_from(Mode), rules=_rules, namespace_marks=st.booleans()
)


@st.composite
def _pods(draw: st.DrawFn) -> list[Pod]:
    return [
        Pod(
            namespace=draw(st.sampled_from(["default", "db"])),
            name=f"pod-{number}",
            uid=uid,
            labels={**draw(_labels), **draw(_marks)},
            annotations={**draw(_labels), **draw(_marks)},
            namespace_labels=draw(st.one_of(st.none(), _labels, _marks)),
            cgroup=PATHS[number],
            cgroup_id=100 + number,
        )
        for number, uid in enumerate(UIDS)
        if draw(st.booleans())
    ]


_ends = st.tuples(
    st.sampled_from([*HOST, *PATHS, *(f"{p}/{'ab' * 32}" for p in PATHS), f"{PATHS[0]}/inner/x",
                     "system.slice/new.service", "new.slice"]),
    st.sampled_from(_ADDRESSES),
    st.sampled_from(_ADDRESSES),
    st.sampled_from([80, 85, 443, 5432]),
)  # fmt: skip


def _cgroups() -> dict[str, int]:
    return {**HOST, f"{PATHS[0]}/inner": 200}


def _end(path: str, local: str, remote: str, port: int, pods: list[Pod]) -> End:
    """As the kernel sees a socket in a cgroup: ids of it and of all above it."""
    ids = {**_cgroups(), **{pod.cgroup: pod.cgroup_id for pod in pods}}
    parts = path.split("/")
    lineage = ["/".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    return End(tuple(ids.get(above, 1000 + len(above)) for above in lineage), local, remote, port)


@FUZZED
@given(_policies, _pods(), st.lists(_ends, min_size=1, max_size=6))
def test_masks_are_rules(
    rules: Policy, pods: list[Pod], ends: list[tuple[str, str, str, int]]
) -> None:
    """Claim: the masks decide as the first rule that matches; who is in no known group may not."""
    compiled = policy.compile(rules, pods, _cgroups())
    for path, local, remote, port in ends:
        end = _end(path, local, remote, port, pods)
        pod = next((p for p in pods if path == p.cgroup or path.startswith(f"{p.cgroup}/")), None)
        of_a_pod = path.startswith("kubepods")
        known = policy.usable(rules, pod) if pod else not of_a_pod and path != "new.slice"
        allowed, bit = policy.judge(compiled, end)
        assert policy.decide(compiled, end.groups, port, local, remote) == allowed
        if not known:
            assert (allowed, bit) == (False, None)
            continue
        rule = policy.first_match(rules, pod, path, end)
        assert allowed == (rule.allow if rule else rules.default_allow)
        assert (rules.clauses[bit] if bit is not None else None) == rule
        assert allowed in policy.outcomes(rules, end, in_pod=True)


@FUZZED
@given(_policies, st.lists(_ends, min_size=1, max_size=6))
def test_without_pods(rules: Policy, ends: list[tuple[str, str, str, int]]) -> None:
    """Claim: where nothing tells of pods, the rules about anything else hold for all processes."""
    compiled = policy.compile(rules, None, _cgroups())
    for path, local, remote, port in ends:
        end = _end(path, local, remote, port, [])
        rule = policy.first_match(rules, None, path, end)
        expected = rule.allow if rule else rules.default_allow
        assert policy.decide(compiled, end.groups, port, local, remote) == expected
        assert expected in policy.outcomes(rules, end, in_pod=False)


@pytest.mark.parametrize("twin", ["the last rule decides", "shorter prefixes are left out"])
def test_the_comparison_notices(twin: str) -> None:
    """Claim (known-bad): masks read or made otherwise decide otherwise than the rules do."""

    def wrong(world: tuple[Policy, list[Pod], tuple[str, str, str, int]]) -> bool:
        rules, pods, (path, local, remote, port) = world
        compiled = policy.compile(rules, pods, _cgroups())
        end = _end(path, local, remote, port, pods)
        if twin == "the last rule decides":
            bits = range(len(rules.clauses))
            turned = {bit: bits[-1] - bit for bit in bits}
            groups = {g: sum(1 << turned[b] for b in bits if m >> b & 1)
                      for g, m in compiled.groups.items()}  # fmt: skip
            bad = replace(compiled, groups=groups)
        else:
            own = {
                text: sum(1 << b for b, r in enumerate(rules.clauses) if text in r.cidrs)
                for text in compiled.cidrs
            }
            bad = replace(compiled, cidrs=own)
        return policy.judge(bad, end) != policy.judge(compiled, end)

    find(st.tuples(_policies, _pods(), _ends), wrong, settings=FUZZED)


POD = Pod("default", "web-1", UIDS[0], {"app": "web"}, cgroup=PATHS[0], cgroup_id=100,
          namespace_labels={})  # fmt: skip


def _allowed(rules: Policy, pod: Pod, port: int = 80, remote: str = "10.0.0.2") -> bool:
    compiled = policy.compile(rules, [pod], HOST)
    return policy.decide(compiled, (999, pod.cgroup_id, 12), port, "10.0.0.1", remote)


@pytest.mark.parametrize("mode", Mode)
def test_modes_and_marks(mode: Mode) -> None:
    """Claim: "off" keeps a pod out in every mode, "on" lets it in where opting in is asked for."""
    on, off = ({MARK: word} for word in ("on", "off"))
    assert _allowed(Policy(mode), POD) == (mode is not Mode.OPT_IN)
    for marked in (replace(POD, annotations=off), replace(POD, namespace_labels=off)):
        assert not _allowed(Policy(mode), marked)
        assert not _allowed(Policy(mode, (Rule(allow=True),)), marked)
    deny = Policy(mode, (Rule(allow=False),))
    assert _allowed(Policy(mode), replace(POD, labels=on))
    assert _allowed(deny, replace(POD, labels=on)) == (mode is Mode.OPT_IN)
    overruled = replace(POD, labels=on, namespace_labels=off)
    assert _allowed(Policy(mode), overruled)


def test_a_pod_that_is_not_known() -> None:
    """Claim: a pod stays on TCP until it is known; a host's process need not be known."""
    rules = Policy(rules=(Rule(allow=False, namespaces=("db",)),))
    compiled = policy.compile(rules, [], HOST)
    assert not policy.decide(compiled, (5, 13, 12), 80, "10.0.0.1", "10.0.0.2")
    assert policy.decide(compiled, (5, 10), 80, "10.0.0.1", "10.0.0.2")
    by_label = Policy(rules=(Rule(allow=False, namespace_labels={"a": ("*",)}),))
    for rules in (by_label, Policy()):
        assert not _allowed(rules, replace(POD, namespace_labels=None))
    unasked = Policy(namespace_marks=False)
    assert _allowed(unasked, replace(POD, namespace_labels=None))
    assert _allowed(unasked, replace(POD, namespace_labels={MARK: "off"}))
    assert _allowed(by_label, POD)


def test_a_named_cgroup_above_pods_lets_no_unknown_pod_in() -> None:
    """Claim: a rule for the pods' own parent gives a pod that is not known yet no say."""
    rules = Policy(rules=(Rule(allow=True, cgroups=("kubepods",)),))
    compiled = policy.compile(rules, [], HOST)
    assert not {12, 13} & compiled.groups.keys()
    assert _allowed(rules, POD)


def test_shorter_prefixes_are_in_longer_ones() -> None:
    """Claim: the mask of a prefix has the bits of those that contain it, and of no other."""
    rules = Policy(
        rules=tuple(
            Rule(allow=True, cidrs=(text,))
            for text in ("10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8", "::/0")
        )
    )
    compiled = policy.compile(rules, None, {})
    assert compiled.cidrs == {
        "10.0.0.0/8": 0b00010,
        "10.1.0.0/16": 0b00110,
        "11.0.0.0/8": 0b01000,
        "::/0": 0b10000,
    }
    assert compiled.any_cidr == 0b1


def test_too_much() -> None:
    """Claim: what the kernel's masks and tables cannot hold is refused; what just fits is not."""
    fits = Policy(Mode.OPT_IN, (Rule(allow=True),) * policy.MOST_RULES)
    compiled = policy.compile(fits, None, {})
    assert compiled.any_port == (1 << 64) - 1
    many = tuple(str(ipaddress.ip_network((n << 8, 24))) for n in range(policy.MOST_CIDRS + 1))
    for rules, word in (
        ((Rule(allow=True),) * (policy.MOST_RULES + 1), "63 rules"),
        ((Rule(allow=True, ports=((1, 5000),)),), "5000 ports"),
        ((Rule(allow=True, cidrs=many),), "1025 prefixes"),
    ):
        with pytest.raises(Usage, match=word):
            policy.compile(Policy(rules=rules), None, {})


def _connection(local: str, remote: str, port: int) -> tuple[str, tuple[End, End]]:
    client = End((100,), local, remote, port)
    return f"{local}->{remote}:{port}", (client, End((10,), remote, local, port))


def test_dry_run() -> None:
    """Claim: exactly the connections and pods are named for which something else is said."""
    old = Policy()
    new = Policy(rules=(Rule(allow=False, name="no db", ports=((5432, 5432),)),))
    db, web = _connection("10.0.0.1", "10.0.0.2", 5432), _connection("10.0.0.1", "10.0.0.2", 80)
    one, two = (policy.compile(rules, [POD], HOST) for rules in (old, new))
    (change,) = policy.difference(one, two, [db, web])
    assert (change.connection, change.allowed) == (db[0], False)
    assert change.rule is not None
    assert new.clauses[change.rule].name == "no db"
    assert policy.difference(one, one, [db, web]) == []
    assert policy.difference(None, two, [db, web]) == [change]
    (back,) = policy.difference(two, None, [db, web])
    assert back.allowed
    assert policy.changed_pods(old, new, [POD]) == [POD]
    assert policy.changed_pods(old, replace(old, mode=Mode.OPT_OUT), [POD]) == []
    elsewhere = Policy(rules=(Rule(allow=False, namespaces=("db",)),))
    assert policy.changed_pods(old, elsewhere, [POD]) == []


def test_standing() -> None:
    """Claim: a pod's standing is what all its connections have in common."""
    off = replace(POD, labels={MARK: "off"})
    by_port = Policy(rules=(Rule(allow=False, ports=((80, 80),)),))
    by_label = Policy(rules=(Rule(allow=False, namespace_labels={"a": ("b",)}),))
    assert policy.standing(Policy(), POD) == Standing.ON
    assert policy.standing(Policy(Mode.OPT_IN), POD) == Standing.OFF
    assert policy.standing(Policy(), off) == Standing.OFF
    assert policy.standing(by_port, POD) == Standing.PARTLY
    assert policy.standing(by_label, replace(POD, namespace_labels=None)) == Standing.UNKNOWN


def test_compiled_is_plain() -> None:
    """Claim: what the kernel gets is numbers within its masks."""
    found = policy.compile(Policy(rules=(Rule(allow=True),)), [POD], HOST)
    assert isinstance(found, Compiled)
    for mask in (found.allow, found.any_port, found.any_cidr, *found.groups.values()):
        assert 0 <= mask < 1 << 64
