"""Pin directories that hold what they should not, or lack what they should have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel.bed import ADMITTING, SERVER4, Bed
from tests.kernel.commands import underpass
from tests.kernel.kernel_objects import pin_foreign_map, sock_ops_on
from tests.kernel.remote import couple, exchange
from underpass import dataplane, pinning
from underpass.generation import Dataplane
from underpass.torture.kernel_objects import pinned, pinned_at

FAILED = 1
WORDS = ("up", "status", "down")


def _all_fail(bed: Bed, *words: str) -> None:
    """Every command fails in one line with the words, and leaves every pin where it was."""
    for word in WORDS:
        before = pinned(bed.pins)
        options = ("--cgroup", bed.cgroup) if word == "up" else ()
        underpass(bed.pins, word, *options).failed(FAILED, *words)
        assert pinned(bed.pins) == before


@pytest.mark.parametrize("value_size", [8, 4096])
def test_a_foreign_description(bed: Bed, value_size: int) -> None:
    """Claim: a map of another product in the place of ours is not read, used or removed."""
    bed.pins.mkdir()
    pin_foreign_map(bed.pins / "about", value_size)
    _all_fail(bed, str(bed.pins))
    assert sock_ops_on(bed.cgroup) == []


@pytest.mark.parametrize("name", ["up_list", "control"])
def test_a_missing_pin(bed: Bed, name: str) -> None:
    """Claim: a generation with a pin missing is left alone, and the pin is named."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    (bed.pins / name).unlink()
    _all_fail(bed, name)
    assert len(sock_ops_on(bed.cgroup)) == 1


def test_a_foreign_pin_beside_no_generation(bed: Bed) -> None:
    """Claim: `up` and `down` do not clear a directory that holds a pin of another product."""
    bed.pins.mkdir()
    foreign = pin_foreign_map(bed.pins / "foreign", 8)
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).failed(FAILED, "foreign")
    assert underpass(bed.pins, "status", "--json").document()["state"] == "absent"
    underpass(bed.pins, "down").failed(FAILED, "foreign")
    assert pinned_at(bed.pins / "foreign") == foreign
    assert sock_ops_on(bed.cgroup) == []


def test_a_foreign_pin_among_ours(bed: Bed) -> None:
    """Claim: a pin that another product put among ours is still there after every command."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    foreign = pin_foreign_map(bed.pins / "foreign", 8)
    underpass(bed.pins, "status").ok()
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    assert pinned_at(bed.pins / "foreign") == foreign
    underpass(bed.pins, "down").failed(FAILED, "foreign")
    assert pinned_at(bed.pins / "foreign") == foreign


def _cut(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From now on the process ends, as it were, once it has removed so many pins."""
    real, left = Path.unlink, iter(range(after))

    def unlink(path: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(Path, "unlink", unlink)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 2, 3, 12])
def test_a_removal_that_was_cut_short(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Claim: wherever the clearing of a failed `up` or `upgrade` ends, the next command goes on."""

    def begin_up() -> None:
        dataplane.up(bed.pins, bed.cgroup, ADMITTING)

    def begin_upgrade() -> None:
        dataplane.upgrade(bed.pins)

    last = "underpass.generation.Dataplane.attach", "underpass.pinning.exchange"
    for begin, spoilt in zip((begin_up, begin_upgrade), last, strict=True):
        with monkeypatch.context() as patched:
            patched.setattr(spoilt, _interrupted)
            _cut(patched, after)
            with pytest.raises(KeyboardInterrupt):
                begin()
        dataplane.up(bed.pins, bed.cgroup, ADMITTING)
        assert dataplane.places(bed.pins) == [bed.pins]
        assert len(sock_ops_on(bed.cgroup)) == 1
        near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
        exchange(near, far, 1)
        with Dataplane.open(bed.pins) as live:
            assert live.counters().shortcut_messages_total > 0
        bed.kill_workers()
    assert dataplane.down(bed.pins) == []
    assert dataplane.places(bed.pins) == []


@pytest.mark.parametrize("first", ["link_handshake", "link_watch", "link_uring", "about"])
def test_what_is_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Claim: links go before what describes a generation, and that before all else."""
    order = ("link_handshake", "link_watch", "link_uring", "about")
    pins = tmp_path / "pins"
    pins.mkdir()
    for name in ("a", *reversed(order), "z"):
        (pins / name).touch()
    _cut(monkeypatch, order.index(first))
    with pytest.raises(KeyboardInterrupt):
        pinning.remove(pins)
    assert {path.name for path in pins.iterdir()} == {"a", "z", *order[order.index(first) :]}


def test_a_cgroup_that_was_made_again(bed: Bed) -> None:
    """Claim: where a cgroup was removed and made again, `up` attaches to the new one."""
    up = ("up", "--admit-unknown", "--cgroup", bed.cgroup)
    underpass(bed.pins, *up).ok()
    bed.cgroup.rmdir()
    bed.cgroup.mkdir()
    assert not underpass(bed.pins, "status", "--json").document()["attached"]
    underpass(bed.pins, *up).ok()
    assert len(sock_ops_on(bed.cgroup)) == 1
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    found = underpass(bed.pins, "status", "--json").document()
    assert found["attached"]
    assert found["counters"]["pairs_total"] == 1
    underpass(bed.pins, "down").ok()
