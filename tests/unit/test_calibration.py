"""What a calibration concludes, and what is kept of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from underpass import calibration
from underpass.bench import calibrate, others
from underpass.calibration import Calibration, Point
from underpass.model import Small


@pytest.mark.parametrize(
    ("ratios", "bound"),
    [
        ({1: 0.25, 16: 0.5, 64: 2.0, 256: 4.0}, 32),
        ({256: 4.0, 64: 2.0, 16: 0.5}, 32),
        ({1: 1.4, 16: 1.7}, 0),
        ({1: 0.4, 16: 0.5}, 17),
        ({1: 0.25, 16: 0.5, 64: 2.0, 256: 0.9, 1024: 4.0}, 32),
        ({1: 1.9, 4: 2.0, 16: 0.8, 64: 2.0}, 0),
        ({1: 0.5, 4: 1.0}, 4),
        ({}, 0),
    ],
    ids=["crossing", "any order", "never", "always", "outlier", "outlier alone", "even", "nothing"],
)
def test_the_bound_gives_away_least(ratios: dict[int, float], bound: int) -> None:
    """Claim: it is where the ratios cross 1, whatever one wrong figure says."""
    assert calibration.bound(ratios) == bound


def test_each_road_has_a_bound_for_each_placement() -> None:
    """Claim: one core and two cores are told apart; what was not measured stays as it is."""
    points = [
        Point(road, placement, size, 100, 100 * ratio)
        for road, placement, size, ratio in (
            ("virtual", "one-core", 16, 0.5),
            ("virtual", "one-core", 64, 1.5),
            ("virtual", "two-cores", 64, 0.5),
            ("virtual", "two-cores", 256, 1.5),
            ("virtual_nodelay", "one-core", 4, 0.5),
            ("virtual_nodelay", "one-core", 16, 1.5),
            ("loopback", "one-core", 1024, 0.5),
            ("loopback", "one-core", 4096, 1.0),
        )
    ]
    virtual = round(38 * calibrate.MARGIN)
    expected = Small()._replace(
        virtual=virtual, virtual_beside=153, virtual_nodelay=10, loopback=4096
    )
    assert calibrate.bounds(points) == expected


def _found(**changes: object) -> Calibration:
    fields = {"measured_at": 1.0, "kernel": os.uname().release, "small": {"virtual": 99}}
    fields["method"] = calibration.METHOD
    return Calibration(**{**fields, **changes})  # type: ignore[arg-type]


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    """Claim: a road that was not measured keeps its built-in bound; nothing else is left there."""
    place = tmp_path / "new" / "calibration.json"
    calibration.write(_found(points=(Point("virtual", "one-core", 1, 2.0, 3.0),)), place)
    assert calibration.bounds(place) == Small()._replace(virtual=99)
    assert calibration.read(place) == _found(points=(Point("virtual", "one-core", 1, 2.0, 3.0),))
    assert [entry.name for entry in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"measured_at": 1, "kernel": "another", "small": {"virtual": 99}}',
        b'{"measured_at": 1, "kernel": "%s", "small": {"virtual": -1}}'
        % os.uname().release.encode(),
        b'{"measured_at": 1, "kernel": "%s", "small": {"virtual": "x"}}'
        % os.uname().release.encode(),
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_cannot_be_used_is_as_if_it_were_not_there(tmp_path: Path, text: bytes) -> None:
    """Claim: a foreign, broken or older kernel's file leaves the built-in bounds."""
    place = tmp_path / "calibration.json"
    place.write_bytes(text)
    assert calibration.read(place) is None
    assert calibration.bounds(place) == Small()
    assert calibration.read(tmp_path / "none") is None


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Claim: nobody hangs at what is no file."""
    place = tmp_path / "calibration.json"
    os.mkfifo(place)
    assert calibration.read(place) is None


def test_what_others_take_is_read_of_the_cores_that_are_measured_on() -> None:
    """Claim: the share of these cores that was neither idle nor waiting for a disk."""
    before = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 5 0 5 100 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n"
    after = "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 10 1 5 112 6 0 0 0 5 0\ncpu1 90 0 0 10 0 0 0 0 0 0\n"
    assert others.share(before, after, {0}) == pytest.approx(0.25)
    assert others.share(before, after, {1}) == pytest.approx(0.9)
    assert others.share(before, after, {0, 1}) == pytest.approx(1 - 28 / 124)
    assert others.share(before, before, {0}) == 0
