"""`explain` finds the cause in what the kernel lists."""

from __future__ import annotations

from dataclasses import replace

import pytest

from underpass.errors import Usage
from underpass.explain import Finding, Target, View, check, explain, merged, parse
from underpass.model import Direction, Endpoint, Pair, Program, Reason, Socket
from underpass.pod import MARK, Pod
from underpass.policy import Mode, Policy, Rule

CLIENT, SERVER = Target("10.0.0.1", None), Target("10.0.0.2", 80)
LISTENER = Socket(
    Endpoint("0.0.0.0", 80, "server"),
    remote_address="0.0.0.0",
    remote_port=0,
    listening=True,
    in_map=False,
    covered=True,
    armed=True,
    role=0,
    reason=Reason.SHORTCUT,
    cookie=1,
    peer=0,
)
SOCKET = replace(
    LISTENER,
    endpoint=Endpoint("10.0.0.1", 5000, "client"),
    remote_address="10.0.0.2",
    remote_port=80,
    listening=False,
    armed=False,
    cookie=2,
)
FAR = replace(
    SOCKET,
    endpoint=Endpoint("10.0.0.2", 80, "server"),
    remote_address="10.0.0.1",
    remote_port=5000,
    cookie=3,
)

PAIRED = replace(SOCKET, role=1, peer=FAR.cookie)
GONE = replace(PAIRED, reason=Reason.PEER_GONE)
PROGRAM = Program("0000000000000005", "redis", "", False, "denied", "rule", [], 0.0, 9)


def _one(state: str, *sockets: Socket) -> Finding:
    [finding] = explain(CLIENT, SERVER, View(state, [], list(sockets), {}))
    assert finding.sentence.endswith(".")
    assert finding.next_step
    return finding


def test_a_service_and_what_is_behind_it() -> None:
    """An open connection is found by the service's address and by the server's own."""
    near = replace(PAIRED, remote_address="10.96.0.9")
    for server in (Target("10.96.0.9", 80), Target("10.0.0.2", 80), Target("10.0.0.2", None)):
        [found] = explain(CLIENT, server, View("active", [], [near, FAR, LISTENER], {}))
        assert found.sentence == _one("active", PAIRED, FAR, LISTENER).sentence
    [found] = explain(CLIENT, Target("10.0.0.3", 80), View("active", [], [near, FAR], {}))
    assert "No such connection" in found.sentence


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("10.0.0.1", Target("10.0.0.1", None)),
        ("10.0.0.1:80", Target("10.0.0.1", 80)),
        ("fd77::1", Target("fd77::1", None)),
        ("[fd77::1]:80", Target("fd77::1", 80)),
        ("::ffff:10.0.0.1", Target("10.0.0.1", None)),
    ],
)
def test_targets_are_read(text: str, target: Target) -> None:
    """Claim: an address is read with or without a port, in both families."""
    assert parse(text) == target


@pytest.mark.parametrize("text", ["", "pod-1", "10.0.0.1:0", "10.0.0.1:70000", "10.0.0.1:http"])
def test_wrong_targets_are_refused(text: str) -> None:
    """Claim: what is no address is a usage error."""
    with pytest.raises(Usage):
        parse(text)


def test_two_families_are_refused() -> None:
    """Claim: no connection has an IPv4 and an IPv6 end."""
    for pair in ((parse("10.0.0.1"), parse("fd77::1")), (parse("[fd77::1]:1"), CLIENT)):
        with pytest.raises(Usage, match="IPv6"):
            check(*pair)
    check(parse("::ffff:10.0.0.1"), SERVER)


