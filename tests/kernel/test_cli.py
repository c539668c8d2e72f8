"""The command line on its good days: what each command does, prints and returns."""

from __future__ import annotations

import re
import shlex

from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.commands import command, finish, start, underpass
from tests.kernel.kernel_objects import sock_ops_on
from tests.kernel.remote import ROUND, couple, exchange
from underpass.torture.kernel_objects import pinned
from underpass.torture.plans import KIB

PORT = 8080
DIRECTION_KEYS = {"path", "reason", "shortcut_bytes", "shortcut_messages", "tcp_messages"}


def test_up_status_down(bed: Bed) -> None:
    """Claim: `status --json` tells absent, active and absent again, in the promised shape."""
    keys = {"state", "cgroup", "version", "counters", "open_pairs", "capacity"}
    counted = {
        "pairs_total",
        "shortcut_messages_total",
        "shortcut_bytes_total",
        "tcp_messages_total",
    }
    assert underpass(bed.pins, "status", "--json").document()["state"] == "absent"
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    status = underpass(bed.pins, "status", "--json").document()
    assert keys <= status.keys()
    assert counted <= status["counters"].keys()
    assert status["state"] == "active"
    assert status["cgroup"] == str(bed.cgroup)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", status["version"])
    assert status["capacity"] > 0
    assert status["open_pairs"] == status["counters"]["pairs_total"] == 0
    reasons = status["counters"]["tcp_messages_total"]
    assert reasons
    assert all(isinstance(number, int) for number in reasons.values())
    underpass(bed.pins, "down").ok()
    assert underpass(bed.pins, "status", "--json").document()["state"] == "absent"
    assert not bed.pins.exists()
    assert sock_ops_on(bed.cgroup) == []


def test_status_and_connections_follow_the_traffic(bed: Bed) -> None:
    """Claim: `connections --json` and `status --json` show a pair and what it carried."""
    assert underpass(bed.pins, "connections", "--json").document() == []
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    status = underpass(bed.pins, "status", "--json").document()
    assert status["open_pairs"] == status["counters"]["pairs_total"] == 1
    assert status["counters"]["shortcut_bytes_total"] >= 6 * ROUND
    [pair] = underpass(bed.pins, "connections", "--json").document()
    assert pair.keys() >= {"client", "server", "client_to_server", "server_to_client"}
    client = {"address": CLIENT4, "port": near.names()[0][1], "netns": bed.netns["client"]}
    assert pair["client"] == {**client, "pod": None}
    server = {"address": SERVER4, "port": PORT, "netns": bed.netns["server"]}
    assert pair["server"] == {**server, "pod": None}
    for direction in (pair["client_to_server"], pair["server_to_client"]):
        assert direction.keys() == DIRECTION_KEYS
        assert direction["path"] == direction["reason"] == "shortcut"
        sent = direction["shortcut_messages"] + direction["tcp_messages"]
        assert sent == 4
    text = underpass(bed.pins, "connections").ok().out
    assert f"{SERVER4}:{PORT}" in text
    assert "shortcut" in text
    assert underpass(bed.pins, "status").ok().out


def test_next_steps_can_be_run_as_they_are(bed: Bed) -> None:
    """Claim: with `--pins`, commands that a message names are for the same pins."""

    def step(text: str) -> list[str]:
        program, *words = shlex.split(re.findall("`(.*?)`", text)[-1])
        assert program == "underpass"
        return words

    nobody = f"{SERVER4}:9"  # tests beside this one use the same addresses
    for words in (("status",), ("explain", CLIENT4, nobody)):
        assert step(underpass(bed.pins, *words).ok().out)[:3] == ["--pins", str(bed.pins), "up"]
    [found] = underpass(bed.pins, "explain", CLIENT4, nobody, "--json").document()["findings"]
    assert step(found["next_step"])[:2] == ["--pins", str(bed.pins)]
    assert step(underpass(bed.pins, "pause").failed(1).err)[:2] == ["--pins", str(bed.pins)]
    assert step(underpass(bed.pins, "fly").failed(2).err) == ["--help"]
    assert step(underpass(bed.pins, "up", "--fly").failed(2).err)[2:] == ["up", "--help"]
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    back = step(underpass(bed.pins, "pause").ok().out)
    assert underpass(bed.pins, *back[2:]).ok().out == "underpass is active\n"


