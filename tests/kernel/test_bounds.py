"""What waits unread is bounded: a reader that does not read stops its sender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.memory import held_bytes
from tests.kernel.remote import Remote, couple, exchange
from underpass.model import Fault, Settings
from underpass.torture.patience import SLOW, patient
from underpass.torture.plans import KIB, MIB

MOST = 128 * MIB
"""The tests' own cap on what they put into kernel memory."""
WRITES = pytest.mark.parametrize("write", [64 * KIB, 1], ids=["64-KiB writes", "1-byte writes"])


@dataclass(frozen=True)
class Filled:
    """What a sender got rid of while its reader did not read."""

    accepted: int
    held: int

    def __str__(self) -> str:
        return f"{self.accepted} bytes taken, {self.held} bytes of kernel memory"

    def check(self, budget: int) -> None:
        """Neither the bytes nor the kernel memory may pass 1.5 times the budget."""
        assert self.accepted <= budget * 3 // 2, f"{self.accepted} bytes were accepted"
        assert self.held <= budget * 3 // 2, f"{self.held} bytes of kernel memory are held"


def _fill(near: Remote, write: int, most: int) -> Filled:
    before = held_bytes()
    accepted = near.fill(1, write, most)
    return Filled(accepted, held_bytes() - before)


def _native(bed: Bed, write: int) -> Filled:
    """The same between two workers that underpass does not see."""
    ends = bed.worker("client", outside=True), bed.worker("server", outside=True)
    near, far = couple(*ends, (SERVER4, 9090))
    filled = _fill(near, write, MOST)
    for end in (near, far):
        end.close(reset=True)
    return filled


@WRITES
def test_stalled_reader_stops_the_sender(
    bed: Bed, plane: MakePlane, measured: Callable[[str], None], write: int
) -> None:
    """Claim: at most 1.5 budgets are taken, in bytes and in memory; then all is delivered."""
    if write == 1 and SLOW > 1:
        pytest.skip("some five million calls: half an hour under emulation")
    underpass = plane()
    native = _native(bed, write)
    ends = bed.worker("client"), bed.worker("server")
    for port in (8080, 8081, 8082):  # memory is the node's: what others take meanwhile only adds
        near, far = couple(*ends, (SERVER4, port))
        filled = _fill(near, write, MOST)
        if filled.held <= Settings.budget_bytes * 3 // 2:
            break
        for end in (near, far):
            end.close(reset=True)
    measured(f"{write}-byte writes to a stalled reader, plain TCP: {native}; shortcut: {filled}")
    filled.check(Settings.budget_bytes)
    held_back = "budget-bytes" if write > 1 else "budget-messages"
    counters = underpass.counters()
    why = {reason: n for reason, n in counters.tcp_messages_total.items() if n}
    assert held_back in why, why
    far.receive(1, filled.accepted)
    exchange(near, far, 1)


def test_small_budgets_are_kept(bed: Bed, plane: MakePlane) -> None:
    """Claim: a smaller budget stops the sender earlier."""
    budget = 2 * MIB
    plane(Settings(budget_bytes=budget))
    native = _native(bed, 64 * KIB)
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    filled = _fill(near, 64 * KIB, MOST)
    # beside the budget there is what TCP takes by itself
    assert filled.accepted <= budget * 3 // 2 + native.accepted
    far.receive(1, filled.accepted)


def test_delivery_resumes_after_a_long_stall(bed: Bed, plane: MakePlane) -> None:
    """Claim: a sender held for 8 s goes on as soon as its reader reads, and all is right."""
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    # a send may still fit where poll sees no room
    first = near.fill(1, 64 * KIB, MOST)
    accepted = near.fill(1, 64 * KIB, MOST, quiet=8)
    assert accepted <= first + MIB
    more = 8 * MIB
    sending = near.submit_send(1, more, 64 * KIB)
    far.receive(1, accepted + more)
    sending.result(patient(20))
    exchange(near, far, 1)
    assert underpass.counters().tcp_messages_total["budget-bytes"] > 0


def test_the_node_budget_bounds_all_directions_together(bed: Bed, plane: MakePlane) -> None:
    """Claim: many stalled readers together hold little more than the node's budget."""
    node = 32 * MIB
    plane(Settings(node_budget_bytes=node))
    native = _native(bed, 64 * KIB)
    client, server = bed.worker("client"), bed.worker("server")
    ends = [couple(client, server, (SERVER4, 8080 + i)) for i in range(12)]
    before = held_bytes()
    filled = [near.fill(2 * i + 1, 64 * KIB, MOST // 2) for i, (near, _) in enumerate(ends)]
    held = held_bytes() - before
    # beside the budget: what every direction may hold anyway, and what TCP takes by itself
    own = len(ends) * (512 * KIB + 2 * native.accepted)
    assert held <= node * 3 // 2 + own
    for i, (_, far) in enumerate(ends):
        far.receive(2 * i + 1, filled[i])


@WRITES
def test_the_check_catches_a_missing_budget(bed: Bed, plane: MakePlane, write: int) -> None:
    """Claim: without the budget the check of the stalled reader fails."""
    plane(faults=Fault.NO_BUDGET)
    near, _ = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    filled = _fill(near, write, 64 * MIB if write > 1 else 100_000)
    with pytest.raises(AssertionError, match="bytes"):
        filled.check(Settings.budget_bytes)
