"""One generation of programs and maps: load, pin, attach, open, pause, drain.

The data plane lives in the kernel and in pins; it outlives every process of ours. The pin
directory is made beside its final place under a lock, renamed, and only then attached: the pinned
link is the last thing to appear and the mark of a live generation. Killed half-way, ``up`` leaves
nothing that steers traffic, and the next ``up`` clears or completes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from underpass import abi, knobs, libbpf, namespaces, pinning, records
from underpass.errors import KernelError, NotLoaded, UnderpassError
from underpass.model import (
    REFUSALS,
    TCP_REASONS,
    Counters,
    Fault,
    Pair,
    Reason,
    Settings,
    Socket,
)

DEFAULT_PINS = namespaces.BPFFS / "underpass"
OBJECT = Path(__file__).with_name("underpass.bpf.o")
#: Redirects that were decided before the stop flag was seen are over after this many seconds.
IN_FLIGHT_SECONDS = 1.5

_MAPS = ("sockets", "control", "counters", "handshakes", "syns", "grants", "holders", "about")
PROGRAMS = (
    "up_handshake",
    "up_steer",
    "up_arm",
    "up_disarm",
    "up_sockets",
    "up_release",
    "up_list",
    "up_drain",
)
_ARRAY, _PERCPU_ARRAY = 2, 6  # enum bpf_map_type
#: Type, key and value size of the maps that are read into memory of ours.
_SIZES = {
    "about": (_ARRAY, 4, ctypes.sizeof(abi.About)),
    "control": (_ARRAY, 4, ctypes.sizeof(abi.Control)),
    "counters": (_PERCPU_ARRAY, 4, ctypes.sizeof(abi.Counters)),
}
_HANDOFF_KEYS = {"handshakes": 8, "syns": 4}
_LINK, _MAP_LINK = "link_handshake", "link_steer"
_ZERO = ctypes.c_uint32(0)


def up(
    pins: Path,
    cgroup: Path,
    settings: Settings = Settings(),
    faults: Fault = Fault(0),
    fionread_broken: bool = True,
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
        pinning.remove(pinning.scratch(pins))
        if pins.exists():
            try:
                with Dataplane.open(pins) as plane:
                    if plane.attached:
                        return plane.revive(cgroup)
                    _replace(plane)
            except NotLoaded:
                _remove_unused(pins)
        about = knobs.about(cgroup, settings, faults, fionread_broken)
        _load(pinning.scratch(pins), about)
        pinning.scratch(pins).rename(pins)
        with contextlib.ExitStack() as undo:
            undo.callback(pinning.remove, pins)
            with Dataplane.open(pins) as plane:
                plane.attach()  # live from here on
            undo.pop_all()
        with Dataplane.open(pins) as plane:
            plane.arm_listeners()
    return True


def down(
    pins: Path, timeout: float = 30.0, on_progress: Callable[[int], None] | None = None
) -> list[str]:
    """Leave with nothing lost: detach, all messages to TCP, take drained endpoints out, unpin.

    Args:
        pins: the generation; none there is no error.
        timeout: seconds to wait for readers to consume what waits for them.
        on_progress: called with the number of endpoints still in the map.

    Returns:
        The endpoints (text) that still hold unread bytes. They go on working; the generation
        stays pinned, in state ``draining``, until ``down`` is run again. Empty: all is gone.
    """
    if not any(path.exists() for path in (pins, pinning.scratch(pins), pinning.lock(pins))):
        return []
    namespaces.check_bpffs(pins)  # or it is somebody's directory of files
    with pinning.locked(pins):
        pinning.remove(pinning.scratch(pins))
        if not pins.exists():
            return []
        try:
            plane = Dataplane.open(pins)
        except NotLoaded:
            _remove_unused(pins)
            return []
        with plane:
            _refuse_foreign(pins)
            left = plane.drain(timeout, on_progress)
            if not left:
                pins.rename(pinning.scratch(pins))
        pinning.remove(pinning.scratch(pins))
    return left


class Dataplane:
    """A pinned generation, open for reading and steering. Use as a context manager."""

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self._fds: dict[str, libbpf.Fd] = {}
        self.about = abi.About()

    @classmethod
    def open(cls, pins: Path) -> Dataplane:
        """Open the generation at ``pins``.

        Raises:
            NotLoaded: there is none, or not one of this version's ABI.
            KernelError: it cannot be opened (no permission).
        """
        plane = cls(pins)
        step = "use the underpass that loaded it, or remove it by hand if nothing uses it"
        try:
            sizes = libbpf.map_sizes(plane._fd("about"))
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NotLoaded(
                    "open", pins, "no generation is pinned there", "run `underpass up`"
                ) from None
            raise
        if sizes != _SIZES["about"]:  # before it is read: a larger value would not fit
            raise UnderpassError("use", pins, "it is not a generation of this version", step)
        libbpf.lookup(plane._fd("about"), _ZERO, plane.about)
        if plane.about.abi != abi.ABI:
            cause = f"its ABI is {plane.about.abi}, this is {abi.ABI}"
            raise UnderpassError("use", pins, cause, step)
        if missing := [name for name in (*_MAPS, *PROGRAMS) if not (pins / name).exists()]:
            raise UnderpassError("use", pins, f"its pin {missing[0]} is missing", step)
        for name, wanted in _SIZES.items():
            if libbpf.map_sizes(plane._fd(name)) != wanted:
                raise UnderpassError("use", pins, f"its pin {name} is another map", step)
        return plane

    def __enter__(self) -> Dataplane:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors; the generation goes on."""
        for fd in self._fds.values():
            fd.close()
        self._fds.clear()

    def _fd(self, name: str) -> int:
        if name not in self._fds:
            self._fds[name] = libbpf.get(self.pins / name)
        return self._fds[name].number

    # -- what it is ------------------------------------------------------------------------

    @property
    def cgroup(self) -> Path:
        """The subtree that it is attached to."""
        return Path(os.fsdecode(self.about.cgroup))

    @property
    def capacity(self) -> int:
        """Pairs that fit at once."""
        return int(self.about.capacity)

    @property
    def version(self) -> str:
        """Version of the underpass that loaded it."""
        return str(self.about.version.decode(errors="replace"))

    @property
    def attached(self) -> bool:
        """False if the cgroup that it was attached to has gone, or another took its name."""
        try:
            number, _ = namespaces.cgroup_id_and_level(self.cgroup)
        except (OSError, ValueError):
            return False
        return bool(number == self.about.knobs.cgroup_id)

    @property
    def state(self) -> str:
        """``active``, ``paused`` or ``draining``."""
        stop = self._control().stop
        if stop == Reason.DRAINING or not (self.pins / _LINK).exists():
            return "draining"
        return "paused" if stop else "active"

    def program_id(self) -> int:
        """Id of its sock_ops program."""
        return libbpf.program_id(self._fd("up_handshake"))

    def counters(self) -> Counters:
        """Totals since the generation was loaded."""
        cpus = (abi.Counters * libbpf.possible_cpus())()
        libbpf.lookup(self._fd("counters"), _ZERO, cpus)
        messages = [sum(c.messages[r] for c in cpus) for r in Reason]
        sockets = [sum(c.connections[r] for c in cpus) for r in Reason]
        return Counters(
            pairs_total=sockets[Reason.SHORTCUT],
            shortcut_messages_total=messages[Reason.SHORTCUT],
            shortcut_bytes_total=sum(c.shortcut_bytes for c in cpus),
            tcp_messages_total={r.word: messages[r] for r in TCP_REASONS},
            refused_total={r.word: sockets[r] for r in REFUSALS},
        )

    def endpoints(self) -> list[abi.Record]:
        """Every endpoint in the map, as the kernel tells it."""
        return self._walk("up_list")

    def _walk(self, program: str) -> list[abi.Record]:
        """What the iterator ``program`` tells of the map's endpoints, each once.

        The kernel begins a bucket of a sockhash anew when a read ends in the middle of it.
        """
        data = libbpf.iterate(self._fd(program), self._fd("sockets"))
        return list({record.cookie: record for record in abi.records(data)}.values())

    def open_pairs(self) -> int:
        """Number of pairs whose two endpoints are both in the map."""
        return len(records.matched(self.endpoints()))

    def pairs(self) -> list[Pair]:
        """Open pairs, with the state of both directions."""
        names = {ns.inode: ns.label for ns in namespaces.net_namespaces()}
        return [records.pair(*ends, names) for ends in records.matched(self.endpoints())]

    def sockets(self) -> list[Socket]:
        """Every TCP socket of every network namespace, for `explain`."""
        held = {record.cookie for record in self.endpoints()}
        found = []
        for namespace in namespaces.net_namespaces():
            data = namespaces.in_namespace(
                namespace, lambda: libbpf.iterate(self._fd("up_sockets"))
            )
            names = {namespace.inode: namespace.label}
            found += [records.socket_of(record, names, held) for record in abi.records(data or b"")]
        return found

    def leftovers(self) -> dict[str, int]:
        """Entries in the handoff maps; all 0 once every handshake is over."""
        return {name: libbpf.count_keys(self._fd(name), n) for name, n in _HANDOFF_KEYS.items()}

    # -- steering --------------------------------------------------------------------------

    def _control(self) -> abi.Control:
        control = abi.Control()
        libbpf.lookup(self._fd("control"), _ZERO, control)
        return control

    def _set_stop(self, reason: int) -> None:
        control = self._control()
        control.stop = reason
        libbpf.update(self._fd("control"), _ZERO, control)

    def set_paused(self, paused: bool) -> None:
        """Send every message by TCP from now on, or let the shortcut be used again.

        Raises:
            UnderpassError: the generation is draining, or an ``up`` or ``down`` is at work.
        """
        act = "pause" if paused else "resume"
        with pinning.locked(self.pins, 1.0):
            if self.state == "draining":
                step = "run `underpass down` to finish"
                raise UnderpassError(act, self.pins, "it is draining", step)
            self._set_stop(Reason.PAUSED if paused else 0)

    def set_forced(self, share: float) -> None:
        """For tests: force about this share (0 to 1) of all messages onto TCP, at random."""
        control = self._control()
        control.forced = round(share * 65536)
        libbpf.update(self._fd("control"), _ZERO, control)

    def attach(self) -> None:
        """Attach sock_ops to the subtree and pin the link: the generation is live.

        Raises:
            KernelError: the kernel refuses, as when another program holds the cgroup alone.
        """
        fd = os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with libbpf.Fd(fd) as cgroup:
            try:
                link = libbpf.attach_cgroup(self._fd("up_handshake"), cgroup.number)
            except KernelError as error:
                raise _attach_error(error, self.cgroup, cgroup.number) from None
        with link:
            libbpf.pin(link.number, self.pins / _LINK)

    def arm_listeners(self) -> None:
        """Let the listeners that already stand answer SYNs with the proof callback."""
        self._in_all_namespaces("up_arm")

    def _in_all_namespaces(self, program: str) -> None:
        fd = self._fd(program)
        for namespace in namespaces.net_namespaces():
            namespaces.in_namespace(namespace, lambda: libbpf.iterate(fd))

    def revive(self, cgroup: Path) -> bool:
        """``up`` where a generation is pinned: finish a half-made or draining one.

        Returns:
            True if something changed.

        Raises:
            UnderpassError: it is for another cgroup.
        """
        if cgroup != self.cgroup:
            cause = f"a generation for {self.cgroup} is pinned at {self.pins}"
            raise UnderpassError("bring up", cgroup, cause, "run `underpass down` first")
        changed = self.state == "draining"
        if changed:
            self._set_stop(0)
            if not (self.pins / _LINK).exists():
                self.attach()
        self.arm_listeners()
        return changed

    def drain(self, timeout: float, on_progress: Callable[[int], None] | None) -> list[str]:
        """Take every endpoint out of the map that holds nothing unread; see :func:`down`."""
        deadline = time.monotonic() + timeout
        self._set_stop(Reason.DRAINING)  # sock_ops stays attached: it frees stuck readers
        self._in_all_namespaces("up_disarm")
        busy = bool(self.endpoints())
        if busy:
            time.sleep(IN_FLIGHT_SECONDS)
        while True:
            left = self._walk("up_drain")
            if on_progress:
                on_progress(len(left))
            if not left or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        if busy:
            self._in_all_namespaces("up_release")
        link = self.pins / _LINK
        if not left and link.exists():
            with libbpf.get(link) as fd:
                libbpf.detach(fd.number)
            link.unlink()
        names = {ns.inode: ns.label for ns in namespaces.net_namespaces()} if left else {}
        return [
            f"{records.endpoint(r, names)} ({names.get(r.netns, '?')}): {r.unread} bytes unread"
            for r in left
        ]