def test_up_twice_changes_nothing(bed: Bed) -> None:
    """Claim: a second `up` succeeds and leaves every program and map as it is."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    before = pinned(bed.pins)
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    assert pinned(bed.pins) == before
    assert len(sock_ops_on(bed.cgroup)) == 1


def test_down_with_nothing_up(bed: Bed) -> None:
    """Claim: `down` with nothing up, and `down` twice, succeed."""
    underpass(bed.pins, "down").ok()
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    underpass(bed.pins, "down").ok()
    underpass(bed.pins, "down").ok()


def test_two_ups_at_once(bed: Bed) -> None:
    """Claim: of several `up`s at once one loads, all succeed, and there is one generation."""
    words = command(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup)
    running = [start(words) for _ in range(4)]
    said = sorted(finish(process).ok().out for process in running)
    assert sum("already" in line for line in said) == 3
    assert len(sock_ops_on(bed.cgroup)) == 1
    assert [path for path in bed.pins.parent.glob(f"{bed.name}*") if path != bed.pins] == []
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    assert underpass(bed.pins, "status", "--json").document()["counters"]["pairs_total"] == 1


def test_up_and_down_at_once(bed: Bed) -> None:
    """Claim: `up` and `down` that meet take turns; afterwards the state is one or the other."""
    for _ in range(3):
        running = [
            start(command(bed.pins, *words))
            for words in (
                ("up", "--admit-unknown", "--cgroup", bed.cgroup),
                ("down",),
                ("up", "--admit-unknown", "--cgroup", bed.cgroup),
            )
        ]
        for process in running:
            finish(process).ok()
        state = underpass(bed.pins, "status", "--json").document()["state"]
        assert len(sock_ops_on(bed.cgroup)) == {"active": 1, "absent": 0}[state]


def test_pause_and_resume(bed: Bed) -> None:
    """Claim: `pause` keeps pairs and sends all by TCP, `resume` goes back; both show in status."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    underpass(bed.pins, "pause").ok()
    before = underpass(bed.pins, "status", "--json").document()
    assert before["state"] == "paused"
    assert before["open_pairs"] == 1
    exchange(near, far, 1)
    after = underpass(bed.pins, "status", "--json").document()["counters"]
    carried = "shortcut_messages_total"
    assert after[carried] == before["counters"][carried]
    assert after["tcp_messages_total"]["paused"] == 8
    underpass(bed.pins, "resume").ok()
    assert underpass(bed.pins, "status", "--json").document()["state"] == "active"
    exchange(near, far, 1)
    resumed = underpass(bed.pins, "status", "--json").document()["counters"]
    assert resumed[carried] > after[carried]


def test_a_down_that_cannot_finish_says_so(bed: Bed) -> None:
    """Claim: `down` names the endpoint that holds unread bytes, returns 1, and can finish later."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    near.send(1, 100 * KIB)
    underpass(bed.pins, "down", "--timeout", "1").failed(1, f"{SERVER4}:{PORT}", "down")
    assert underpass(bed.pins, "status", "--json").document()["state"] == "draining"
    far.receive(1, 100 * KIB)
    underpass(bed.pins, "down").ok()
    assert underpass(bed.pins, "status", "--json").document()["state"] == "absent"
    exchange(near, far, 1)


def test_explain_tells_why(bed: Bed) -> None:
    """Claim: `explain` names the path and the reason before, on and beside the shortcut."""
    words = ("explain", CLIENT4, f"{SERVER4}:{PORT}")
    assert f"--pins {bed.pins} up" in underpass(bed.pins, *words).ok().out
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    assert "shortcut" in underpass(bed.pins, *words).ok().out
    near.close()
    far.close()
    workers = bed.worker("client"), bed.worker("server", outside=True)
    exchange(*couple(*workers, (SERVER4, PORT + 1)), 3)
    said = underpass(bed.pins, "explain", CLIENT4, f"{SERVER4}:{PORT + 1}").ok().out
    assert "tcp" in said
    assert "cgroup" in said


def test_doctor_is_content(bed: Bed) -> None:
    """Claim: on a node where the tests run `doctor` passes, in words and as JSON."""
    report = underpass(bed.pins, "doctor", "--json").document()
    assert report["ok"] is True
    assert report["checks"]
    assert all(check["status"] in {"ok", "warning"} for check in report["checks"])
    assert underpass(bed.pins, "doctor").ok().out
    assert not bed.pins.exists()
