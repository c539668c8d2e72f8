"""The naive bypass of the benchmark: it redirects, within its own cgroup, and is always removed."""

from __future__ import annotations

import subprocess
import sys

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.kernel_objects import sock_ops_on
from tests.kernel.remote import connect, couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass.bench import naive
from underpass.bench.processes import Group

PORT = 8080


def test_it_redirects_its_own_cgroup(bed: Bed) -> None:
    """Claim: messages between two sockets of the cgroup are redirected, and counted."""
    with naive.attached(Group(bed.cgroup)) as bypass:
        near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
        assert bypass.redirected() == (0, 0)
        near.send(1, 1000)
        far.receive(1, 1000)
        assert bypass.redirected() == (1, 1000)
        exchange(near, far, 1, rounds=1)
        assert bypass.redirected()[1] > 1000
    assert sock_ops_on(bed.cgroup) == []


def test_it_leaves_others_alone(bed: Bed) -> None:
    """Claim: a connection with one end outside the cgroup goes by TCP, unharmed."""
    with naive.attached(Group(bed.cgroup)) as bypass:
        ends = (bed.worker("client"), bed.worker("server", outside=True))
        exchange(*couple(*ends, (SERVER4, PORT)), 1, rounds=2)
        assert bypass.redirected() == (0, 0)


def test_it_takes_dual_stack_servers(bed: Bed) -> None:
    """Claim: a server that listens for IPv6 and IPv4 at once, as qperf's does, is redirected to."""
    with naive.attached(Group(bed.cgroup)) as bypass:
        ends = (bed.worker("client"), bed.worker("server"))
        listener = listen(ends[1], ("::", PORT))
        near = connect(ends[0], (SERVER4, PORT))
        exchange(near, listener.accept(), 1, rounds=1)
        assert bypass.redirected()[0] > 0


def test_it_goes_with_a_process_that_is_killed(bed: Bed) -> None:
    """Claim: kill -9 leaves no program behind: nothing of it is pinned."""
    words = (
        "import pathlib, sys, time; from underpass.bench import naive, processes\n"
        "with naive.attached(processes.Group(pathlib.Path(sys.argv[1]))):\n"
        "    print('attached', flush=True); time.sleep(600)"
    )
    argv = [sys.executable, "-P", "-c", words, str(bed.cgroup)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == "attached\n"
            assert len(sock_ops_on(bed.cgroup)) == 1
        finally:
            child.kill()
    wait_until(lambda: sock_ops_on(bed.cgroup) == [], "the naive bypass is gone")
