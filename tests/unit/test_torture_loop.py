"""Claims: the torture's own loop leaves no connection behind that could go on."""

from __future__ import annotations

import socket
import time

from underpass.torture.endpoints import Endpoint, Loop, Machine
from underpass.torture.plans import Mode, Step

SIZE = 100


class _Overslept(Machine):
    """Its wait is over just after it was found to wait, as on a machine that is busy elsewhere."""

    looks = 0

    @property
    def waits(self) -> bool:
        """True when it is asked for the first time in its second step."""
        self.looks += self.step == 1
        return self.looks == 1


def test_a_wait_that_ends_between_two_looks() -> None:
    """Claim: an edge-triggered end goes on after such a wait, of which no event tells."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    end = time.monotonic() + 20
    sends, receives = (Step(send=SIZE),) * 2, (Step(receive=SIZE),) * 2
    with near, far:
        loop = Loop("client", 2, end)
        loop.add(_Overslept(Endpoint(near, sends, 1, 2, end), 0, Mode.EDGE))
        loop.add(Machine(Endpoint(far, receives, 2, 1, end), 1, Mode.EDGE))
        loop.run()
    assert [outcome.error for outcome in loop.outcomes] == ["", ""]
