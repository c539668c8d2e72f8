"""Policy: what comes in between - an adoption, a killed upgrade or change of groups, depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import bed as beds
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from underpass import adoption, dataplane, pinning
from underpass.abi import Step
from underpass.dataplane import Dataplane
from underpass.errors import UnderpassError
from underpass.policy import Compiled
from underpass.torture.worker import Place, Worker

PORT = 8080


def _group(bed: Bed, *names: str) -> Path:
    path = bed.cgroup
    for name in names:
        path /= name
        path.mkdir()
        bed.undo.callback(beds.remove_cgroup, path)
    return path


def _couple(bed: Bed, server: Path, port: int = PORT) -> tuple[Remote, Remote]:
    worker = Worker(Place(bed.netns["server"], server), f"server-{port}")
    bed.undo.callback(worker.kill)
    bed.workers.append(worker)
    return couple(bed.worker("client"), worker, (SERVER4, port))


def _denying(*groups: Path) -> Compiled:
    """Who is in one of these stays on TCP."""
    return Compiled(
        allow=0,
        default_allow=True,
        any_port=1,
        any_cidr=1,
        unknown_group=0,
        groups={group.stat().st_ino: 1 for group in groups},
        ports={},
        cidrs={},
    )


def _filled(group: Path, count: int) -> Compiled:
    """The same, with so many groups that are nobody's."""
    some = _denying(group)
    return replace(some, groups={**some.groups, **{1 << 40 | n: 1 for n in range(count)}})


def _carried(plane: Dataplane, ends: tuple[Remote, Remote]) -> int:
    """How many messages of an exchange took the shortcut."""
    before = plane.counters().shortcut_messages_total
    exchange(*ends, 1)
    return plane.counters().shortcut_messages_total - before


@pytest.mark.skipif(not adoption.possible(), reason="nothing is taken in on this kernel")
def test_a_policy_between_entering_and_pairing(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: what is denied while a connection is being taken in is on TCP once it is a pair."""
    group = _group(bed, "pod")
    near, far = _couple(bed, group)
    exchange(near, far, 1)
    underpass = plane()
    step = adoption._Pass._step

    def step_after_the_policy(self: Any, some: Any, which: Step, **words: Any) -> Any:
        if which is Step.PAIR:
            dataplane.set_policy(bed.pins, _denying(group))
            near.send(1, 4096)  # its packet looks at the verdicts, of the peer's none is known yet
            far.receive(1, 4096)
        return step(self, some, which, **words)

    monkeypatch.setattr(adoption._Pass, "_step", step_after_the_policy)
    adoption.adopt(bed.pins)
    assert underpass.open_pairs() == 1
    assert _carried(underpass, (near, far)) == 0


def test_a_policy_after_an_upgrade_that_was_killed(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: it holds in the generation that still is in charge, and in the one that comes."""
    group = _group(bed, "pod")
    underpass = plane()
    ends = _couple(bed, group)
    assert _carried(underpass, ends) > 0

    def exchange_and_die(*_: Path) -> None:
        exchanged(*_)
        raise KeyboardInterrupt

    exchanged = pinning.exchange
    with monkeypatch.context() as killed:
        killed.setattr(pinning, "exchange", exchange_and_die)
        killed.setattr(dataplane, "_recover", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            dataplane.upgrade(bed.pins)
    dataplane.set_policy(bed.pins, _denying(group))
    assert _carried(underpass, ends) == 0
    late = _couple(bed, group, PORT + 1)
    assert _carried(underpass, late) == 0
    with dataplane.opened(bed.pins) as planes:
        assert sum(plane.counters().refused_total["policy"] for plane in planes) > 0


def test_groups_whose_change_was_killed(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the next one tells open pairs of it, though it finds nothing to change."""
    group = _group(bed, "pod")
    underpass = plane()
    dataplane.set_policy(bed.pins, _denying())
    ends = _couple(bed, group)
    assert _carried(underpass, ends) > 0
    number = group.stat().st_ino

    def die(_: Dataplane) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Dataplane, "tell", die)
        with pytest.raises(KeyboardInterrupt):
            dataplane.set_groups(bed.pins, {number: 1})
    dataplane.set_groups(bed.pins, {number: 1})
    assert _carried(underpass, ends) == 0


def test_a_group_too_deep_to_be_found(bed: Bed, plane: MakePlane) -> None:
    """Claim: who nests cgroups below a denied one does not escape."""
    deep = _group(bed, "pod", *map(str, range(13)))
    underpass = plane()
    dataplane.set_policy(bed.pins, _denying(bed.cgroup / "pod"))
    assert _carried(underpass, _couple(bed, deep)) == 0


def test_more_than_fits(bed: Bed, plane: MakePlane) -> None:
    """Claim: a policy that the tables cannot hold is refused, by name, and the one before stays."""
    group = _group(bed, "pod")
    underpass = plane()
    ends = _couple(bed, group)
    dataplane.set_policy(bed.pins, _denying(group))
    with pytest.raises(UnderpassError, match="the table of groups is full"):
        dataplane.set_policy(bed.pins, _filled(group, 70000))
    assert _carried(underpass, ends) == 0
    for _ in range(3):  # what is out of force makes room
        dataplane.set_policy(bed.pins, _filled(group, 30000))
