"""Pin directories that hold what they should not, or lack what they should have."""

from __future__ import annotations

import pytest

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.commands import underpass
from tests.kernel.kernel_objects import pin_foreign_map, sock_ops_on
from tests.kernel.remote import couple, exchange
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
