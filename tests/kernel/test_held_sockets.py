"""Sockets that a thread holds for long: nobody sleeps for them."""

from __future__ import annotations

from concurrent.futures import TimeoutError as Late
from dataclasses import replace

import pytest

from tests.kernel.absent import absent_page, why_not
from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import couple, exchange
from tests.kernel.traffic import Load
from underpass.generation import Dataplane
from underpass.model import Fault
from underpass.torture.patience import patient
from underpass.torture.plans import MIB

ADDRESS = (SERVER4, 8080)
SIZE = 100
NO_SMALL = replace(UNGUARDED, small=type(UNGUARDED.small)(*[0] * len(UNGUARDED.small)))

needs_pages = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def _send_to_a_held_reader(bed: Bed, underpass: Dataplane, patience: float) -> bool:
    """A reader sleeps with its socket locked; is a message to it sent within `patience`?"""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    page = absent_page(far.worker)
    near.send(1, SIZE)
    reading = page.submit_read(far, 1, SIZE)
    page.wait_touched()
    before = underpass.counters().tcp_messages_total["reader-busy"]
    sending = near.submit_send(1, SIZE)
    try:
        sending.result(patience)
    except Late:
        in_time = False
    else:
        in_time = True
        assert underpass.counters().tcp_messages_total["reader-busy"] == before + 1
    page.provide()
    reading.result(patient(20))
    sending.result(patient(20))
    far.receive(1, SIZE)
    exchange(near, far, 1)
    return in_time


@needs_pages
def test_a_send_does_not_sleep_for_the_reader(bed: Bed, plane: MakePlane) -> None:
    """Claim: a message to a reader that holds its socket for long goes by TCP, at once."""
    assert _send_to_a_held_reader(bed, plane(UNGUARDED), patient(20))


@needs_pages
def test_without_a_look_it_sleeps(bed: Bed, plane: MakePlane) -> None:
    """Claim: the check above fails when nobody looks who holds the reader's socket."""
    assert not _send_to_a_held_reader(bed, plane(UNGUARDED, Fault.SLEEPY), patient(1))


def test_both_ways_at_once_stay(bed: Bed, plane: MakePlane) -> None:
    """Claim: ends that send at the same time do not take each other for held: nearly all stays."""
    underpass = plane(NO_SMALL)
    load = Load(bed)
    load.start(4)
    load.wait_moves(256 * MIB)
    load.stop_and_check()
    counters = underpass.counters()
    assert counters.shortcut_messages_total > 20 * counters.tcp_messages_total["reader-busy"]
