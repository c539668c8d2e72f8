"""Claims: short connections of the torture begin where others have just ended."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from underpass.bench.processes import wait_for
from underpass.torture.churn import Churn, churn_connect, churn_serve


def test_a_server_waits_until_the_one_before_has_gone() -> None:
    """Claim: the children of a killed server, which still listen, do not end the run."""
    with socket.create_server(("127.0.0.1", 0)) as before, ThreadPoolExecutor(2) as threads:
        churn = Churn(before.getsockname(), count=20)
        serving = threads.submit(churn_serve, churn)
        assert not wait_for(serving.done, 0.2)
        before.close()
        assert threads.submit(churn_connect, churn).result() == []
        assert serving.result() == []
