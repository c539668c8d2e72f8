"""`explain` asks both ends of a connection, in every generation, and names the programs."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import remote
from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.commands import underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass import dataplane, programs
from underpass.model import Settings
from underpass.torture.worker import Worker

PORT = 10000 + 2 * (os.getpid() % 10000)
"""Of this process: tests beside it use these addresses, and `explain` tells of the whole node."""


def _explained(bed: Bed, port: int = PORT) -> list[dict[str, Any]]:
    words = ("explain", CLIENT4, f"{SERVER4}:{port}", "--json")
    found: list[dict[str, Any]] = underpass(bed.pins, *words).document()["findings"]
    return found


def _pair(bed: Bed, port: int = PORT) -> tuple[Remote, Remote]:
    ends = couple(bed.worker("client"), bed.worker("server"), (SERVER4, port))
    exchange(*ends, 1)
    return ends


def _shut(number: int) -> None:
    remote._SOCKETS[number].shutdown(socket.SHUT_WR)


def _shut_down(end: Remote) -> None:
    end.worker.call(_shut, end.number)


def _id(worker: Worker) -> str:
    found = programs.identify(worker.pid)
    assert found
    return programs.id_of(found[0])


def _until(bed: Bed, reason: str) -> dict[str, Any]:
    """Wait until the one finding has this reason: a socket leaves with a packet of its own."""
    told: list[str] = []

    def tells() -> bool:
        told[:] = [f["reason"] for f in _explained(bed)]
        return told == [reason]

    try:
        wait_until(tells, f"it is {reason}")
    except AssertionError:
        pytest.fail(f"it is {told}, not {reason}")
    return _explained(bed)[0]


def _guilty(bed: Bed, found: dict[str, Any], worker: Worker, verdict: str) -> None:
    """Check that the program is named, in the JSON and in words."""
    [program] = found["programs"]
    assert (program["id"], program["verdict"]) == (_id(worker), verdict)
    text = underpass(bed.pins, "explain", CLIENT4, f"{SERVER4}:{PORT}").ok().out
    for word in (program["name"], program["id"], verdict, "guard list"):
        assert word in text


@pytest.mark.parametrize("upgraded", [False, True], ids=["one generation", "upgraded"])
@pytest.mark.parametrize("end", ["client", "server"])
def test_a_program_that_was_denied(bed: Bed, plane: MakePlane, end: str, *, upgraded: bool) -> None:
    """Claim: after `guard deny` the reason is told, and whose it is, whichever end left."""
    plane()
    near, far = _pair(bed)
    _pair(bed, PORT + 1)  # of other programs: holds the first generation
    if upgraded:
        dataplane.upgrade(bed.pins)
    denied = near if end == "client" else far
    underpass(bed.pins, "guard", "deny", _id(denied.worker)).ok()

    def left() -> bool:
        stream, other = (1, far) if denied is near else (2, near)
        denied.send(stream, 1)
        other.receive(stream, 1)
        return [f["reason"] for f in _explained(bed)] == ["guarded"]

    wait_until(left, "the pair leaves the map")
    _guilty(bed, _explained(bed)[0], denied.worker, "denied")
    underpass(bed.pins, "guard", "allow", _id(denied.worker)).ok()
    assert "By now the " in _explained(bed)[0]["sentence"]


def test_a_program_that_is_watched(bed: Bed, plane: MakePlane) -> None:
    """Claim: of a program that is still watched its name, id and verdict are told."""
    plane(Settings(observe_seconds=600), watch=True)
    near, _ = _pair(bed)
    underpass(bed.pins, "guard", "allow", _id(near.worker)).ok()
    ends = couple(near.worker, bed.worker("server"), (SERVER4, PORT + 1))
    exchange(*ends, 3)
    [found] = _explained(bed, PORT + 1)
    assert found["reason"] == "observed"
    assert [p["id"] for p in found["programs"]] == [_id(ends[1].worker)]
    assert "says admitted" in found["next_step"]


@pytest.mark.parametrize("end", ["client", "server"])
@pytest.mark.parametrize("upgraded", [False, True], ids=["one generation", "upgraded"])
def test_an_end_that_was_shut_down(bed: Bed, plane: MakePlane, end: str, *, upgraded: bool) -> None:
    """Claim: a half-close is told of either end, from whichever generation holds it."""
    plane()
    near, far = _pair(bed)
    _pair(bed, PORT + 1)
    if upgraded:
        dataplane.upgrade(bed.pins)
    closing, other = (near, far) if end == "client" else (far, near)
    _shut_down(closing)
    other.expect_eof()  # an end of file that is not read looks like a stuck reader
    _until(bed, "half-closed")


def test_an_end_that_has_closed(bed: Bed, plane: MakePlane) -> None:
    """Claim: of a pair whose server has closed it is not said that it was never local."""
    plane()
    _, far = _pair(bed)
    far.close()
    _until(bed, "peer-gone")


def test_a_generation_that_has_gone(bed: Bed, plane: MakePlane) -> None:
    """Claim: where nothing remembers any more, both possible causes are named."""
    plane()
    near, far = _pair(bed)
    underpass(bed.pins, "guard", "deny", _id(near.worker)).ok()

    def left() -> bool:
        exchange(near, far, 1, rounds=1)
        with dataplane.opened(bed.pins) as planes:
            return planes[0].endpoints() == []

    wait_until(left, "both ends leave the map")
    assert _explained(bed)[0]["reason"] == "guarded"
    dataplane.upgrade(bed.pins)
    assert dataplane.retired(bed.pins) == []
    [found] = _explained(bed)
    assert found["reason"] == "opened-before-up"
    assert "generation that has been replaced" in found["sentence"]


def _deny_port(bed: Bed, place: Path) -> None:
    file = place / "policy.toml"
    file.write_text(f"[[policy.rule]]\naction = 'deny'\nports = [{PORT}]\n")
    underpass(bed.pins, "policy", "apply", file).ok()


def test_a_connection_that_is_not_open(bed: Bed, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: guard and policy are asked for a connection that nobody has opened yet."""
    plane()
    server = bed.worker("server")
    listen(server, (SERVER4, PORT))
    assert [f["reason"] for f in _explained(bed)] == ["ready"]
    assert _id(server) in _explained(bed)[0]["sentence"]
    underpass(bed.pins, "guard", "deny", _id(server)).ok()
    assert [f["reason"] for f in _explained(bed)] == ["guarded"]
    _guilty(bed, _explained(bed)[0], server, "denied")
    _deny_port(bed, tmp_path)
    assert [f["reason"] for f in _explained(bed)] == ["policy"]


def test_a_policy_after_the_guard(bed: Bed, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: what the guard kept out and a policy keeps out by now is told of both."""
    plane()
    worker = bed.worker("client")
    exchange(*couple(worker, bed.worker("server"), (SERVER4, PORT + 1)), 1)  # it is known by now
    underpass(bed.pins, "guard", "deny", _id(worker)).ok()
    exchange(*couple(worker, bed.worker("server"), (SERVER4, PORT)), 1)
    _until(bed, "guarded")
    _deny_port(bed, tmp_path)
    [found] = _explained(bed)
    assert (found["reason"], len(found["programs"])) == ("guarded", 1)
    assert f"denied by: deny port {PORT}" in found["sentence"]
    assert "policy show" in found["next_step"]


def test_two_families(bed: Bed) -> None:
    """Claim: an IPv4 and an IPv6 address are a usage error."""
    underpass(bed.pins, "explain", CLIENT4, "[fd77::1]:1").failed(2, "cannot explain", "IPv6")
