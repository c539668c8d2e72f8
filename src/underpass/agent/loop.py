"""The agent at work: a loop that looks, decides by ``plan``, and acts."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from underpass import (
    __version__,
    adoption,
    bringup,
    calibration,
    config,
    dataplane,
    kubepods,
    metrics,
    namespaces,
)
from underpass.agent import calibrating, children, plan
from underpass.agent.calibrating import Calibrator
from underpass.agent.children import Child
from underpass.agent.events import Journal
from underpass.agent.lock import alone
from underpass.agent.node import Planes, arm, stamp
from underpass.agent.notify import Notifier
from underpass.agent.plan import Job, Step, Timetable
from underpass.agent.serving import Serving
from underpass.agent.signals import Late, Signals
from underpass.config import Agent as Options
from underpass.daemonset import Owner
from underpass.errors import UnderpassError, Unsupported, Usage
from underpass.generation import Dataplane
from underpass.metrics import Tally
from underpass.model import Settings
from underpass.pod import Pod
from underpass.pods import Source
from underpass.policy import Compiled
from underpass.reconcile import Change

#: Seconds between two looks for namespaces while mounts keep changing.
_CALM = 5.0
#: Seconds from a mount to the look for its namespace: more may follow.
_SETTLE = 1.0
#: Seconds at most between two turns of the loop.
_LONGEST_TURN = 10.0


class Names(Protocol):
    """Where pods and policy come in; see :meth:`Agent.run`.

    Every ``[agent] names`` seconds, and as soon as a generation has been brought into force,
    ``apply`` is called with the generations that hold pairs, the one in charge first, and
    ``fresh``: that one is new, and has been told nothing yet. So it is when ``fileno`` is readable.
    """

    def fileno(self) -> int:
        """Readable when pods have changed, until ``apply`` is called."""

    def apply(self, planes: list[Dataplane], *, fresh: bool) -> Change | None:
        """Look at the pods; set policy and groups where they have changed. Never waits."""

    def wanted(self) -> Compiled | None:
        """What a new generation is to begin with."""

    def reload(self, path: Path | None) -> None:
        """Another configuration is in force; raises Usage if its policy is wrong."""

    def trouble(self) -> str:
        """Who does not tell of pods, and why; empty if nothing is wrong."""

    def pods(self) -> list[Pod]:
        """The pods as they are known now; asked by any thread."""

    def sources(self) -> list[Source]:
        """How those do who tell of pods; asked by any thread."""

    def close(self) -> None:
        """The agent ends."""


@dataclass(frozen=True)
class Wanted:
    """What the agent was asked for.

    Attributes:
        pins: where the generation is.
        config: the file that is read again on SIGHUP.
        cgroup: the subtree of the command line; else the file's, else the root.
        down_on_exit: take the data plane down when the agent is told to end.
        owner: the DaemonSet that runs it: if that goes for good, so does the data plane.
    """

    pins: Path
    config: Path | None = None
    cgroup: Path | None = None
    down_on_exit: bool = False
    owner: Owner | None = None

    @property
    def may_leave(self) -> bool:
        """May the end of the agent be the end of the data plane?"""
        return self.down_on_exit or self.owner is not None


class Agent:
    """One run of the agent, from its start to its end.

    Attributes:
        late: a thread may still be at work that cannot be ended.

    Raises:
        Usage: the configuration is wrong.
    """

    def __init__(
        self,
        wanted: Wanted,
        journal: Journal,
        notifier: Notifier,
        make_names: Callable[[], Names] | None = None,
    ) -> None:
        self.wanted, self.journal, self.notifier = wanted, journal, notifier
        self._make_names = make_names
        self._planes = Planes(wanted.pins)
        self.names: Names | None = None
        self.tally = Tally(errors=journal.errors, turned_at=time.monotonic())
        self._file = stamp(wanted.config)
        self.settings, self.options = self._read()
        self.subtree = namespaces.check_cgroup(self._cgroup(self.options))
        self._lifted: set[str] = set()
        self._timetable = Timetable(self._every(self.options), time.monotonic())
        self._vain = 0  # passes of adoption in a row that took nothing in
        self._pending = True  # the configuration has not been brought into force yet
        self._retry_at, self._failures = 0.0, 0
        self._reaching: Child | None = None
        self._restoring = False
        self._calibrator = Calibrator(wanted.pins, journal)
        self._known: set[int] = set()
        self._fresh = True
        self._calm_at = 0.0
        self._serving = Serving(wanted.pins, self.tally, self._pods)
        self._served = False  # what is wanted has been in force at least once
        self._signals = Signals(patient=wanted.may_leave)
        self.late = False

    def _read(self) -> tuple[Settings, Options]:
        settings, options = config.read_all(self.wanted.config)
        return replace(settings, small=calibration.bounds()), options

    def _cgroup(self, options: Options) -> Path:
        root = namespaces.find_cgroup2()
        if self.wanted.cgroup or not options.cgroup:
            return self.wanted.cgroup or root
        return kubepods.find(root) if options.cgroup == kubepods.WORD else Path(options.cgroup)

    def _every(self, options: Options) -> dict[Job, float]:
        return {
            Job.CHECK: options.check,
            Job.ARM: options.scan,
            Job.ADOPT: options.adopt,
            Job.SWEEP: 12 * options.check,
            Job.NAME: options.names if self._make_names else 0.0,
        }

    # -- its life --------------------------------------------------------------------------

    def run(self) -> int:
        """Until SIGTERM or SIGINT.

        Returns:
            The exit code.

        Raises:
            UnderpassError: another agent is at work here, or what is wanted can never be.
        """
        namespaces.check_node()
        namespaces.ensure_bpffs(self.wanted.pins)
        with alone(self.wanted.pins), contextlib.ExitStack() as undo:
            self._wakeup = undo.enter_context(self._signals.heard())
            self._mounts = undo.enter_context(Path("/proc/self/mountinfo").open("rb"))
            self._serving.listen(self.options.listen)
            undo.callback(self._serving.listen, "")
            calibrating.sweep()
            self.journal.say(
                "start",
                version=__version__,
                pins=str(self.wanted.pins),
                cgroup=str(self.subtree),
                listen=self._serving.where,
                pid=os.getpid(),
            )
            if self._make_names:  # not before we are alone: it keeps what it knows for others
                self.names = self._make_names()
                undo.callback(self.names.close)
            try:
                while not self._signals.stop:
                    self._turn()
                return self._leave()
            except Late:
                self.notifier.stopping(5)
                self.journal.say("stopped", data_plane="goes on", late=True)
                self._end_children()
                self.late = True
                return 0
            except _Never as never:
                raise _Told(str(never), never.code) from None

    def _turn(self) -> None:
        now = self.tally.turned_at = time.monotonic()
        self.notifier.alive()
        if self._signals.reload:
            self._signals.reload = False
            self._attempt("reload", self._reload)
        self._reap()
        for job in self._timetable.due(now):
            self._timetable.begin(job)
            action = getattr(self, f"_{job}")
            well = self._attempt(job, action)
            (self._timetable.done if well else self._timetable.failed)(job, time.monotonic())
            if self._signals.stop or self._signals.reload:
                return
        self._wait(self._timetable.sleep(time.monotonic(), self._longest()))

    def _longest(self) -> float:
        watched = self.notifier.watchdog_seconds
        return min(_LONGEST_TURN, watched / 3) if watched else _LONGEST_TURN

    def _attempt(self, job: str, action: Callable[[], None]) -> bool:
        """Errors of one pass never end the loop."""
        try:
            action()
        except (UnderpassError, OSError, MemoryError) as error:
            self.journal.error(job, error)
            return False
        self.journal.well(job)
        return True

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        watched = time.monotonic() >= self._calm_at
        if watched:
            poll.register(self._mounts, select.POLLPRI)
        for child in (self._reaching, self._calibrator.child):
            if child:
                poll.register(child.fd, select.POLLIN)
        names = self.names.fileno() if self.names and self.tally.ready else -1
        if names >= 0:
            poll.register(names, select.POLLIN)
        for fd, _ in poll.poll(seconds * 1000):
            if fd == self._wakeup.fileno():
                self._wakeup.recv(1024)
            elif fd == names:
                self._timetable.hurry(Job.NAME, time.monotonic())
            elif fd == self._mounts.fileno():  # a namespace may have come, or gone
                self._calm_at = time.monotonic() + _CALM
                self._timetable.hurry(Job.ARM, time.monotonic() + _SETTLE)

    def _end_children(self) -> None:
        if self._reaching:
            self._reaching.end(signal.SIGKILL, 1.0)  # whatever it left, the next one completes
        self._reaching = None
        self._calibrator.end()

    def _leave(self) -> int:
        drain = self.options.drain if self.wanted.may_leave else 0.0
        self.notifier.stopping(drain + 5)
        self.tally.ready, self.tally.why_not = False, "the agent ends"
        self._end_children()
        self._planes.close()
        self._signals.in_time()
        if not self._going():
            self.journal.say("stopped", data_plane="goes on")
            return 0
        self.journal.say("down", drain=drain)
        left = dataplane.down(self.wanted.pins, drain)
        if left:
            self.journal.say("left", "warning", endpoints=len(left), first=left[0])
            return 1
        self.journal.say("stopped", data_plane="removed")
        return 0

    def _going(self) -> bool:
        """Does the data plane go with the agent?"""
        if self.wanted.down_on_exit or not self.wanted.owner:
            return self.wanted.down_on_exit
        verdict = self.wanted.owner.verdict()
        self.journal.say("asked", going=verdict.going, why=verdict.why)
        return verdict.going

    # -- jobs ------------------------------------------------------------------------------

    def _check(self) -> None:
        """Look at the generation; bring into force what is wanted."""
        if self.wanted.owner:
            self.wanted.owner.look()
            if self._config_changed():
                self._signals.reload = True
        if self._reaching:
            return
        seen = self._planes.look()
        step = plan.step(seen, wanted=self._pending)
        if step is Step.NOTHING:
            self._calibrate()
        if step is Step.NOTHING or time.monotonic() < self._retry_at:
            return
        self._restoring = step is Step.RESTORE
        if self._restoring and self.tally.ready:
            self.tally.ready, self.tally.why_not = False, "it was taken down; it is brought back"
            self.journal.say("lost", "warning", found=seen.state, attached=seen.attached)
        request = bringup.Request(
            str(self.wanted.pins),
            str(self.subtree),
            self.settings,
            tuple(sorted(self._lifted)),
            self.names.wanted() if self.names else None,
            compare=self._pending,
        )
        self._reaching = children.reach(msgspec.json.encode(request))

    def _reap(self) -> None:
        """Take the results of children that have ended."""
        if self._reaching and self._reaching.ended():
            child, self._reaching = self._reaching, None
            self._attempt("reach", lambda: self._reached(*child.result()))
        if self._calibrator.child and self._calibrator.child.ended():
            self._attempt("calibrate", self._calibrated)

    def _reached(self, code: int, said: bytes, line: str) -> None:
        try:
            answer = msgspec.json.decode(said, type=bringup.Answer)
        except msgspec.MsgspecError:
            answer = bringup.Answer(error=line or f"it ended with {code}", code=1)
        if answer.error:
            self._failures += 1
            self._retry_at = time.monotonic() + plan.later(self.options.check, self._failures)
            self.tally.why_not = answer.error
            if not self._served and answer.code in _NEVER:
                raise _Never(answer.error, answer.code)
            raise _Told(answer.error)
        self._failures, self._retry_at = 0, 0.0
        self._pending, self._fresh, self._served = False, True, True
        self._lifted.clear()
        self.tally.restored += self._restoring
        event = "upgraded" if answer.upgraded else "up" if answer.changed else "running"
        with Dataplane.open(self.wanted.pins) as plane:
            self.journal.say(
                event,
                generation=plane.number,
                version=plane.version,
                cgroup=str(plane.cgroup),
                state=plane.state,
                restored=self._restoring,
                pairs_in_older_generations=answer.stay,
            )
            words = f"{plane.state} on {plane.cgroup}"
        self._known = {ns.inode for ns in namespaces.net_namespaces()}
        self.tally.ready, self.tally.why_not = True, ""
        self.notifier.ready(words)
        self._attempt("name", self._name)
        for job in (Job.ADOPT, Job.CHECK):
            self._timetable.hurry(job, time.monotonic())

    def _name(self) -> None:
        """Pods and policy."""
        if not self.names or not self.tally.ready:
            return
        change = self.names.apply(self._planes.get(), fresh=self._fresh)
        self._fresh = False
        if change and plan.gains(*change):
            self._timetable.hurry(Job.ADOPT, time.monotonic() + plan.GATHER, plan.APART)
        if trouble := self.names.trouble():
            self.journal.error("pods", trouble)
        else:
            self.journal.well("pods")

    def _arm(self) -> None:
        """Arm the listeners of namespaces that have appeared, whoever made them."""
        if not self.tally.ready:
            return
        found = namespaces.net_namespaces()
        new = plan.newcomers(self._known, (ns.inode for ns in found))
        if new:
            with Dataplane.open(self.wanted.pins) as plane:
                armed = arm(plane, [ns for ns in found if ns.inode in new])
            names = sorted(ns.label for ns in found if ns.inode in new)
            self.journal.say("namespaces", new=names[:20], listeners_armed=armed)
        self._known = {ns.inode for ns in found}

    def _adopt(self) -> None:
        """Take in open connections that are on TCP."""
        if not self.tally.ready:
            return
        outcomes = adoption.adopt(self.wanted.pins)
        taken, stay = adoption.summary(outcomes)
        self.tally.passes += 1
        self.tally.adopted += taken
        # what is gone shows as 0, not as a series that ends
        self.tally.staying = dict.fromkeys(self.tally.staying, 0) | dict(stay)
        self._vain = 0 if taken else self._vain + 1
        again = max(adoption.again(outcomes), plan.later(plan.APART, self._vain))
        self._timetable.hurry(Job.ADOPT, time.monotonic() + again)
        if taken:
            self.journal.say("adopted", connections=taken, on_tcp=dict(stay))

    def _sweep(self) -> None:
        """Let go the generations that were replaced, once their last pair has closed."""
        if self.tally.ready and not self._reaching and dataplane.retired(self.wanted.pins):
            dataplane.up(self.wanted.pins, self.subtree, self.settings)

    # -- calibration -----------------------------------------------------------------------

    def _calibrate(self) -> None:
        """Put in force what is kept; only once the data plane is up, which waits for nothing."""
        found = self._calibrator.look(wanted=self.options.calibrate)
        if not found:
            return
        self.settings = replace(self.settings, small=found.bounds)
        with dataplane.opened(self.wanted.pins) as planes:
            for plane in planes:
                plane.set_small(found.bounds)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.measured_at))
        self.journal.say("calibrated", small=found.small, measured=at)

    def _calibrated(self) -> None:
        if line := self._calibrator.reap():
            raise _Told(line)
        self._timetable.hurry(Job.CHECK, time.monotonic())

    # -- reload ----------------------------------------------------------------------------

    def _config_changed(self) -> bool:
        """Has the kubelet put another file in place? It does so in one step, without SIGHUP."""
        before, self._file = self._file, stamp(self.wanted.config)
        return before != self._file

    def _reload(self) -> None:
        self.notifier.reloading()
        try:
            settings, options = self._read()
            if self._cgroup(options).resolve() != self.subtree:
                step = "restart the agent for that"
                raise Usage("reload", self.wanted.config, "it names another cgroup", step)
            self._serving.listen(options.listen)
            if self.names:
                self.names.reload(self.wanted.config)
        except UnderpassError:
            self.tally.reloads["refused"] += 1
            raise
        finally:
            self.notifier.ready("reloaded")
        before, self.settings, self.options = self.settings, settings, options
        ruled = {*settings.allow, *settings.deny}
        self._lifted = (self._lifted | {*before.allow, *before.deny}) - ruled
        self._timetable.change(self._every(options), time.monotonic())
        self._pending, self._retry_at = True, 0.0
        self._timetable.hurry(Job.CHECK, time.monotonic())
        self.tally.reloads["done"] += 1
        self.journal.say("reloaded", config=str(self.wanted.config))

    def _pods(self) -> metrics.Known | None:
        names = self.names
        return (len(names.pods()), names.sources()) if names else None


#: Exit codes of what waiting does not mend.
_NEVER = (Usage.exit_code, Unsupported.exit_code)


class _Told(UnderpassError):
    """A line that a child has already made."""

    def __init__(self, line: str, code: int = 1) -> None:
        Exception.__init__(self, line.removeprefix("underpass: "))
        self.exit_code = code


class _Never(Exception):
    """What is wanted can never be; ends the loop.

    Attributes:
        code: the exit code.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code
