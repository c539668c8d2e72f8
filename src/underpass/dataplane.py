"""The life of generations: up, upgrade, down, pause; what a killed one of these left is mended.

The pin directory is made beside its final place under a lock, renamed, and only then attached:
the pinned link is the last thing to appear and the mark of a live generation. An upgrade attaches
the new generation while it is still *closed* (it takes in no connection), exchanges the two
directories in one step, and then opens the new one; the old one keeps its pairs until they close.
Killed anywhere, each leaves nothing that steers wrongly, and the next command completes or clears
it.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from underpass import abi, enforcement, knobs, libbpf, namespaces, pinning, programs, records
from underpass.errors import KernelError, NotLoaded, UnderpassError, Usage
from underpass.generation import (
    BEQUEST,
    IN_FLIGHT_SECONDS,
    INHERITED,
    MAPS,
    OPTIONAL,
    PROGRAMS,
    Dataplane,
)
from underpass.model import Counters, Fault, Rule, Settings
from underpass.pinning import LATE_LINK, LINK, MAP_LINK, WATCH_LINKS
from underpass.policy import Compiled

__all__ = ["DEFAULT_PINS", "Dataplane", "down", "opened", "pause", "up", "upgrade"]

DEFAULT_PINS = namespaces.BPFFS / "underpass"
OBJECT = Path(__file__).with_name("underpass.bpf.o")
#: Generations that may hold pairs beside the one in charge: each sees every handshake.
MOST_RETIRED = 4
#: Seconds that a command which only steers waits for one that makes or ends generations.
_STEERING_WAITS = 10.0
#: The tracepoint of requests to io_uring, as it is called since 6.4, and before.
_URING = ("io_uring_submit_req", "io_uring_submit_sqe")


def up(  # noqa: PLR0913, PLR0917 - six things that a caller may want to be otherwise
    pins: Path,
    cgroup: Path,
    settings: Settings = Settings(),
    faults: Fault = Fault(0),
    fionread_broken: bool = True,
    policy: Compiled | None = None,
) -> bool:
    """Make a generation live at ``pins`` for the subtree ``cgroup``; returns when it is.

    Arms the listeners that already stand, in every network namespace.

    Args:
        pins: pin directory, in a bpffs.
        cgroup: cgroup-v2 directory.
        settings: sizes.
        faults: rules to leave out, for tests.
        fionread_broken: FIONREAD misses TCP bytes of sockets in a map (:mod:`.selftest` tells);
            True is the safe mode.
        policy: in force before the first connection; an upgrade takes it over, `down` ends it.

    Returns:
        True if something changed, False if it was live already.

    Raises:
        Unsupported: the kernel lacks something.
        UnderpassError: anything else; nothing is left behind.
    """
    namespaces.check_node()
    cgroup = namespaces.check_cgroup(cgroup)
    namespaces.ensure_bpffs(pins)
    with pinning.locked(pins):
        _recover(pins)
        if pins.exists():
            try:
                with Dataplane.open(pins) as plane:
                    if plane.attached:
                        _sweep(pins)
                        return _revive(plane, cgroup)
                _replace(pins)
            except NotLoaded:
                _remove_unused(pins)
        about = knobs.about(cgroup, settings, faults, fionread_broken)
        _load(pinning.scratch(pins), about, settings)
        _apply_rules(pinning.scratch(pins), settings)
        if policy:
            with Dataplane.open(pinning.scratch(pins)) as plane:
                enforcement.set_policy(plane, policy)
        pinning.scratch(pins).rename(pins)
        with contextlib.ExitStack() as undo:
            undo.callback(pinning.remove, pins)
            with Dataplane.open(pins) as plane:
                plane.attach()  # live from here on
            undo.pop_all()
        with Dataplane.open(pins) as plane:
            plane.arm_listeners()
    return True


def upgrade(
    pins: Path,
    settings: Settings | None = None,
    faults: Fault = Fault(0),
    fionread_broken: bool | None = None,
) -> int:
    """Put a new generation of programs and maps in charge; open pairs stay with the old one.

    Connections whose handshake is under way at this very moment stay on plain TCP.

    Args:
        pins: the generation to replace.
        settings: sizes of the new one; None keeps those of the old one.
        faults: rules to leave out, for tests.
        fionread_broken: as for :func:`up`; None keeps what the old one has.

    Returns:
        Pairs that the old generations still hold. They go on until they close or drain.

    Raises:
        NotLoaded: nothing is live at ``pins``.
        Unsupported: the kernel refuses the new programs.
        UnderpassError: anything else. Whatever is raised: the old one serves on, unchanged.
    """
    namespaces.check_node()
    if not pins.exists():
        Dataplane.open(pins)  # says that nothing is pinned there
    with pinning.locked(pins):
        _recover(pins)
        _sweep(pins)
        with Dataplane.open(pins) as old:
            if old.state == "draining" or not old.attached:
                step = "run `underpass down` to finish, then `underpass up`"
                raise UnderpassError("upgrade", pins, "it is on its way out", step)
            _make_room(pins)
            about = knobs.about(
                old.cgroup,
                settings or old.settings,
                faults,
                bool(old.about.knobs.fionread_broken)
                if fionread_broken is None
                else fionread_broken,
                old.number + 1,
            )
            _load(pinning.scratch(pins), about, settings or old.settings, closed=True)
            with contextlib.ExitStack() as undo:
                undo.callback(_recover, pins)  # before the exchange it clears, after it completes
                with Dataplane.open(pinning.scratch(pins)) as new:
                    if old.state == "paused":
                        new.set_paused(True)
                    new.attach()
                    new.take_over_guard(old)  # both watch by now: no sign falls in between
                    enforcement.take_over(new, old)
                    if settings:
                        _apply_rules(new.pins, settings)
                # the new one is in charge from here on
                pinning.exchange(pins, pinning.scratch(pins))
        _sweep(pins)
        return sum(_open_pairs(path) for path in retired(pins))


def down(
    pins: Path, timeout: float = 30.0, on_progress: Callable[[int], None] | None = None
) -> list[str]:
    """Leave with nothing lost: detach, all messages to TCP, take drained endpoints out, unpin.

    Args:
        pins: the generation; none there is no error. Those that it replaced go, too.
        timeout: seconds to wait for readers to consume what waits for them.
        on_progress: called with the number of endpoints still in the maps.

    Returns:
        The endpoints (text) that still hold unread bytes or are in use. They go on working; the
        generation stays pinned, in state ``draining``, until ``down`` is run again. Empty: all is
        gone.
    """
    if not places(pins):
        return []
    namespaces.check_bpffs(pins)  # or it is somebody's directory of files
    with pinning.locked(pins):
        _recover(pins)
        left = []
        for path in retired(pins):
            left += _take_down(path, pinning.scratch(pins), timeout, on_progress)
        if not pins.exists():
            return left
        if not left:
            return _take_down(pins, pinning.scratch(pins), timeout, on_progress)
        with Dataplane.open(pins) as plane:  # it goes last, but takes in nothing more
            plane.set_draining(True)
        return left


def drain(plane: Dataplane, timeout: float, on_progress: Callable[[int], None] | None) -> list[str]:
    """Take every endpoint out of the map that holds nothing unread; see :func:`down`."""
    deadline = time.monotonic() + timeout
    plane.set_draining(True)  # sock_ops stays attached: it frees stuck readers
    if not plane.closed:
        plane.disarm()
    if plane.endpoints():
        time.sleep(IN_FLIGHT_SECONDS)
    while True:
        left = plane.drain_step()
        if on_progress:
            on_progress(len(left))
        if not left or time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    plane.release()
    names = {ns.inode: ns.label for ns in namespaces.net_namespaces()} if left else {}
    return [
        f"{records.endpoint(r, names)} ({names.get(r.netns, '?')}): "
        + (f"{r.unread} bytes unread" if r.unread else "a call on it is under way")
        for r in left
    ]


def pause(pins: Path, paused: bool) -> None:
    """Send every message by TCP from now on, or let the shortcut be used again.

    Raises:
        NotLoaded: nothing is live at ``pins``.
        UnderpassError: it is draining, or an ``up`` or ``down`` is at work.
    """
    with _steered(pins) as planes:
        if planes[0].state == "draining":
            act, step = "pause" if paused else "resume", "run `underpass down` to finish"
            raise UnderpassError(act, pins, "it is draining", step)
        for plane in planes:
            plane.set_paused(paused)


@contextlib.contextmanager
def _steered(pins: Path) -> Iterator[list[Dataplane]]:
    """All generations, open, while no other command works on them: none is half-way in or out."""
    with Dataplane.open(pins), pinning.locked(pins, _STEERING_WAITS):
        _recover(pins)
        with opened(pins) as planes:
            yield planes


def generations(pins: Path) -> list[Path]:
    """The generation in charge and those before it that still hold pairs, the latest first."""
    return [pins, *reversed(retired(pins))]


def retired(pins: Path) -> list[Path]:
    """Generations that were replaced and still hold pairs, the oldest first."""
    names = f"{glob.escape(pins.name)}-old-[0-9]*"
    found = pins.parent.glob(names) if pins.parent.is_dir() else ()
    numbered = [(int(path.name.rpartition("-")[2]), path) for path in found]
    return [path for _, path in sorted(numbered)]


def set_rule(pins: Path, name: str, rule: Rule) -> int:
    """Allow or deny a program in all generations; see :meth:`Dataplane.set_rule`.

    Raises:
        NotLoaded: nothing is live at ``pins``.
        Usage: ``name`` is no name of a program.
    """
    _check_name(name)
    with _steered(pins) as planes:
        counts = [plane.set_rule(name, rule) for plane in planes]
        return counts[0]


def forget(pins: Path, name: str) -> int:
    """Forget what is known of a program in all generations; see :meth:`Dataplane.forget`."""
    _check_name(name)
    with _steered(pins) as planes:
        return sum(plane.forget(name) for plane in planes)


def set_policy(pins: Path, compiled: Compiled | None) -> None:
    """Put a policy in force in all generations; see :func:`underpass.enforcement.set_policy`.

    Raises:
        NotLoaded: nothing is live at ``pins``.
        KernelError: a table is full.
    """
    with _steered(pins) as planes:
        for plane in planes:
            enforcement.set_policy(plane, compiled)


def set_groups(pins: Path, groups: Mapping[int, int]) -> None:
    """Replace the groups of the policy; see :func:`underpass.enforcement.set_groups`."""
    with _steered(pins) as planes:
        for plane in planes:
            enforcement.set_groups(plane, groups)


def set_reproof(pins: Path, seconds: float) -> None:
    """How often a message of each direction takes the network path, in all generations."""
    with _steered(pins) as planes:
        for plane in planes:
            plane.set_reproof(seconds)


def _check_name(name: str) -> None:
    if cause := programs.wrong_name(name):
        step = "give the name of its executable, or an id of `underpass guard list`"
        raise Usage("find program", repr(name), cause, step)


@contextlib.contextmanager
def opened(pins: Path) -> Iterator[list[Dataplane]]:
    """All generations at ``pins``, the one in charge first, open for reading.

    Raises:
        NotLoaded: there is none.
    """
    with contextlib.ExitStack() as stack:
        planes = [stack.enter_context(Dataplane.open(pins))]
        for path in generations(pins)[1:]:
            with contextlib.suppress(NotLoaded):  # it has been swept meanwhile
                planes.append(stack.enter_context(Dataplane.open(path)))
        yield planes


def counters(planes: list[Dataplane]) -> Counters:
    """Totals of all generations since the first of them."""
    return records.counters(abi.add_up(plane.totals() for plane in planes))


def places(pins: Path) -> list[Path]:
    """Every directory of ours that is there for ``pins``."""
    every = [*generations(pins), pinning.scratch(pins), pinning.lock(pins)]
    return [path for path in every if path.exists()]


def try_load(program: str) -> bool:
    """Load one program by itself, and let it go again: what `doctor` probes with.

    Returns:
        False if the kernel has nothing that it could be attached to; it does without.

    Raises:
        UnderpassError: the kernel refuses it; the cause is the verifier's.
    """
    about = knobs.about(namespaces.find_cgroup2(), Settings(), Fault(0), True)
    with libbpf.Object(OBJECT) as loaded:
        loaded.set_constants(".rodata.knobs", about.knobs)
        loaded.select({program}, PROGRAMS)
        uring = loaded.aim("up_uring", _URING)
        loaded.load()
        return uring or program not in OPTIONAL


def own_programs(pins: Path) -> set[int]:
    """Ids of the sock_ops programs that the generations at ``pins`` have attached."""
    found = set()
    for path in generations(pins):
        with contextlib.suppress(UnderpassError), Dataplane.open(path) as plane:
            found.add(plane.program_id())
    return found


def attached(cgroup: Path) -> list[int]:
    """Ids of the sock_ops programs attached right at ``cgroup``, ours and others'."""
    with libbpf.Fd(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        return libbpf.attached(fd.number)


# -- making ----------------------------------------------------------------------------------


def _load(scratch: Path, about: abi.About, settings: Settings, *, closed: bool = False) -> None:
    """Load the object and pin its maps and programs in ``scratch``; all or nothing."""
    with contextlib.ExitStack() as undo, libbpf.Object(OBJECT) as loaded:
        loaded.set_entries("sockets", 2 * about.capacity)
        loaded.set_entries("grants", about.knobs.grants)
        loaded.set_constants(".rodata.knobs", about.knobs)
        left_out = set() if loaded.aim("up_uring", _URING) else OPTIONAL
        loaded.load()
        zero = ctypes.c_uint32(0)
        libbpf.update(loaded.map("about"), zero, about)
        libbpf.update(loaded.map("control"), zero, knobs.control(settings, closed=closed))
        try:
            scratch.mkdir(mode=0o700)
        except OSError as error:
            raise KernelError("make", scratch, error.errno or 0, "check bpffs") from None
        undo.callback(pinning.remove, scratch)
        for name in MAPS:
            libbpf.pin(loaded.map(name), scratch / name)
        for name in (name for name in PROGRAMS if name not in left_out):
            libbpf.pin(loaded.program(name), scratch / name)
        link = libbpf.attach_map(loaded.program("up_steer"), loaded.map("sockets"))
        if link:
            with link:
                libbpf.pin(link.number, scratch / MAP_LINK)
        undo.pop_all()


def _apply_rules(pins: Path, settings: Settings) -> None:
    with Dataplane.open(pins) as plane:
        for rule, names in ((Rule.ALLOW, settings.allow), (Rule.DENY, settings.deny)):
            for name in names:
                plane.set_rule(name, rule)


def _revive(plane: Dataplane, cgroup: Path) -> bool:
    """``up`` where a generation is pinned: finish a half-made or draining one.

    Returns:
        True if something changed.

    Raises:
        UnderpassError: it is for another cgroup.
    """
    if cgroup != plane.cgroup:
        cause = f"a generation for {plane.cgroup} is pinned at {plane.pins}"
        raise UnderpassError("bring up", cgroup, cause, "run `underpass down` first")
    changed = plane.state == "draining"
    if changed:
        plane.set_draining(False)
        if not (plane.pins / LINK).exists():
            plane.attach()
    plane.arm_listeners()
    return changed


# -- upgrading -------------------------------------------------------------------------------


def _complete_upgrade(pins: Path) -> None:
    """The new generation is at ``pins``, the old one at the scratch place: close it, open that."""
    scratch = pinning.scratch(pins)
    with Dataplane.open(pins) as new, Dataplane.open(scratch) as old:
        old.set_closed(True)
        new.set_closed(False)
        new.arm_listeners(before=old)
        taken = [int(path.name.rpartition("-")[2]) for path in retired(pins)]
        number = max([old.number, *(n + 1 for n in taken)])
        scratch.rename(pins.with_name(f"{pins.name}-old-{number}"))


def _recover(pins: Path) -> None:
    """Complete or clear what an ``up``, ``upgrade`` or ``down`` left that was killed."""
    scratch = pinning.scratch(pins)
    if pins.exists() and (scratch / LINK).exists():
        with Dataplane.open(pins) as plane, Dataplane.open(scratch) as other:
            exchanged = other.number < plane.number
        if exchanged:
            _complete_upgrade(pins)
    _clear(pins)  # unless it has just been renamed: nothing uses it


def _clear(pins: Path) -> None:
    """Remove the scratch directory; what it bequeaths is inherited first, in one step."""
    scratch = pinning.scratch(pins)
    if pins.exists() and (scratch / BEQUEST).exists():
        (scratch / BEQUEST).rename(pins / INHERITED)
    pinning.remove(scratch)


def _sweep(pins: Path) -> None:
    """Remove retired generations whose pairs have all closed; their totals are inherited."""
    for path in retired(pins):
        with Dataplane.open(path) as plane:
            if plane.endpoints():
                continue
        _retire(pins, path)


def _retire(pins: Path, path: Path) -> None:
    with Dataplane.open(path) as plane, Dataplane.open(pins) as heir:
        plane.detach()
        plane.release()
        plane.bequeath(heir)
        path.rename(pinning.scratch(pins))
    _clear(pins)


def _make_room(pins: Path) -> None:
    """Drain the oldest retired generation if there are as many as may be: its pairs go on by TCP.

    Raises:
        UnderpassError: its readers do not read what waits for them.
    """
    while len(old := retired(pins)) >= MOST_RETIRED:
        with Dataplane.open(old[0]) as plane:
            left = drain(plane, 5.0, None)
        if left:
            cause = f"{len(old)} earlier generations hold pairs, and of the oldest {left[0]}"
            raise UnderpassError("upgrade", pins, cause, "let it read, or close it, and try again")
        _retire(pins, old[0])


def _open_pairs(path: Path) -> int:
    with Dataplane.open(path) as plane:
        return plane.open_pairs()


# -- leaving ---------------------------------------------------------------------------------


def _take_down(
    path: Path, scratch: Path, timeout: float, on_progress: Callable[[int], None] | None
) -> list[str]:
    try:
        plane = Dataplane.open(path)
    except NotLoaded:
        _remove_unused(path)
        return []
    with plane:
        _refuse_foreign(path)
        left = drain(plane, timeout, on_progress)
        if not left:
            plane.detach()
            path.rename(scratch)
    pinning.remove(scratch)
    return left


def _replace(pins: Path) -> None:
    """Drain and unpin a generation whose cgroup has gone.

    Raises:
        UnderpassError: it holds endpoints with unread bytes.
    """
    for path in [*retired(pins), pins]:
        if _take_down(path, pinning.scratch(pins), 5.0, None):
            cause = "its cgroup has gone, and endpoints still hold unread bytes"
            raise UnderpassError("replace", pins, cause, "run `underpass down`, then up again")


def _remove_unused(pins: Path) -> None:
    """Clear what a killed ``up`` left: pins that no traffic can be using.

    Raises:
        UnderpassError: it may be in use, or is not ours.
    """
    step = f"name another pin directory, or remove {pins} by hand"
    if not pins.is_dir():
        raise UnderpassError("use", pins, "it is not a directory", step)
    _refuse_foreign(pins)
    if (pins / LINK).exists():
        raise UnderpassError("clear", pins, "it is attached, but not described", step)
    pinning.remove(pins)


def _refuse_foreign(pins: Path) -> None:
    names = {entry.name for entry in pins.iterdir()}
    links = (LINK, MAP_LINK, LATE_LINK, *WATCH_LINKS.values())
    if foreign := sorted(names.difference(MAPS, PROGRAMS, links, [BEQUEST])):
        cause, step = f"{foreign[0]} in it is not of underpass", f"move {pins / foreign[0]} away"
        raise UnderpassError("clear", pins, cause, step)
