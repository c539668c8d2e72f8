"""Ctrl-C, SIGTERM and SIGHUP at bad moments: what was begun is undone."""

from __future__ import annotations

import os
import signal
from collections import UserList
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pytest

from tests.kernel.bed import BPFFS, Bed, cgroup2
from tests.kernel.commands import command, finish, start
from tests.kernel.kernel_objects import sock_ops_on
from tests.kernel.waiting import wait_until
from underpass import libbpf, pinning, selftest
from underpass.dataplane import OBJECT
from underpass.generation import PROGRAMS

ENDINGS = {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM, signal.SIGHUP: -signal.SIGHUP}


class _Interrupting(UserList[str]):
    """Lines of a log; as the first are added a Ctrl-C comes."""

    def __iadd__(self, _lines: Iterable[str]) -> Self:
        if not self:
            self.append("")
            signal.raise_signal(signal.SIGINT)
        return self


def test_an_interrupt_while_the_library_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: Ctrl-C inside libbpf's calls back to us is raised as soon as its call is over."""
    _, log = libbpf._library()
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(log, "lines", _Interrupting())
    with pytest.raises(KeyboardInterrupt):
        libbpf.Object(OBJECT)
    monkeypatch.undo()
    with libbpf.Object(OBJECT) as opened:
        opened.select(set(), PROGRAMS)
        monkeypatch.setattr(log, "lines", _Interrupting())
        with pytest.raises(KeyboardInterrupt):
            opened.load()
    assert signal.getsignal(signal.SIGINT) is before


def test_as_the_self_test_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: an interrupt while the self-test tidies up does not keep it from doing so."""
    remove, come = pinning.remove, [KeyboardInterrupt()]

    def broken_off(path: Path) -> None:
        if path.exists() and come:
            raise come.pop()
        remove(path)

    monkeypatch.setattr(pinning, "remove", broken_off)
    with pytest.raises(KeyboardInterrupt):
        selftest.run(quick=True)
    assert not come
    assert not list(BPFFS.glob(f"underpass-selftest-{os.getpid()}*"))


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_during_the_self_test_of_up(bed: Bed, number: signal.Signals) -> None:
    """Claim: an `up` that ends in its self-test says at most a line and leaves nothing."""
    up = start(command(bed.pins, "up", "--cgroup", bed.cgroup))
    name = f"underpass-selftest-{up.pid}"
    wait_until((BPFFS / name).exists, "the self-test is under way")
    up.send_signal(number)
    done = finish(up)
    assert done.code == ENDINGS[number]
    assert done.err.count("\n") == (number is signal.SIGINT), done
    assert not list(BPFFS.glob(f"{name}*"))
    assert not (cgroup2() / name).exists()
    assert not list(BPFFS.glob(f"{bed.name}*"))
    assert sock_ops_on(bed.cgroup) == []
