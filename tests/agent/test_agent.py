"""The agent's life: up, taking over, ending in every way, and what must not end it."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.agents import Agent, Systemd, measuring
from tests.agent.conftest import StartAgent
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.commands import command, underpass
from tests.kernel.kernel_objects import sock_ops_on, wait_gone
from tests.kernel.remote import Remote, couple, exchange
from tests.kernel.waiting import holds_for, wait_until
from underpass import adoption, calibration, dataplane, pinning
from underpass.agent import plan
from underpass.agent.lock import place
from underpass.generation import Dataplane
from underpass.torture.kernel_objects import pinned
from underpass.torture.worker import Place, Worker

ADDRESS = (SERVER4, 8080)
ENDS = ("client", "server")


def _pair(bed: Bed) -> tuple[Remote, Remote]:
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    return near, far


def _carried(bed: Bed) -> int:
    with dataplane.opened(bed.pins) as planes:
        return dataplane.counters(planes).shortcut_messages_total


def _moves(bed: Bed, near: Remote, far: Remote) -> bool:
    """Whether what is sent now takes the shortcut."""
    before = _carried(bed)
    exchange(near, far, 1)
    return _carried(bed) > before


def _goes_by_the_shortcut(bed: Bed, near: Remote, far: Remote) -> None:
    assert _moves(bed, near, far)


def _number(bed: Bed) -> int:
    with Dataplane.open(bed.pins) as plane:
        return plane.number


def test_it_comes_up_and_a_restart_costs_nothing(bed: Bed, agent: StartAgent) -> None:
    """Claim: it brings up; ended, killed and started again it leaves an open pair accelerated."""
    first = agent()
    first.wait_ready()
    assert first.wait("up")["generation"] == 1
    near, far = _pair(bed)
    objects = pinned(bed.pins)
    assert first.end() == 0
    assert first.wait("stopped")["data_plane"] == "goes on"
    _goes_by_the_shortcut(bed, near, far)
    second = agent()
    second.wait("running")
    second.kill()
    _goes_by_the_shortcut(bed, near, far)
    third = agent()
    third.wait("running")
    third.wait_ready()
    _goes_by_the_shortcut(bed, near, far)
    assert pinned(bed.pins) == objects
    assert third.end() == 0


def test_it_can_leave_nothing(bed: Bed, agent: StartAgent) -> None:
    """Claim: `--down-on-exit` drains, removes, and leaves no pin, program, attachment or lock."""
    running = agent("--down-on-exit")
    running.wait_ready()
    near, far = _pair(bed)
    objects = pinned(bed.pins)
    assert running.end() == 0
    assert running.wait("stopped")["data_plane"] == "removed"
    assert [*bed.pins.parent.glob(f"{bed.name}*")] == []
    wait_gone(objects)
    assert sock_ops_on(bed.cgroup) == []
    exchange(near, far, 1)


def test_it_upgrades_what_differs(bed: Bed, agent: StartAgent) -> None:
    """Claim: a running generation of other sizes is upgraded once; open pairs go on."""
    words = ("up", "--admit-unknown", "--cgroup", bed.cgroup)
    underpass(bed.pins, *words).ok()
    near, far = _pair(bed)
    running = agent(top="capacity = 1000")
    assert running.wait("upgraded")["pairs_in_older_generations"] == 1
    running.wait_ready()
    with Dataplane.open(bed.pins) as plane:
        assert (plane.number, plane.capacity) == (2, 1000)
    _goes_by_the_shortcut(bed, near, far)
    running.end()
    agent(top="capacity = 1000").wait("running")
    assert _number(bed) == 2


def test_what_down_takes_it_brings_back(bed: Bed, agent: StartAgent) -> None:
    """Claim: after `down` it is up again, told and counted; `pause` stays."""
    running = agent()
    running.wait_ready()
    underpass(bed.pins, "pause").ok()
    near, far = _pair(bed)
    before = _carried(bed)
    assert holds_for(lambda: _carried(bed) == before, 0.6)
    assert "paused" in running.get("/readyz")[1]
    near.close()
    far.close()
    assert "an agent is at work" in underpass(bed.pins, "down").ok().out
    running.wait("lost")
    assert running.wait("up", 2)["restored"] is True
    running.wait_ready()
    assert running.metrics()["underpass_agent_restored_generations_total"][()] == 1
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8081))
    exchange(near, far, 1)
    _goes_by_the_shortcut(bed, near, far)


def test_a_second_agent_is_refused(bed: Bed, agent: StartAgent) -> None:
    """Claim: a second agent on the same pins ends with one line; the first does not notice."""
    running = agent()
    running.wait_ready()
    second = underpass(bed.pins, "agent", "--cgroup", bed.cgroup)
    second.failed(1, str(bed.pins), "another one")
    assert running.get("/readyz")[0] == http.client.OK
    assert not running.events("error")


def test_reload(bed: Bed, agent: StartAgent) -> None:
    """Claim: a wrong configuration is one line and changes nothing; a right one is taken over."""
    running = agent()
    running.wait_ready()
    running.config.write_text("capacity = 0")
    running.tell(signal.SIGHUP)
    told = running.wait("error")
    assert told["job"] == "reload"
    assert "capacity" in told["error"]
    assert "\n" not in told["error"]
    with Dataplane.open(bed.pins) as plane:
        assert (plane.number, plane.capacity) == (1, 65536)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running.write("capacity = 3000", listen=f'"127.0.0.1:{port}"')
        running.tell(signal.SIGHUP)
        assert str(port) in running.wait("error", 2)["error"]
    with Dataplane.open(bed.pins) as plane:
        assert (plane.number, plane.capacity) == (1, 65536)
    running.write("capacity = 2000", adopt="0.3")
    running.tell(signal.SIGHUP)
    running.wait("upgraded")
    with Dataplane.open(bed.pins) as plane:
        assert (plane.number, plane.capacity) == (2, 2000)
    metrics = running.metrics()
    assert metrics["underpass_agent_reloads_total"] == {("done",): 1, ("refused",): 2}
    assert metrics["underpass_agent_errors_total"]["reload",] == 2
    running.wait_ready()


def test_an_error_does_not_end_it(bed: Bed, agent: StartAgent) -> None:
    """Claim: while its cgroup is gone it is alive, not ready, and says so; then it comes back."""
    running = agent()
    running.wait_ready()
    bed.cgroup.rmdir()
    told = running.wait("error")
    assert str(bed.cgroup) in told["error"]
    assert running.get("/healthz")[0] == http.client.OK
    status, why = running.get("/readyz")
    assert status == http.client.SERVICE_UNAVAILABLE
    assert str(bed.cgroup) in why
    assert running.metrics()["underpass_agent_errors_total"]["reach",] >= 1
    bed.cgroup.mkdir()
    running.wait_ready()
    _pair(bed)


@pytest.mark.skipif(not adoption.possible(), reason="this kernel cannot adopt")
def test_it_takes_in_what_was_open(bed: Bed, agent: StartAgent) -> None:
    """Claim: a connection that is older than the agent is taken in, told and counted."""
    near, far = _pair(bed)
    running = agent()
    assert running.wait("adopted")["connections"] == 1
    assert running.metrics()["underpass_adopted_connections_total"][()] == 1
    _goes_by_the_shortcut(bed, near, far)


@pytest.mark.skipif(not adoption.possible(), reason="this kernel cannot adopt")
def test_who_becomes_known_is_taken_in_soon(bed: Bed, agent: StartAgent) -> None:
    """Claim: connections of a cgroup that nobody knew are taken in once it is known, an hour early.

    News that come in a burst cost a pass of adoption in five seconds at most.
    """
    place, pods = bed.cgroup / "place", bed.cgroup / "place/kubepods"
    for made in (place, pods, bed.cgroup / "kubepods"):  # what pods are made in is nobody's
        made.mkdir()
    running = agent(top='[pods]\napiserver = ""\ncri = ""\n', adopt="3600")
    running.wait_ready()
    running.wait("policy")
    client, server = (Worker(Place(bed.netns[where], place), where) for where in ENDS)
    for worker in (client, server):
        bed.undo.callback(worker.kill)
        bed.workers.append(worker)
    near, far = couple(client, server, ADDRESS)
    exchange(near, far, 1)
    with Dataplane.open(bed.pins) as plane:
        assert plane.counters().refused_total["policy"] > 0
    assert _carried(bed) == 0
    pods.rmdir()
    (bed.cgroup / "kubepods/look").mkdir()  # else it looks every ten seconds
    assert running.wait("adopted")["connections"] == 1
    _goes_by_the_shortcut(bed, near, far)
    before, began = _passes(running), time.monotonic()
    for number in range(6):
        known = bool(number % 2)
        (pods.rmdir if known else pods.mkdir)()
        (bed.cgroup / f"kubepods/look-{number}").mkdir()
        wait_until(lambda: _moves(bed, near, far) is known, f"it is known: {known}")  # noqa: B023 - now
    wait_until(lambda: _passes(running) > before, "another pass")
    assert _passes(running) - before <= (time.monotonic() - began) / plan.APART + 1


def _passes(running: Agent) -> float:
    return running.metrics()["underpass_adoption_passes_total"][()]


def _systemd(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    """What an agent that is started from now on tells of itself."""
    # the names of sockets are short
    address = Path(bed.undo.enter_context(tempfile.TemporaryDirectory()), "notify")
    manager = Systemd(address)
    bed.undo.callback(manager.close)
    monkeypatch.setenv("NOTIFY_SOCKET", str(address))
    return manager


def test_it_talks_to_systemd(bed: Bed, agent: StartAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: READY once it is live, WATCHDOG while it turns, RELOADING and READY, STOPPING."""
    manager = _systemd(bed, monkeypatch)
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    running: Agent = agent()
    manager.wait("READY=1")
    assert bed.pins.exists()
    assert running.get("/readyz")[0] == http.client.OK
    manager.wait("WATCHDOG=1")
    running.tell(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in manager.wait("RELOADING=1")
    manager.wait("READY=1")
    assert running.end() == 0
    manager.wait("STOPPING=1")


def test_usage_errors_end_it_at_once(bed: Bed, agent: StartAgent) -> None:
    """Claim: what waiting does not mend is one line and its exit code, and leaves nothing."""
    nowhere = bed.cgroup / "none"
    underpass(bed.pins, "agent", "--cgroup", nowhere).failed(2, str(nowhere))
    running = agent(listen='"nowhere"')
    assert running.process.wait(60) == 2
    wait_until(lambda: any("HOST:PORT" in line for line in running.lines), "it says why")
    assert not bed.pins.exists()
    assert not place(bed.pins).exists()


def test_it_ends_while_its_work_waits(
    bed: Bed, agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: told to end while it waits for another command's lock, it does not wait for that."""
    manager = _systemd(bed, monkeypatch)
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    near, far = _pair(bed)
    running = agent(top="capacity = 1000", check="0.1")
    running.wait("upgraded")  # the pair keeps the old generation, which is swept now and then
    near.close()
    far.close()
    with pinning.locked(bed.pins):
        wait_until(lambda: _stands(running), "its loop stands")
        assert running.end() == 0
        assert running.wait("stopped")["late"] is True
        manager.wait("STOPPING=1")
        assert not place(bed.pins).exists()
    assert pinned(bed.pins)
    agent(top="capacity = 1000").wait("running")
    assert len(dataplane.generations(bed.pins)) == 1


def _stands(running: Agent) -> bool:
    """Whether the agent's loop has not gone round for longer than a busy machine explains."""
    told = re.search(r"(\d+) s ago", running.get("/healthz")[1])
    return told is not None and int(told[1]) >= 5


@pytest.fixture
def state(tmp_path: Path) -> Iterator[list[str]]:
    """What runs a command with a place of the test's own for what is kept."""
    kept, own = calibration.PLACE.parent, tmp_path / "state"
    existed = kept.exists()
    kept.mkdir(exist_ok=True)
    own.mkdir()
    setting = f'mount --bind {own} {kept} && exec "$@"'
    yield ["unshare", "--mount", "sh", "-c", setting, "sh"]
    if not existed:
        kept.rmdir()


def _bounds(bed: Bed) -> dict[str, int]:
    with Dataplane.open(bed.pins) as plane:
        return plane.settings.small._asdict()


def test_it_measures_beside_its_work(bed: Bed, agent: StartAgent, state: list[str]) -> None:
    """Claim: with nothing kept it measures once it is up; told to end meanwhile it leaves nothing.

    What somebody else measures and keeps it puts in force at once, in the generation that runs.
    """
    running = agent(inside=state, calibrate="true")
    running.wait("calibration-begins")
    assert running.events("up")
    running.wait_ready()
    made = wait_until(lambda: measuring(running.process.pid), "it measures")
    assert running.end() == 0
    assert not any(path.exists() for path in made)
    running = agent(inside=state)
    running.wait_ready()
    assert not running.events("calibrated")
    inside = ["nsenter", "--mount", f"--target={running.process.pid}"]
    subprocess.run([*inside, *command(bed.pins, "calibrate", "--quick")], check=True)
    found = running.wait("calibrated")
    wait_until(lambda: _bounds(bed) == found["small"], "they are in force")
    assert _number(bed) == 1
    running.end()
    running = agent(inside=state, calibrate="true")
    assert running.wait("calibrated") == {**found, "time": running.events("calibrated")[0]["time"]}
    assert not running.events("calibration-begins")
    assert _bounds(bed) == found["small"]


@pytest.mark.timeout(500)
def test_it_calibrates_once(bed: Bed, agent: StartAgent, state: list[str], long_run: bool) -> None:
    """Claim: with nothing kept it measures beside its work, keeps and uses what it finds; once."""
    if not long_run:
        pytest.skip("3 min: UNDERPASS_LONG=1")
    running = agent(inside=state, calibrate="true")
    running.wait("calibration-begins")
    running.wait_ready()
    wait_until(lambda: running.events("calibrated") or running.events("error"), "it ends", 400)
    for error in running.events("error"):
        assert "other work" in error["error"], error
        pytest.skip(error["error"])
    [found] = running.events("calibrated")
    assert _bounds(bed) == found["small"]
