"""Programs that the guard knows by their names."""

from __future__ import annotations

import io
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from underpass import abi, knobs, namespaces, programs
from underpass.cli import guard
from underpass.model import Fault, Rule, Settings

NAMES = [
    b"nginx",
    b"nginx-debug",
    b"angie",
    b"openresty",
    b"openrest",
    b"stunnel",
    b"stunnel4",
    b"stunnel5",
]
OTHERS = [b"angi", b"my-nginx", b"redis-server", b"stunne", b""]


def _made(monkeypatch: pytest.MonkeyPatch, faults: Fault = Fault(0), *, counts: bool) -> abi.Knobs:
    monkeypatch.setattr(knobs, "_has_symbol", lambda _: counts)
    monkeypatch.setattr(namespaces, "cgroup_id_and_level", lambda _: (1, 1))
    about = knobs.about(Path("/"), Settings(), faults, fionread_broken=False)
    return cast("abi.Knobs", about.knobs)


def _kept_out(name: bytes, made: abi.Knobs) -> bool:
    return "fionread" in programs.describe(1, abi.Program(name=name), made).signs


def test_they_are_kept_out_where_it_miscounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: by their names as they begin, others not."""
    made = _made(monkeypatch, counts=False)
    assert [name for name in (*NAMES, *OTHERS) if _kept_out(name, made)] == NAMES


@pytest.mark.parametrize(("faults", "counts"), [(Fault(0), True), (Fault.MISCOUNTED, False)])
def test_nobody_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, faults: Fault, *, counts: bool
) -> None:
    """Claim: where it counts, and in the twin, a name says nothing."""
    made = _made(monkeypatch, faults, counts=counts)
    assert not any(_kept_out(name, made) for name in NAMES)


def test_who_hands_sockets_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: initiators are kept out by their names on every kernel, whatever a rule says."""
    made = _made(monkeypatch, counts=True)
    ends = [b"iscsid", b"iscsistart", b"nbd-client", b"usbip", b"usbipd", b"openvpn"]
    ruled = [programs.describe(1, abi.Program(name=n, rule=Rule.ALLOW), made) for n in ends]
    assert [(p.verdict, p.reason) for p in ruled] == [("kept-out", "in-kernel")] * len(ends)
    others = [b"iscsi", b"tgtd", b"nbd-server", b"nbdkit", b"usbip-exporter", b"iscsidx"]
    assert not any(programs.known_signs(name, made) for name in others)
    assert not programs.known_signs(b"iscsid", _made(monkeypatch, Fault.KERNEL_ENDS, counts=True))


ROW = ("prometheus-node-exporter", "watched", "has run 3 of 10 s", "00c0ffee00c0ffee", "x" * 50)


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_the_list_in_a_narrow_terminal(width: int) -> None:
    """Claim: names, verdicts and ids are whole at any width, and no line is longer than that."""
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    guard._print([ROW, ROW], console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    for word in (ROW[0], ROW[1], ROW[3]):
        assert shown.count(word) == 2
    assert shown.count("x") >= 100
