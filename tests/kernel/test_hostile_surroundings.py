"""What a generation stands on goes away: namespaces, cgroups, bpffs, memory. Traffic goes on."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path

import pytest

from tests.kernel.bed import BPFFS, SERVER4, Bed, remove_netns, run
from tests.kernel.commands import command, finish, start, underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.kernel_objects import sock_ops_on
from tests.kernel.remote import Remote, couple, exchange
from tests.kernel.waiting import wait_until
from underpass.model import Settings

FAILED = 1
PORT = 8080
LOOPBACK = ("127.0.0.1", PORT)


def _couple(bed: Bed, where: str = "server") -> tuple[Remote, Remote]:
    near, far = couple(bed.worker(where), bed.worker(where), LOOPBACK)
    exchange(near, far, 1)
    return near, far


def _answer(bed: Bed, *words: str) -> None:
    for word in (*words, "status", "connections", "explain 127.0.0.1 127.0.0.1"):
        underpass(bed.pins, *word.split()).ok()


def test_a_namespace_deleted_under_its_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: processes in a deleted namespace talk on; `up` and `down` reach their sockets."""
    live = plane()
    near, far = _couple(bed)
    [pair] = live.pairs()
    assert pair.client.netns == bed.netns["server"]
    remove_netns(bed.netns["server"])
    exchange(near, far, 1)
    _answer(bed, f"up --cgroup {bed.cgroup}")
    [pair] = live.pairs()
    assert pair.client.netns.startswith("net:[")
    more = couple(near.worker, far.worker, ("127.0.0.1", PORT + 1))
    exchange(*more, 1)
    assert len(live.pairs()) == 2
    underpass(bed.pins, "down").ok()
    exchange(near, far, 1)
    exchange(*more, 1)


def test_a_namespace_deleted_with_its_processes(bed: Bed, plane: MakePlane) -> None:
    """Claim: when all that lived in a namespace is killed, its pairs go and others stay."""
    live = plane()
    client, server = bed.worker("client"), bed.worker("server")
    left = couple(client, server, (SERVER4, PORT + 1))
    gone = _couple(bed, "router")
    assert len(live.pairs()) == 2
    for end in gone:
        end.worker.kill()
    remove_netns(bed.netns["router"])
    wait_until(lambda: len(live.endpoints()) == 2, "the dead sockets leave the map")
    _answer(bed, f"up --cgroup {bed.cgroup}")
    exchange(*left, 1)


def test_the_other_end_is_killed(bed: Bed, plane: MakePlane) -> None:
    """Claim: bytes that a killed process had sent arrive, then the end; the map is empty."""
    live = plane()
    near, far = _couple(bed)
    near.send(1, 100_000)
    near.worker.kill()
    far.receive(1, 100_000)
    far.expect_eof()
    far.close()
    wait_until(lambda: not live.endpoints(), "both ends leave the map")


def test_the_cgroup_is_removed_under_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: open pairs outlive their cgroup, commands say that it has gone, `down` ends it."""
    plane()
    near, far = _couple(bed)
    for end in (near, far):
        (bed.outside / "cgroup.procs").write_text(str(end.worker.pid))

    def removed() -> bool:
        with contextlib.suppress(OSError):
            bed.cgroup.rmdir()
        return not bed.cgroup.exists()

    wait_until(removed, "the cgroup can be removed")
    exchange(near, far, 1)
    assert "has gone" in underpass(bed.pins, "status").ok().out
    assert underpass(bed.pins, "status", "--json").document()["attached"] is False
    _answer(bed, "pause", "resume")
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).failed(2, str(bed.cgroup))
    exchange(near, far, 1)
    near.send(1, 5000)
    unread = underpass(bed.pins, "down", "--timeout", "0.2").failed(FAILED, "unread")
    assert "127.0.0.1" in unread.err
    far.receive(1, 5000)
    underpass(bed.pins, "down").ok()
    assert not bed.pins.exists()
    exchange(near, far, 1)
    bed.cgroup.mkdir()  # the bed removes it


def test_up_for_another_cgroup_when_the_first_has_gone(bed: Bed, plane: MakePlane) -> None:
    """Claim: `up` replaces a generation whose cgroup has gone; its old pairs go on over TCP."""
    plane()
    near, far = _couple(bed)
    for end in (near, far):
        (bed.outside / "cgroup.procs").write_text(str(end.worker.pid))
    wait_until(lambda: not (bed.cgroup / "cgroup.procs").read_text(), "the cgroup is empty")
    bed.cgroup.rmdir()
    try:
        underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.outside).ok()
        assert len(sock_ops_on(bed.outside)) == 1
        exchange(near, far, 1)
        exchange(*couple(near.worker, far.worker, ("127.0.0.1", PORT + 1)), 1)
        assert underpass(bed.pins, "status", "--json").document()["open_pairs"] == 1
    finally:
        underpass(bed.pins, "down").ok()
        bed.cgroup.mkdir()


def test_bpffs_unmounted_under_a_generation(bed: Bed, tmp_path: Path) -> None:
    """Claim: traffic goes on, commands answer as if nothing were up, `up` works again."""
    where = tmp_path / "bpf"
    where.mkdir()
    run("mount", "-t", "bpf", "bpf", where)
    bed.undo.callback(lambda: os.path.ismount(where) and run("umount", where))
    pins = where / "underpass"
    up = ("up", "--admit-unknown", "--cgroup", bed.cgroup)
    underpass(pins, *up).ok()
    near, far = _couple(bed)
    assert underpass(pins, "status", "--json").document()["open_pairs"] == 1
    run("umount", where)
    exchange(near, far, 1)
    assert underpass(pins, "status", "--json").document()["state"] == "absent"
    underpass(pins, "down").ok()
    underpass(pins, *up).failed(2, str(pins))
    run("mount", "-t", "bpf", "bpf", where)
    underpass(pins, *up).ok()
    again = couple(near.worker, far.worker, ("127.0.0.1", PORT + 1))
    exchange(*again, 1)
    exchange(near, far, 1)
    underpass(pins, "down").ok()


def test_no_memory_for_the_maps(bed: Bed, tmp_path: Path) -> None:
    """Claim: where the kernel's memory for a generation is limited, `up` leaves nothing behind."""
    memory = Path("/sys/fs/cgroup/memory")
    if not (memory / "memory.limit_in_bytes").exists():
        pytest.skip("no memory cgroup of version 1 here")
    config = tmp_path / "underpass.toml"
    config.write_text("capacity = 1000000")
    group = memory / bed.name
    group.mkdir()
    bed.undo.callback(lambda: wait_until(lambda: _rmdir(group), "the memory cgroup can go"))
    (group / "memory.limit_in_bytes").write_text(str(48 << 20))
    words = shlex.join(
        command(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup, "--config", config)
    )
    inside = f"echo $$ > {group}/cgroup.procs; exec {words}"
    done = finish(start(["sh", "-c", inside]))
    assert done.code != 0, done
    if done.code > 0:  # else the kernel has killed it
        done.failed(FAILED)
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    underpass(bed.pins, "down").ok()
    assert list(BPFFS.glob(f"{bed.name}*")) == []
    assert sock_ops_on(bed.cgroup) == []


def _rmdir(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def test_the_largest_generation(bed: Bed, plane: MakePlane) -> None:
    """Claim: the largest sizes that a configuration may ask for load, carry and go."""
    largest = Settings(1_000_000, 16 << 20, 16384, 1 << 40)
    live = plane(largest)
    exchange(*couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT)), 1)
    assert live.capacity == 1_000_000
    assert len(live.pairs()) == 1
