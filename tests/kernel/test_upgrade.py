"""`upgrade` puts a new generation in charge under load; a failed one changes nothing."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.bed import ADMITTING, BPFFS, SERVER4, USUAL, Bed
from tests.kernel.commands import command, kill_during, underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.kernel_objects import attach_foreign_sock_ops, sock_ops_on, wait_gone
from tests.kernel.remote import connect, couple, exchange, listen
from tests.kernel.traffic import Load
from tests.kernel.waiting import wait_until
from underpass import dataplane, pinning
from underpass.dataplane import Dataplane
from underpass.errors import UnderpassError
from underpass.model import Settings
from underpass.torture.kernel_objects import pinned
from underpass.torture.patience import fewer
from underpass.torture.plans import KIB, MIB

ROUNDS = fewer(4)

COUNTED = replace(USUAL, reproof_seconds=0)
"""For tests that count messages: on a slow machine some would be proofs."""


def _carried(pins: Path) -> int:
    with dataplane.opened(pins) as planes:
        return dataplane.counters(planes).shortcut_messages_total


def _pairs(pins: Path) -> list[int]:
    """Open pairs of each generation, the one in charge first."""
    with dataplane.opened(pins) as planes:
        return [plane.open_pairs() for plane in planes]


def test_pairs_go_on_and_new_ones_use_the_new(bed: Bed, plane: MakePlane) -> None:
    """Claim: after an upgrade old and new pairs take the shortcut, each in its generation."""
    plane(COUNTED)
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, (SERVER4, 8080))
    old = connect(client, (SERVER4, 8080)), listener.accept()
    exchange(*old, 1)
    old[0].send(1, 100 * KIB)  # unread while the generations change
    assert dataplane.upgrade(bed.pins) == 1
    assert len(sock_ops_on(bed.cgroup)) == 2
    old[1].receive(1, 100 * KIB)
    new = connect(client, (SERVER4, 8080)), listener.accept()  # a listener that stood before
    fresh = couple(client, server, (SERVER4, 8081))
    for number, ends in enumerate((old, new, fresh)):
        before = _carried(bed.pins)
        exchange(*ends, 1 if number == 0 else 5, rounds=2)
        assert _carried(bed.pins) == before + 4
    assert _pairs(bed.pins) == [2, 1]
    total = _carried(bed.pins)
    for end in old:
        end.close()
    assert dataplane.upgrade(bed.pins) == 2
    # the first generation has gone, what it carried is still counted
    assert _pairs(bed.pins) == [0, 2]
    assert _carried(bed.pins) == total
    status = underpass(bed.pins, "status", "--json").document()
    assert (status["open_pairs"], len(status["generations"])) == (2, 2)
    assert len(underpass(bed.pins, "connections", "--json").document()) == 2


def test_settings_are_kept_or_changed(bed: Bed, plane: MakePlane) -> None:
    """Claim: an upgrade keeps capacity, budgets and rules unless it is given others."""
    plane(Settings(capacity=100, budget_bytes=MIB, deny=("curl",)))
    dataplane.upgrade(bed.pins)
    with Dataplane.open(bed.pins) as after:
        assert (after.settings.capacity, after.settings.budget_bytes) == (100, MIB)
        assert after.settings.admit_unknown
        assert {name for _, name in after.rules()} == {b"curl"}
    dataplane.upgrade(bed.pins, Settings(capacity=200))
    with Dataplane.open(bed.pins) as after:
        assert after.settings.capacity == 200


def _break_object(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _: Bed) -> None:
    broken = tmp_path / "broken.bpf.o"
    broken.write_bytes(dataplane.OBJECT.read_bytes()[:20000])
    monkeypatch.setattr(dataplane, "OBJECT", broken)


def _fill_cgroup(_: pytest.MonkeyPatch, __: Path, bed: Bed) -> None:
    """As many sock_ops programs as the kernel takes are attached (BPF_CGROUP_MAX_PROGS)."""
    while True:
        try:
            attach_foreign_sock_ops(bed.cgroup, shared=True)
        except OSError:
            return


@pytest.mark.parametrize("spoil", [_break_object, _fill_cgroup])
def test_a_failed_upgrade_changes_nothing(
    bed: Bed,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spoil: Callable[[pytest.MonkeyPatch, Path, Bed], None],
) -> None:
    """Claim: if the new one cannot be loaded or attached, the old one serves on, unchanged."""
    dataplane.up(bed.pins, bed.cgroup, replace(COUNTED, admit_unknown=True))
    ends = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(*ends, 1)
    objects = pinned(bed.pins)
    spoil(monkeypatch, tmp_path, bed)
    attached = sock_ops_on(bed.cgroup)
    with pytest.raises(UnderpassError):
        dataplane.upgrade(bed.pins)
    assert list(BPFFS.glob(f"{bed.name}*")) == [bed.pins]
    assert pinned(bed.pins) == objects
    assert sock_ops_on(bed.cgroup) == attached
    before = _carried(bed.pins)
    exchange(*ends, 1, rounds=1)
    exchange(*couple(ends[0].worker, ends[1].worker, (SERVER4, 8081)), 1, rounds=1)
    assert _carried(bed.pins) == before + 4
    bed.kill_workers()
    assert dataplane.down(bed.pins) == []
    wait_gone(objects)


def test_status_of_a_retired_generation(bed: Bed, plane: MakePlane) -> None:
    """Claim: `status` tells what a retired generation holds; with nothing left, what ends it."""
    plane()
    ends = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(*ends, 1)
    dataplane.upgrade(bed.pins)
    assert re.search(r"still holds 1 pair *$", underpass(bed.pins, "status").ok().out, re.MULTILINE)
    for end in ends:
        end.close()
    with Dataplane.open(dataplane.retired(bed.pins)[0]) as old:
        wait_until(lambda: old.endpoints() == [], "the pair has closed")
    for _ in range(2):  # and does nothing about it
        said = underpass(bed.pins, "status").ok().out
        assert "still holds" not in said
        assert "goes with the next up, upgrade or down" in said
        assert len(dataplane.retired(bed.pins)) == 1
    underpass(bed.pins, "up", "--cgroup", bed.cgroup).ok()
    assert "(upgraded)" not in underpass(bed.pins, "status").ok().out


def test_nothing_to_upgrade(bed: Bed) -> None:
    """Claim: without a generation `upgrade` says so and does nothing."""
    underpass(bed.pins, "upgrade").failed(1, "no generation", " up`")
    assert list(BPFFS.glob(f"{bed.name}*")) == []


@pytest.mark.timeout(300)
def test_upgrades_under_load(bed: Bed, plane: MakePlane) -> None:
    """Claim: upgrade after upgrade, with pairs held by many generations, no stream is wrong."""
    plane()
    load = Load(bed)
    for _ in range(ROUNDS):
        load.start(12)
        load.wait_moves(5 * MIB)
        dataplane.upgrade(bed.pins)
        load.wait_moves(5 * MIB)
        dataplane.upgrade(bed.pins)
        load.stop_and_check()
    assert len(_pairs(bed.pins)) <= 1 + dataplane.MOST_RETIRED


def test_the_oldest_generation_makes_room(bed: Bed, plane: MakePlane) -> None:
    """Claim: pairs of the oldest go on by TCP when too many generations hold some; none is lost."""
    plane()
    client, server = bed.worker("client"), bed.worker("server")
    ends = []
    for number in range(dataplane.MOST_RETIRED + 2):
        ends.append(couple(client, server, (SERVER4, 8080 + number)))
        exchange(*ends[-1], 1)
        dataplane.upgrade(bed.pins)
    assert len(dataplane.retired(bed.pins)) == dataplane.MOST_RETIRED
    for pair in ends:
        exchange(*pair, 1)
    assert _pairs(bed.pins) == [0] + [1] * dataplane.MOST_RETIRED
    # unread bytes in the oldest: rather no upgrade than a byte lost
    oldest = ends[2]
    oldest[0].send(1, 10 * KIB)
    with pytest.raises(UnderpassError, match="unread"):
        dataplane.upgrade(bed.pins)
    oldest[1].receive(1, 10 * KIB)
    dataplane.upgrade(bed.pins)
    for pair in ends:
        exchange(*pair, 1)


@pytest.mark.timeout(600)
def test_upgrade_killed_half_way(bed: Bed) -> None:
    """Claim: whatever a killed `upgrade` left, traffic goes on and the next command mends it."""
    dataplane.up(bed.pins, bed.cgroup, ADMITTING)
    load = Load(bed)
    load.start(8, deadline=550)
    load.wait_moves(MIB)
    begin = time.monotonic()
    underpass(bed.pins, "upgrade").ok()
    longest = time.monotonic() - begin
    moments = random.Random(11)
    seen = set()
    for number in range(fewer(8)):
        early = kill_during(command(bed.pins, "upgrade"), moments.uniform(longest / 2, longest))
        longest *= 1.2 if early else 0.8  # what a busy machine lets it take changes
        seen.add(tuple(sorted(path.name for path in BPFFS.glob(f"{bed.name}*"))))
        if number % 4 == 0:
            underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
            before = _carried(bed.pins)
            near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080 + number))
            exchange(near, far, 1)
            assert _carried(bed.pins) > before
            near.close()
            far.close()
        load.wait_moves(MIB)
    load.stop_and_check()
    assert len(seen) > 1 or fewer(8) == 1
    objects = {one for path in dataplane.generations(bed.pins) for one in pinned(path)}
    assert dataplane.down(bed.pins) == []
    assert list(BPFFS.glob(f"{bed.name}*")) == []
    assert sock_ops_on(bed.cgroup) == []
    wait_gone(objects)


@pytest.mark.timeout(3600)
def test_two_hundred_upgrades(bed: Bed, plane: MakePlane, *, long_run: bool) -> None:
    """Claim: 200 upgrades under load lose no byte and leave nothing but the last generation."""
    if not long_run:
        pytest.skip("a long run: set UNDERPASS_LONG=1")
    plane()
    load = Load(bed)
    for _ in range(40):
        load.start(8, deadline=600)
        for _ in range(5):
            load.wait_moves(2 * MIB)
            dataplane.upgrade(bed.pins)
        load.stop_and_check()
    wait_until(lambda: sum(_pairs(bed.pins)) == 0, "all pairs have closed")
    dataplane.upgrade(bed.pins)
    assert list(BPFFS.glob(f"{bed.name}*")) == [bed.pins]


def test_down_waits_for_every_generation(bed: Bed) -> None:
    """Claim: with unread bytes in a retired generation `down` can be run again, and ends it."""
    dataplane.up(bed.pins, bed.cgroup, ADMITTING)
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    near.send(1, 10 * KIB)
    dataplane.upgrade(bed.pins)
    for _ in range(2):
        assert len(dataplane.down(bed.pins, timeout=0.2)) == 1
    assert underpass(bed.pins, "status", "--json").document()["state"] == "draining"
    underpass(bed.pins, "up", "--cgroup", bed.cgroup).ok()
    dataplane.upgrade(bed.pins)
    assert len(dataplane.down(bed.pins, timeout=0.2)) == 1
    far.receive(1, 10 * KIB)
    assert dataplane.down(bed.pins) == []
    assert list(BPFFS.glob(f"{bed.name}*")) == []
    assert sock_ops_on(bed.cgroup) == []
    exchange(near, far, 1)


@pytest.mark.parametrize("after", range(8))
def test_what_a_retired_generation_counted_is_inherited_once(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Claim: cut short before any of its steps, a retirement neither loses nor doubles a count."""
    plane()
    ends = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(*ends, 1)
    dataplane.upgrade(bed.pins)
    for end in ends:
        end.close()
    with Dataplane.open(dataplane.retired(bed.pins)[0]) as old:
        wait_until(lambda: old.endpoints() == [], "the pair has closed")
    before, left = _carried(bed.pins), iter(range(after))

    def cut(work: Callable[..., None]) -> Callable[..., None]:
        def work_or_end(path: Path, *to: Path, missing_ok: bool = False) -> None:
            if missing_ok and not path.exists():
                return
            if next(left, None) is None:
                raise KeyboardInterrupt
            work(path, *to)

        return work_or_end

    with monkeypatch.context() as patched:
        for step in ("rename", "unlink"):
            patched.setattr(Path, step, cut(getattr(Path, step)))
        with pytest.raises(KeyboardInterrupt):
            dataplane.up(bed.pins, bed.cgroup, ADMITTING)
    for _ in range(2):
        dataplane.up(bed.pins, bed.cgroup, ADMITTING)
        assert _carried(bed.pins) == before
    assert dataplane.places(bed.pins) == [bed.pins]
    exchange(*couple(ends[0].worker, ends[1].worker, (SERVER4, 8081)), 1, rounds=1)
    assert _carried(bed.pins) == before + 2


def test_an_interrupt_right_after_the_exchange(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: Ctrl-C at the worst moment completes the upgrade; old and new pairs are carried."""
    plane(COUNTED)
    old = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(*old, 1)
    real = pinning.exchange

    def interrupted(one: Path, other: Path) -> None:
        real(one, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(pinning, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataplane.upgrade(bed.pins)
    before = _carried(bed.pins)
    exchange(*old, 1, rounds=1)
    exchange(*couple(old[0].worker, old[1].worker, (SERVER4, 8081)), 1, rounds=1)
    assert _carried(bed.pins) == before + 4
    assert _pairs(bed.pins) == [1, 1]