def try_load(program: str) -> None:
    """Load one program by itself, and let it go again: what `doctor` probes with.

    Raises:
        UnderpassError: the kernel refuses it; the cause is the verifier's.
    """
    about = knobs.about(namespaces.find_cgroup2(), Settings(), Fault(0), True)
    with libbpf.Object(OBJECT) as loaded:
        loaded.set_constants(".rodata.knobs", about.knobs)
        loaded.select({program}, PROGRAMS)
        loaded.load()


def own_programs(pins: Path) -> set[int]:
    """Ids of the sock_ops programs that the generation at ``pins`` has attached."""
    try:
        with Dataplane.open(pins) as plane:
            return {plane.program_id()}
    except UnderpassError:
        return set()


def attached(cgroup: Path) -> list[int]:
    """Ids of the sock_ops programs attached right at ``cgroup``, ours and others'."""
    with libbpf.Fd(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        return libbpf.attached(fd.number)


# -- making and removing ---------------------------------------------------------------------


def _load(scratch: Path, about: abi.About) -> None:
    """Load the object and pin its maps and programs in ``scratch``; all or nothing."""
    with contextlib.ExitStack() as undo, libbpf.Object(OBJECT) as loaded:
        loaded.set_entries("sockets", 2 * about.capacity)
        loaded.set_entries("grants", about.knobs.grants)
        loaded.set_constants(".rodata.knobs", about.knobs)
        loaded.load()
        libbpf.update(loaded.map("about"), _ZERO, about)
        try:
            scratch.mkdir(mode=0o700)
        except OSError as error:
            raise KernelError("make", scratch, error.errno or 0, "check bpffs") from None
        undo.callback(pinning.remove, scratch)
        for name in _MAPS:
            libbpf.pin(loaded.map(name), scratch / name)
        for name in PROGRAMS:
            libbpf.pin(loaded.program(name), scratch / name)
        link = libbpf.attach_map(loaded.program("up_steer"), loaded.map("sockets"))
        if link:
            with link:
                libbpf.pin(link.number, scratch / _MAP_LINK)
        undo.pop_all()


def _attach_error(error: KernelError, cgroup: Path, fd: int) -> KernelError:
    """Name the program that is in the way, if one is."""
    if error.errno not in (errno.EPERM, errno.EBUSY):
        return error
    others = []
    with contextlib.suppress(KernelError):
        others = [f"{libbpf.program_name(n)} (id {n})" for n in libbpf.attached(fd)]
    detail = f"held by sock_ops program {', '.join(others)}" if others else ""
    step = "detach it, or attach it with BPF_F_ALLOW_MULTI"
    return KernelError("attach sock_ops to", cgroup, error.errno, step, detail)


def _replace(plane: Dataplane) -> None:
    """Drain and unpin a generation whose cgroup has gone.

    Raises:
        UnderpassError: it holds endpoints with unread bytes.
    """
    if plane.drain(5.0, None):
        cause = f"its cgroup {plane.cgroup} has gone, and endpoints still hold unread bytes"
        raise UnderpassError("replace", plane.pins, cause, "run `underpass down`, then up again")
    pinning.remove(plane.pins)


def _remove_unused(pins: Path) -> None:
    """Clear what a killed ``up`` left: pins that no traffic can be using.

    Raises:
        UnderpassError: it may be in use, or is not ours.
    """
    step = f"name another pin directory, or remove {pins} by hand"
    if not pins.is_dir():
        raise UnderpassError("use", pins, "it is not a directory", step)
    _refuse_foreign(pins)
    if (pins / _LINK).exists():
        raise UnderpassError("clear", pins, "it is attached, but not described", step)
    pinning.remove(pins)


def _refuse_foreign(pins: Path) -> None:
    names = {entry.name for entry in pins.iterdir()}
    if foreign := sorted(names.difference(_MAPS, PROGRAMS, (_LINK, _MAP_LINK))):
        cause, step = f"{foreign[0]} in it is not of underpass", f"move {pins / foreign[0]} away"
        raise UnderpassError("clear", pins, cause, step)