@pytest.mark.parametrize(
    ("state", "sockets", "path", "reason"),
    [
        ("absent", [], "none", "absent"),
        ("absent", [SOCKET], "tcp", "absent"),
        ("active", [], "none", "not-local"),
        ("active", [LISTENER], "none", "ready"),
        ("paused", [LISTENER], "none", "paused"),
        ("active", [replace(LISTENER, armed=False)], "none", "ready"),
        ("active", [replace(LISTENER, covered=False)], "none", "outside-cgroup"),
        ("active", [replace(SOCKET, covered=False)], "tcp", "outside-cgroup"),
        ("active", [replace(SOCKET, reason=Reason.MAP_FULL)], "tcp", "map-full"),
        ("active", [SOCKET], "tcp", "not-local"),
        ("active", [SOCKET, FAR], "tcp", "opened-before-up"),
        ("active", [SOCKET, replace(FAR, covered=False)], "tcp", "outside-cgroup"),
        ("active", [SOCKET, replace(FAR, reason=Reason.HALF_CLOSED, role=2)], "tcp", "half-closed"),
        ("active", [PAIRED, replace(FAR, reason=Reason.READER_STUCK)], "tcp", "reader-stuck"),
        ("active", [replace(PAIRED, in_map=True)], "tcp", "peer-gone"),
        ("active", [GONE, replace(FAR, reason=Reason.READER_STUCK)], "tcp", "reader-stuck"),
        ("active", [GONE, replace(FAR, reason=Reason.TCP_UNREAD)], "tcp", "peer-gone"),
        ("active", [PAIRED, replace(FAR, reason=Reason.PAUSED)], "tcp", "drained"),
        ("active", [replace(PAIRED, reason=Reason.PAUSED), FAR], "tcp", "drained"),
        ("active", [replace(SOCKET, program=5), FAR], "tcp", "not-proven"),
    ],
)
def test_causes_are_found(state: str, sockets: list[Socket], path: str, reason: str) -> None:
    """Claim: without a pair, the cause is named."""
    finding = _one(state, *sockets)
    assert (finding.path, finding.reason) == (path, reason)


def test_an_unarmed_listener_is_ready_but_for_cookies() -> None:
    """Claim: what an unarmed listener cannot do is said of it, and of no other."""
    assert "cookie" in _one("active", replace(LISTENER, armed=False)).sentence
    assert "cookie" not in _one("active", LISTENER).sentence


def test_a_pair_is_explained_each_way() -> None:
    """Claim: an open pair gives the path and reason of both directions."""
    there = Direction("shortcut", "shortcut", 1000, 10, 1)
    back = Direction("tcp", "paused", 0, 0, 3)
    pair = Pair(SOCKET.endpoint, FAR.endpoint, there, back)
    found = explain(CLIENT, SERVER, View("paused", [pair], [replace(SOCKET, in_map=True)], {}))
    assert [(one.path, one.reason) for one in found] == [
        ("shortcut", "shortcut"),
        ("tcp", "paused"),
    ]
    assert "10 messages" in found[0].sentence
    assert found[1].next_step == "run `underpass resume`"


def test_pairs_from_one_port_are_told_apart() -> None:
    """Claim: of pairs from one address and port the one that was asked for is explained."""
    other = replace(FAR, endpoint=Endpoint("10.0.0.3", 80, "other"), cookie=5)
    elsewhere = replace(PAIRED, remote_address="10.0.0.3", cookie=4, peer=other.cookie)
    sockets = [replace(s, in_map=True) for s in (PAIRED, FAR, elsewhere, other)]
    quick, slow = (Direction(path, path, 0, 0, 0) for path in ("shortcut", "paused"))
    ends = ((FAR, quick), (other, slow))
    pairs = [Pair(SOCKET.endpoint, far.endpoint, way, way) for far, way in ends]
    for order in (pairs, pairs[::-1]):
        for target, reason in ((SERVER, "shortcut"), (Target("10.0.0.3", 80), "paused")):
            found = explain(CLIENT, target, View("active", order, sockets, {}))
            assert [one.reason for one in found] == [reason, reason]


def test_an_end_in_another_namespace_is_found_by_its_cookie() -> None:
    """Claim: of sockets with equal addresses the one that was paired is asked, if one was."""
    twin = replace(FAR, endpoint=Endpoint("10.0.0.2", 80, "twin"), cookie=4)
    ends = [replace(FAR, reason=Reason.HALF_CLOSED), replace(twin, reason=Reason.GUARDED)]
    assert _one("active", PAIRED, *ends).reason == "half-closed"
    knows = [replace(FAR, peer=SOCKET.cookie, reason=Reason.HALF_CLOSED), ends[1]]
    assert _one("active", SOCKET, *knows).reason == "half-closed"
    assert _one("active", SOCKET, *ends).reason == "opened-before-up"
    translated = replace(ends[0], remote_address="10.0.0.9")
    assert _one("active", PAIRED, translated).reason == "half-closed"


def test_generations_are_merged() -> None:
    """Claim: what any generation knows of a socket is kept; what the first lists is listed."""
    old = replace(SOCKET, role=1, reason=Reason.GUARDED, peer=3, program=5, covered=False)
    [found] = merged([[replace(SOCKET, cookie=0)], [FAR], [replace(old, in_map=True)]])
    assert found == replace(old, covered=True)
    assert merged([[SOCKET], [replace(old, cookie=9)]]) == [SOCKET]
    assert merged([[LISTENER, LISTENER], [replace(LISTENER, armed=False)]]) == [LISTENER, LISTENER]
    assert merged([]) == []


