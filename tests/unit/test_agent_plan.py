"""What the agent does next: decided without a clock."""

from __future__ import annotations

import io
import json
import math
import socket
from dataclasses import replace

import pytest

from underpass import config, policy
from underpass.agent import events, server
from underpass.agent.events import Journal
from underpass.agent.plan import (
    APART,
    LONGEST,
    Job,
    Seen,
    Step,
    Timetable,
    gains,
    later,
    newcomers,
    step,
)
from underpass.bringup import differs
from underpass.errors import UnderpassError, Usage
from underpass.model import Settings, Small
from underpass.pod import MARK, Pod
from underpass.policy import Compiled, Mode, Policy, Rule

EVERY = {Job.CHECK: 5.0, Job.ADOPT: 60.0, Job.ARM: 0.0}


def _done(table: Timetable, job: Job, now: float) -> None:
    table.begin(job)
    table.done(job, now)


def test_jobs_come_in_their_time() -> None:
    """Claim: all are due at once, then each after its own interval, and one with none never."""
    table = Timetable(EVERY, 100.0)
    assert table.due(100.0) == [Job.CHECK, Job.ADOPT]
    _done(table, Job.CHECK, 101.0)
    _done(table, Job.ADOPT, 102.0)
    assert table.due(105.9) == []
    assert table.due(106.0) == [Job.CHECK]
    assert table.sleep(102.0, 10.0) == 4.0
    assert table.sleep(102.0, 1.0) == 1.0
    assert table.sleep(200.0, 1.0) == 0.0


def test_what_fails_is_tried_later_and_later() -> None:
    """Claim: the wait doubles up to a bound, and one success ends that."""
    assert [later(5.0, n) for n in (1, 2, 3, 100)] == [5.0, 10.0, 20.0, LONGEST]
    assert later(900.0, 3) == 900.0
    table = Timetable(EVERY, 0.0)
    table.failed(Job.CHECK, 0.0)
    table.failed(Job.CHECK, 5.0)
    assert table.due(14.9) == [Job.ADOPT]
    assert Job.CHECK in table.due(15.0)
    _done(table, Job.CHECK, 15.0)
    table.failed(Job.CHECK, 20.0)
    assert Job.CHECK in table.due(25.0)


def test_hurry_and_change() -> None:
    """Claim: a job can be hurried, never put off; other intervals hold at once."""
    table = Timetable(EVERY, 0.0)
    for job in (Job.CHECK, Job.ADOPT):
        _done(table, job, 0.0)
    table.hurry(Job.ADOPT, 1.0)
    table.hurry(Job.CHECK, 50.0)
    table.hurry(Job.ARM, 0.0)
    assert table.due(1.0) == [Job.ADOPT]
    assert table.due(5.0) == [Job.CHECK, Job.ADOPT]
    _done(table, Job.ADOPT, 1.0)
    table.change({Job.CHECK: 500.0, Job.ADOPT: 2.0, Job.ARM: 9.0}, 1.0)
    assert table.due(1.0) == [Job.ARM]
    assert table.due(3.0) == [Job.ARM, Job.ADOPT]
    assert table.due(5.0) == [Job.CHECK, Job.ARM, Job.ADOPT]


def test_what_is_hurried_keeps_its_distance() -> None:
    """Claim: news join one run; the next is never sooner than some seconds after the last."""
    table = Timetable(EVERY, 0.0)
    _done(table, Job.ADOPT, 0.0)
    for news in (10.0, 11.0, 11.9):
        table.hurry(Job.ADOPT, news + 2.0, APART)
    assert Job.ADOPT not in table.due(11.9)
    assert Job.ADOPT in table.due(12.0)
    _done(table, Job.ADOPT, 12.0)
    table.hurry(Job.ADOPT, 13.0, APART)
    table.change(EVERY, 13.0)
    assert Job.ADOPT not in table.due(16.9)
    assert Job.ADOPT in table.due(17.0)
    table.failed(Job.ADOPT, 17.0)
    table.hurry(Job.ADOPT, 18.0, APART)
    assert Job.ADOPT not in table.due(21.9)
    assert Job.ADOPT in table.due(22.0)


def test_what_is_hurried_as_it_runs_is_about_its_next_run() -> None:
    """Claim: a pass that leaves some for later is followed by one then; one that fails waits."""
    table = Timetable(EVERY, 0.0)
    table.begin(Job.ADOPT)
    table.hurry(Job.ADOPT, 11.0)
    table.done(Job.ADOPT, 1.0)
    assert Job.ADOPT not in table.due(10.9)
    assert Job.ADOPT in table.due(11.0)
    table.begin(Job.ADOPT)
    table.hurry(Job.ADOPT, math.inf)
    table.done(Job.ADOPT, 12.0)
    assert Job.ADOPT in table.due(72.0)
    assert Job.ADOPT not in table.due(71.9)
    table.begin(Job.ADOPT)
    table.hurry(Job.ADOPT, 73.0)
    table.failed(Job.ADOPT, 72.0)
    assert Job.ADOPT not in table.due(131.9)


_POD = Pod("default", "web", "u", cgroup="kubepods/pod1", cgroup_id=7, namespace_labels={})
_OUT = replace(_POD, labels={MARK: "off"})
_IN = replace(_POD, labels={MARK: "on"})
_DENIED = Rule(allow=False, pod_labels={"app": ("web",)})
_DENIED_WEB = Rule(allow=False, ports=((80, 80),), pod_labels={"app": ("web",)})


