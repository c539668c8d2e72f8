"""TCP's memory is the node's: near its limit messages go by TCP, and none fails."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from underpass.model import Fault
from underpass.torture.patience import SLOW
from underpass.torture.worker import CALL_DEADLINE

LIMITS = Path("/proc/sys/net/ipv4/tcp_mem")
FEW = "1200 1600 2400"  # pages
CONNECTIONS = 40
ROUNDS = 60
WRITE = 4096

pytestmark = pytest.mark.skipif(
    SLOW == 1, reason="tcp_mem is the whole node's: runs where that is the test's (test-kernel)"
)


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    usual = LIMITS.read_text()
    LIMITS.write_text(FEW)
    try:
        yield
    finally:
        LIMITS.write_text(usual)


def _coupled(bed: Bed) -> list[tuple[Remote, Remote]]:
    client, server = bed.worker("client"), bed.worker("server")
    ends = [couple(client, server, (SERVER4, 8000 + i)) for i in range(CONNECTIONS)]
    for near, far in ends:
        exchange(near, far, 1)
    return ends


def _fill(ends: list[tuple[Remote, Remote]]) -> list[int]:
    """A message more to each reader in turn, none of which reads; the bytes of each."""
    sizes = [near.fill(1, WRITE, 0) for near, _ in ends]
    for done in range(1, ROUNDS + 1):
        for near, _ in ends:
            near.fill(1, WRITE, sizes[0] + done * WRITE, 0)
    return [near.fill(1, WRITE, 0) - before for (near, _), before in zip(ends, sizes, strict=True)]


def test_no_send_fails_where_memory_is_short(bed: Bed, plane: MakePlane) -> None:
    """Claim: a message that the kernel would refuse to redirect goes by TCP, which may wait."""
    underpass = plane(UNGUARDED)
    ends = _coupled(bed)
    sizes = _fill(ends)
    assert underpass.counters().tcp_messages_total["node-memory"] > 0
    reading = [far.submit_receive(1, size) for (_, far), size in zip(ends, sizes, strict=True)]
    for done in reading:  # all at once: what one reader takes makes room for the others
        done.result(CALL_DEADLINE)
    for near, far in ends:
        exchange(near, far, 1)


def test_without_a_look_sends_fail(bed: Bed, plane: MakePlane) -> None:
    """Claim: redirected all the same, messages are refused, and `send` says so."""
    plane(UNGUARDED, Fault.NO_BUDGET)
    with pytest.raises(OSError, match=rf"Errno {errno.ENOMEM}\b"):
        _fill(_coupled(bed))