@pytest.mark.parametrize(
    ("reason", "verdict", "word"),
    [
        (Reason.GUARDED, "denied", "is denied (rule)"),
        (Reason.OBSERVED, "watched", "is watched (has run 0 s)"),
        (Reason.GUARDED, "allowed", "By now the "),
        (Reason.OBSERVED, "admitted", "By now the "),
        (Reason.OBSERVED, "denied", "is denied (rule)"),
    ],
)
def test_programs_are_named(reason: Reason, verdict: str, word: str) -> None:
    """Claim: the program for whose sake it is TCP is named; one that no longer is, as that."""
    program = replace(PROGRAM, verdict=verdict)
    for ends in (
        (replace(SOCKET, reason=reason, program=5), FAR),
        (replace(SOCKET, program=6), replace(FAR, reason=reason, program=5)),
    ):
        view = View("active", [], list(ends), {5: program})
        [found] = explain(CLIENT, SERVER, view)
        assert found.reason == reason.word
        for part in (program.name, program.id, word):
            assert part in found.sentence
        assert found.programs == (() if word == "By now the " else (program,))


POD = Pod("default", "web", "1", labels={MARK: "off"}, cgroup="pods/web", cgroup_id=7)
DENIED = "is denied by: deny port 80"
PORT80 = Policy(rules=(Rule(allow=False, ports=((80, 80),)),))


@pytest.mark.parametrize(
    ("view", "reason", "says"),
    [
        (View("active", [], [], {}, PORT80, policed=True), "policy", f"client's end {DENIED}"),
        (View("active", [], [], {}, Policy(Mode.OPT_IN), policed=True), "policy", "mode opt-in"),
        (View("active", [], [], {}, Policy(), {"server": POD}, True), "policy", "pod default/web"),
        (View("active", [], [], {}, Policy(), {"else": POD}, True), "ready", "not asked"),
        (View("active", [], [], {}, None, policed=True), "ready", "not known what its rules are"),
        (View("active", [], [], {5: PROGRAM}), "guarded", "is denied (rule)"),
        (View("active", [], [], {5: replace(PROGRAM, verdict="watched")}), "observed", "watched"),
        (View("active", [], [], {5: replace(PROGRAM, verdict="admitted")}), "ready", "is admitted"),
        (View("paused", [], [], {5: PROGRAM}, PORT80, policed=True), "paused", "would take TCP"),
    ],
)
def test_policy_and_guard_are_asked_for_a_new_connection(
    view: View, reason: str, says: str
) -> None:
    """Claim: where none is open, both have their say; what could not be asked is told."""
    found = explain(CLIENT, SERVER, replace(view, sockets=[replace(LISTENER, program=5)]))
    assert [(one.path, one.reason) for one in found] == [("none", reason)]
    assert says in found[0].sentence


def test_the_port_may_be_open() -> None:
    """Claim: a policy that says different things of a server's ports is not guessed at."""
    view = View("active", [], [LISTENER], {}, PORT80, policed=True)
    server = Target("10.0.0.2", None)
    assert explain(CLIENT, server, view)[0].reason == "policy"
    other = replace(LISTENER, endpoint=Endpoint("0.0.0.0", 81, "server"))
    [found] = explain(CLIENT, server, replace(view, sockets=[LISTENER, other]))
    assert (found.reason, "not asked" in found.sentence) == ("ready", True)


@pytest.mark.parametrize("reason", [Reason.GUARDED, Reason.SMALL_STREAM, Reason.SHORTCUT])
def test_an_old_reason_does_not_hide_the_policy(reason: Reason) -> None:
    """Claim: what keeps it on TCP by now is told beside what once did, and comes first."""
    ends = [replace(SOCKET, reason=reason), FAR]
    [found] = explain(CLIENT, SERVER, View("active", [], ends, {}, PORT80, policed=True))
    assert found.reason == _one("active", *ends).reason
    assert DENIED in found.sentence
    assert found.next_step.startswith("see `underpass policy show`")
    [found] = explain(CLIENT, SERVER, View("active", [], ends, {}, Policy(), policed=True))
    assert "policy" not in found.sentence
