"""Bring what is wanted into force: `up`, or an upgrade of what runs already and differs.

The agent does this in a child of its own (:func:`main`): it needs much memory for a moment, and a
child can be ended at any time; the next one completes or clears what it left.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec

from underpass import __version__, dataplane, namespaces, selftest
from underpass.errors import UnderpassError, Unsupported
from underpass.generation import Dataplane
from underpass.model import Rule, Settings
from underpass.policy import Compiled


class Request(msgspec.Struct, frozen=True):
    """What is wanted.

    Attributes:
        pins: where.
        cgroup: the subtree.
        settings: sizes and rules.
        lifted: names of programs that had a rule and have none any more.
        policy: what a generation that is not live yet begins with: a pod that is denied shall not
            have the moment before.
        compare: an upgrade is due if what runs is of another version or size; else it may stay.
    """

    pins: str
    cgroup: str
    settings: Settings
    lifted: tuple[str, ...] = ()
    policy: Compiled | None = None
    compare: bool = True


class Answer(msgspec.Struct, frozen=True):
    """What became of it.

    Attributes:
        changed: it was not live before.
        upgraded: it replaced one of another version or size.
        stay: pairs that stay with the one before until they close.
        error: the one line of what failed; empty: nothing did.
        code: exit code that belongs to the error.
    """

    changed: bool = False
    upgraded: bool = False
    stay: int = 0
    error: str = ""
    code: int = 0


def differs(running: Settings, wanted: Settings) -> bool:
    """Does it take another generation to get from one to the other? Pure.

    Bounds of small messages, rules for programs and re-proof can be changed in place.
    """

    def fixed(settings: Settings) -> Settings:
        seconds = Settings.observe_seconds if settings.admit_unknown else settings.observe_seconds
        return replace(
            settings,
            allow=(),
            deny=(),
            small=wanted.small,
            reproof_seconds=wanted.reproof_seconds,
            observe_seconds=seconds,
        )

    return fixed(running) != fixed(wanted)


def reach(request: Request) -> Answer:
    """Do it.

    Raises:
        UnderpassError: as for :func:`dataplane.up` and :func:`dataplane.upgrade`.
    """
    pins, settings = Path(request.pins), request.settings
    subtree = namespaces.check_cgroup(Path(request.cgroup))
    broken = pins.exists() or fionread_broken()
    changed = dataplane.up(pins, subtree, settings, fionread_broken=broken, policy=request.policy)
    with Dataplane.open(pins) as plane:
        other = plane.version != __version__ or differs(plane.settings, settings)
    upgraded = other and request.compare
    stay = dataplane.upgrade(pins, settings) if upgraded else 0
    _in_place(pins, settings, request.lifted)
    return Answer(changed, upgraded, stay)


def _in_place(pins: Path, settings: Settings, lifted: tuple[str, ...]) -> None:
    with dataplane.opened(pins) as planes:
        rules = planes[0].rules()
        for plane in planes:
            if plane.settings.small != settings.small:
                plane.set_small(settings.small)
            if plane.settings.reproof_seconds != settings.reproof_seconds:
                plane.set_reproof(settings.reproof_seconds)
    wanted = dict.fromkeys(lifted, Rule.NONE)
    wanted |= dict.fromkeys(settings.allow, Rule.ALLOW) | dict.fromkeys(settings.deny, Rule.DENY)
    for name, rule in wanted.items():
        if rules.get((0, name.encode()), Rule.NONE) != rule:
            dataplane.set_rule(pins, name, rule)


def fionread_broken() -> bool:
    """Try this kernel before traffic does; tells whether the safe mode for FIONREAD is needed.

    Raises:
        Unsupported: it lacks a behaviour that underpass depends on.
    """
    namespaces.check_node()
    try:
        outcomes = selftest.run(quick=True)
    except Unsupported:
        raise
    except UnderpassError:
        return True  # no test bed here, as in a read-only cgroup file system: the safe mode
    for outcome in outcomes:
        if outcome.vital and not outcome.ok:
            cause = f"{outcome.name}: {outcome.detail}"
            raise Unsupported("trust", "this kernel", cause, "run `underpass doctor`")
    return selftest.fionread_broken(outcomes)


def main() -> None:
    """A request on stdin, an answer on stdout."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        answer = reach(request)
    except UnderpassError as error:
        answer = Answer(error=str(error), code=error.exit_code)
    except OSError as error:
        answer = Answer(error=f"cannot go on: {error}; run `underpass doctor`", code=1)
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
