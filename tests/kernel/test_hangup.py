"""Readers that are told of a hang-up, and ask FIONREAD for the first time if that was all."""

from __future__ import annotations

import fcntl
import select
import struct
import termios
import time
from dataclasses import replace

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import _SOCKETS, couple
from underpass import bringup
from underpass.model import Fault
from underpass.torture.patience import patient
from underpass.torture.plans import KIB, MIB

SETTINGS = replace(UNGUARDED, budget_bytes=MIB)
_WRITE = 64 * KIB
SIZES = range(MIB - 2 * _WRITE, MIB + 6 * _WRITE, _WRITE // 2 + 1000)
"""Around the budget: a little of the end of each goes by TCP."""


def _write_and_close(number: int, size: int) -> None:
    sock = _SOCKETS.pop(number)
    with sock:
        for at in range(0, size, _WRITE):
            sock.sendall(bytes(min(_WRITE, size - at)))


def _read_as_stunnel(number: int, late: float, patience: float) -> int:
    """Bytes until a hang-up behind which FIONREAD tells of nothing, or the end."""
    sock, taken = _SOCKETS[number], 0
    sock.setblocking(False)
    events = select.poll()
    events.register(sock, select.POLLIN | select.POLLRDHUP)
    events.poll(patience * 1000)
    time.sleep(late)
    while told := events.poll(patience * 1000):
        try:
            data = sock.recv(_WRITE)
        except BlockingIOError:
            continue
        taken += len(data)
        if not data:
            break
        asked = (
            fcntl.ioctl(sock, termios.FIONREAD, bytes(4)) if told[0][1] & select.POLLRDHUP else b""
        )
        if asked == struct.pack("i", 0):
            break
    return taken


def _cut_short(bed: Bed, size: int) -> bool:
    """Whether a program that has never asked FIONREAD misses the end of so much."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    reading = near.worker.submit(_read_as_stunnel, near.number, 0.05, patient(10))
    far.worker.call(_write_and_close, far.number, size)
    return int(reading.result(patient(60))) != size


@pytest.mark.parametrize("fault", [Fault(0), Fault.EARLY_FIN], ids=["held", "twin"])
def test_no_end_is_taken_for_the_last(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: not even the first such reader of its program misses an end. Twin: some do."""
    if fault and not bringup.fionread_broken():
        pytest.skip("this kernel counts TCP bytes of sockets in a map")
    plane(SETTINGS, fault)
    rounds = 5 if fault else 1  # on a busy machine the twin has luck
    assert any(_cut_short(bed, size) for _ in range(rounds) for size in SIZES) == bool(fault)