def _of(rules: Policy, *pods: Pod) -> Compiled:
    return policy.compile(rules, pods, {"kubepods": 1})


_NONE_KNOWN = _of(Policy())
_OPT_IN = Policy(Mode.OPT_IN)


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [
        pytest.param(_NONE_KNOWN, _of(Policy(), _POD), True, id="a pod is known"),
        pytest.param(_NONE_KNOWN, _of(Policy(), _OUT), False, id="one that opts out is known"),
        pytest.param(_of(Policy(), _OUT), _of(Policy(), _POD), True, id="it opts out no more"),
        pytest.param(_of(Policy(), _POD), _of(Policy(), _OUT), False, id="it opts out"),
        pytest.param(_of(Policy(), _POD), _NONE_KNOWN, False, id="it goes"),
        pytest.param(_of(_OPT_IN, _POD), _of(_OPT_IN, _IN), True, id="it opts in"),
        pytest.param(_NONE_KNOWN, _of(_OPT_IN, _POD), False, id="nobody opts in"),
        pytest.param(_of(_OPT_IN, _POD), _of(Policy(), _POD), True, id="another mode"),
        pytest.param(_of(Policy(), _POD), _of(_OPT_IN, _POD), False, id="a stricter mode"),
        pytest.param(
            _of(Policy(rules=(_DENIED,)), replace(_POD, labels={"app": "web"})),
            _of(Policy(rules=(_DENIED_WEB,)), replace(_POD, labels={"app": "web"})),
            True,
            id="a rule holds for one port alone",
        ),
        pytest.param(_of(_OPT_IN, _POD), None, True, id="no policy any more"),
        pytest.param(None, _of(Policy(), _POD), False, id="a policy at last"),
        pytest.param(None, None, False, id="none at all"),
    ],
)
def test_when_adoption_is_hurried(
    before: Compiled | None, after: Compiled | None, more: bool
) -> None:
    """Claim: it is when connections may take the shortcut that might not, and then alone."""
    assert gains(before, after) is more


@pytest.mark.parametrize(
    ("seen", "wanted", "what"),
    [
        (Seen("absent"), True, Step.REACH),
        (Seen("active", 1), True, Step.REACH),
        (Seen("active", 1), False, Step.NOTHING),
        (Seen("paused", 1), False, Step.NOTHING),
        (Seen("absent"), False, Step.RESTORE),
        (Seen("draining", 1), False, Step.RESTORE),
        (Seen("active", 1, attached=False), False, Step.RESTORE),
    ],
)
def test_steps(seen: Seen, wanted: bool, what: Step) -> None:
    """Claim: what is wanted is brought about, what was taken down comes back, a pause stays."""
    assert step(seen, wanted=wanted) is what


def test_newcomers() -> None:
    """Claim: namespaces that have been seen are not new, those that went are nothing."""
    assert newcomers({1, 2}, [2, 3]) == {3}


def test_what_takes_another_generation() -> None:
    """Claim: sizes do; rules, bounds and a time that nobody waits for do not."""
    plain = Settings()
    assert differs(plain, Settings(capacity=9))
    assert differs(plain, Settings(observe_seconds=3))
    assert differs(plain, Settings(admit_unknown=True))
    assert not differs(plain, Settings(allow=("a",), deny=("b",), small=Small(virtual=7)))
    assert not differs(plain, Settings(reproof_seconds=0))
    assert not differs(
        Settings(admit_unknown=True), Settings(admit_unknown=True, observe_seconds=3)
    )


def test_events_are_lines() -> None:
    """Claim: an event is one JSON line for machines and one line of text for people."""
    for text in (False, True):
        stream = io.StringIO()
        Journal(stream, text=text).say("up", generation=3, cause="two\nlines")
        assert stream.getvalue().count("\n") == 1
        assert "generation" in stream.getvalue()
    event = json.loads(events.json_line(0.5, "up", "info", {"generation": 3}))
    assert event == {
        "time": "1970-01-01T00:00:00.500Z",
        "level": "info",
        "event": "up",
        "generation": 3,
    }


def test_an_error_is_told_once_and_counted_always() -> None:
    """Claim: the same error again is not told; another one, or the same after a success, is."""
    stream = io.StringIO()
    journal = Journal(stream, text=False)
    for error in ("one", "one", "two"):
        journal.error("check", error)
    journal.well("check")
    journal.well("check")
    journal.error("check", "two")
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in told] == ["error", "error", "recovered", "error"]
    assert journal.errors == {"check": 4}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        (":9464", ("", 9464)),
        ("[::1]:0", ("::1", 0)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    """Claim: an address is a host and a port."""
    assert server.parse(text) == address


@pytest.mark.parametrize("text", ["9464", "here", "::1:9464", ":", "a:b", ":65536", ":-1"])
def test_wrong_addresses(text: str) -> None:
    """Claim: what is none is refused in a line."""
    with pytest.raises(Usage, match=r"HOST:PORT"):
        server.parse(text)


def test_the_agents_table_has_defaults() -> None:
    """Claim: without a file the agent listens on loopback alone."""
    assert config.read_all(None)[1] == config.Agent()
    assert config.Agent().listen.startswith("127.0.0.1:")


def test_a_port_that_is_taken_may_be_free_later() -> None:
    """Claim: that is no mistake of the configuration, after which no supervisor would try again."""
    pages = server.Pages(lambda: (b"", ""), lambda: (True, ""), lambda: (True, ""))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnderpassError, match="in use") as raised:
            server.Server(where, pages)
    assert raised.value.exit_code == 1
