"""One generation of programs and maps, open for reading and steering.

The data plane lives in the kernel and in pins; it outlives every process of ours.
:mod:`.dataplane` makes, replaces and removes generations.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from underpass import abi, holders, knobs, libbpf, namespaces, programs, records
from underpass.errors import KernelError, NotLoaded, UnderpassError
from underpass.model import (
    Counters,
    Pair,
    Program,
    Reason,
    Rule,
    Settings,
    Small,
    Socket,
)
from underpass.pinning import LATE_LINK, LINK, WATCH_LINKS

#: Redirects that were decided before the stop flag was seen are over after this many seconds.
IN_FLIGHT_SECONDS = 1.5

INHERITED = "inherited"
#: In a generation that is about to go: the map that is to take the heir's `inherited` pin's place.
BEQUEST = "bequest"
MAPS = (
    "sockets",
    "control",
    "counters",
    "handshakes",
    "syns",
    "grants",
    "holders",
    "about",
    INHERITED,
    "programs",
    "rules",
    "owners",
    "marked",
    "news",
    "orders",
    "awake",
    "policies",
    "groups",
    "ports",
    "networks",
)
PROGRAMS = (
    "up_handshake",
    "up_steer",
    "up_watch",
    "up_arm",
    "up_disarm",
    "up_sockets",
    "up_release",
    "up_list",
    "up_drain",
    "up_standing",
    "up_adopt",
    "up_awake",
    "up_uring",
    "up_late",
)
#: Program, hook and pin of what is attached to the subtree; the last makes the generation live.
_CGROUP_LINKS = (
    ("up_late", libbpf.BPF_CGROUP_INET_INGRESS, LATE_LINK),
    ("up_handshake", libbpf.BPF_CGROUP_SOCK_OPS, LINK),
)
#: Programs that are not there where the kernel has nothing to attach them to.
OPTIONAL = frozenset({"up_uring"})
_HASH, _ARRAY, _PERCPU_ARRAY, _LRU_HASH, _LPM_TRIE = 1, 2, 6, 9, 11  # enum bpf_map_type
#: Type, key and value size of the maps that are read into memory of ours.
_SIZES = {
    "about": (_ARRAY, 4, ctypes.sizeof(abi.About)),
    "control": (_ARRAY, 4, ctypes.sizeof(abi.Control)),
    "counters": (_PERCPU_ARRAY, 4, ctypes.sizeof(abi.Counters)),
    INHERITED: (_ARRAY, 4, ctypes.sizeof(abi.Counters)),
    "news": (_ARRAY, 4, ctypes.sizeof(abi.News)),
    "programs": (_LRU_HASH, 8, ctypes.sizeof(abi.Program)),
    "rules": (_HASH, ctypes.sizeof(abi.RuleKey), 4),
    "owners": (_LRU_HASH, ctypes.sizeof(abi.Place), ctypes.sizeof(abi.Owner)),
    "orders": (_HASH, 8, ctypes.sizeof(abi.Order)),
    "policies": (_ARRAY, 4, ctypes.sizeof(abi.Policy)),
    "groups": (_HASH, ctypes.sizeof(abi.Group), 8),
    "ports": (_HASH, ctypes.sizeof(abi.Port), 8),
    "networks": (_LPM_TRIE, ctypes.sizeof(abi.Network), 8),
}
_LARGEST_ABOUT = 65536  # bytes that another version's may have
_HANDOFF_KEYS = {"handshakes": 8, "syns": 4, "orders": 8}
_ZERO = ctypes.c_uint32(0)
_SHARED = 2
_GUARD_MAPS: tuple[tuple[str, type[Any], type[Any]], ...] = (
    ("rules", abi.RuleKey, abi.u32),
    ("programs", abi.u64, abi.Program),
    ("owners", abi.Place, abi.Owner),
)


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
            sizes = libbpf.map_sizes(plane.fd("about"))
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NotLoaded(
                    "open", pins, "no generation is pinned there", "run `underpass up`"
                ) from None
            raise
        number = _abi_of(plane.fd("about"), sizes)
        if number not in (None, abi.ABI):
            cause = f"its ABI is {number}, this is {abi.ABI}"
            raise UnderpassError("use", pins, cause, step)
        if sizes != _SIZES["about"]:  # before it is read: a larger value would not fit
            raise UnderpassError("use", pins, "it is not a generation of this version", step)
        libbpf.lookup(plane.fd("about"), _ZERO, plane.about)
        gone = [name for name in (*MAPS, *PROGRAMS) if not (pins / name).exists()]
        if missing := [n for n in gone if n not in OPTIONAL or (pins / WATCH_LINKS[n]).exists()]:
            raise UnderpassError("use", pins, f"its pin {missing[0]} is missing", step)
        for name, wanted in _SIZES.items():
            if libbpf.map_sizes(plane.fd(name)) != wanted:
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

    def fd(self, name: str) -> int:
        """Descriptor of a pin; borrowed."""
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
    def settings(self) -> Settings:
        """What it was loaded with."""
        return knobs.settings_of(self.about, self._control())

    @property
    def number(self) -> int:
        """One more than that of the generation that it replaced."""
        return int(self.about.generation)

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
        if stop == Reason.DRAINING or not (self.pins / LINK).exists():
            return "draining"
        return "paused" if stop else "active"

    @property
    def loaded(self) -> list[str]:
        """Names of its programs."""
        return [name for name in PROGRAMS if (self.pins / name).exists()]

    def program_id(self) -> int:
        """Id of its sock_ops program."""
        return libbpf.program_id(self.fd("up_handshake"))

    def counters(self) -> Counters:
        """Totals since the generation was loaded."""
        return records.counters(self.totals())

    def totals(self) -> abi.Counters:
        """What it and the generations that it inherited from have counted."""
        return abi.add_up([self.own(), self.inherited()])

    def own(self) -> abi.Counters:
        """What it has counted itself, on all CPUs."""
        cpus = (abi.Counters * libbpf.possible_cpus())()
        libbpf.lookup(self.fd("counters"), _ZERO, cpus)
        return abi.add_up(cpus)

    def inherited(self) -> abi.Counters:
        """What the generations counted that it inherited from."""
        past = abi.Counters()
        libbpf.lookup(self.fd(INHERITED), _ZERO, past)
        return past

    def bequeath(self, heir: Dataplane) -> None:
        """Make ready, as a pin of its own, what ``heir`` has inherited once this one is gone."""
        will = self.pins / BEQUEST
        will.unlink(missing_ok=True)
        with libbpf.create_array(INHERITED, abi.add_up([heir.inherited(), self.totals()])) as total:
            libbpf.pin(total.number, will)

    def endpoints(self) -> list[abi.Record]:
        """Every endpoint in the map, as the kernel tells it."""
        return self._walk("up_list")

    def _walk(self, program: str) -> list[abi.Record]:
        """What the iterator ``program`` tells of the map's endpoints, each once.

        The kernel begins a bucket of a sockhash anew when a read ends in the middle of it.
        """
        data = libbpf.iterate(self.fd(program), self.fd("sockets"))
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
            data = namespaces.in_namespace(namespace, lambda: libbpf.iterate(self.fd("up_sockets")))
            names = {namespace.inode: namespace.label}
            for record in abi.records(data or b""):
                known = records.socket_of(record, names, held)
                if known.listening:
                    known = replace(known, program=self._listener_of(record))
                found.append(known)
        return found

    def _listener_of(self, record: abi.Record) -> int:
        """Key of the program that listens at the place of ``record``; 0: unknown, or several do."""
        owner = abi.Owner()
        there = libbpf.lookup(self.fd("owners"), _place(record), owner)
        return int(owner.program) if there and not owner.shared else 0

    def leftovers(self) -> dict[str, int]:
        """Entries in the handoff maps; all 0 once every handshake and adoption is over."""
        return {name: len(libbpf.keys(self.fd(name), n)) for name, n in _HANDOFF_KEYS.items()}

    # -- steering --------------------------------------------------------------------------

    def _control(self) -> abi.Control:
        control = abi.Control()
        libbpf.lookup(self.fd("control"), _ZERO, control)
        return control

    def _steer(self, **fields: int | ctypes.Array[ctypes.c_uint32]) -> None:
        control = self._control()
        for name, value in fields.items():
            setattr(control, name, value)
        libbpf.update(self.fd("control"), _ZERO, control)

    def set_paused(self, paused: bool) -> None:
        """Send every message by TCP from now on, or let the shortcut be used again."""
        self._steer(stop=Reason.PAUSED if paused else 0)

    def set_draining(self, draining: bool) -> None:
        """Pair nothing and send every message by TCP, on the way out; or take that back."""
        self._steer(stop=Reason.DRAINING if draining else 0)

    @property
    def closed(self) -> bool:
        """It takes in no new connection: another generation does, or will."""
        return bool(self._control().closed)

    def set_closed(self, closed: bool) -> None:
        """Take in no new connection; open pairs go on."""
        self._steer(closed=int(closed))

    def set_small(self, small: Small) -> None:
        """Which streams of small messages leave the shortcut from now on."""
        self._steer(small=(abi.u32 * len(small))(*small))

    def set_reproof(self, seconds: float) -> None:
        """How often a message of each direction takes the network path from now on; 0 = never."""
        self._steer(reproof_ns=round(seconds * 1e9))

    @property
    def policy(self) -> int:
        """0 = it has none, else one more than the bank of tables that is in force."""
        return int(self._control().policy)

    def choose_policy(self, number: int) -> None:
        """Put a bank of tables in force (see :attr:`policy`): for open connections, too."""
        self._steer(policy=number)
        self.tell()

    def set_forced(self, share: float) -> None:
        """For tests: force about this share (0 to 1) of all messages onto TCP, at random."""
        self._steer(forced=round(share * 65536))

    def attach(self) -> None:
        """Attach the programs to the subtree and pin their links: the generation is live.

        Raises:
            KernelError: the kernel refuses, as when another program holds the cgroup alone.
        """
        for program, pin in WATCH_LINKS.items():
            if program in self.loaded and not (self.pins / pin).exists():
                with libbpf.attach_tracepoint(self.fd(program)) as link:
                    libbpf.pin(link.number, self.pins / pin)
        fd = os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with libbpf.Fd(fd) as cgroup:
            for program, hook, pin in _CGROUP_LINKS:
                if (self.pins / pin).exists():
                    continue
                try:
                    link = libbpf.attach_cgroup(self.fd(program), cgroup.number, hook)
                except KernelError as error:
                    raise _attach_error(error, self.cgroup, cgroup.number) from None
                with link:
                    libbpf.pin(link.number, self.pins / pin)

    def detach(self) -> None:
        """Detach what is attached to the subtree, and the watchers; nothing if nothing is."""
        for name in (LINK, LATE_LINK, *WATCH_LINKS.values()):
            path = self.pins / name
            if path.exists():
                with libbpf.get(path) as fd:
                    if name not in WATCH_LINKS.values():
                        libbpf.detach(fd.number)
                path.unlink()

    def everywhere(self, program: str) -> Iterator[abi.Record]:
        """Run an iterator in every network namespace; what it wrote."""
        fd = self.fd(program)
        for namespace in namespaces.net_namespaces():
            data = namespaces.in_namespace(namespace, lambda: libbpf.iterate(fd))
            yield from abi.records(data or b"")

    def arm_listeners(self, before: Dataplane | None = None) -> None:
        """Let the listeners that already stand answer SYNs with the proof callback.

        Args:
            before: the generation that this one replaces, whose listeners are taken over.
        """
        if before and any(r.armed == _SHARED for r in before.everywhere("up_arm")):
            # rare: only the old one knows which of them another product armed, too
            list(before.everywhere("up_disarm"))
            before = None
        self._steer(adopting=int(before is not None))
        listeners = list(self.everywhere("up_arm"))
        self._steer(adopting=0)
        self._find_owners(listeners)

    def _find_owners(self, listeners: list[abi.Record]) -> None:
        """Tell the guard whose listeners those are that stood before it could see them begin."""
        places = {record.inode: _place(record) for record in listeners if record.covered}
        fd, owner = self.fd("owners"), abi.Owner()
        strange = {
            inode: place
            for inode, place in places.items()
            if libbpf.lookup(fd, place, owner) and not owner.program
        }
        holding = holders.of_sockets(set(strange), holders.processes() if strange else ())
        for inode, place in strange.items():
            pids = holding[inode].pids if inode in holding else ()
            found = programs.identify(min(pids)) if pids else None
            # nobody to be seen, as from inside a container: then the listener is watched by itself
            key, program = found or programs.listener(bytes(place.at.ip), place.at.port, inode)
            self.meet(key, program)
            if not libbpf.lookup(fd, place, owner) or owner.program == key:
                continue
            if owner.program:  # two programs have listeners of their own at one place
                owner.shared = 1
            else:
                owner.program = key
            libbpf.update(fd, place, owner)

    def drain_step(self) -> list[abi.Record]:
        """Take every endpoint out of the map that holds nothing unread; those that are left."""
        return self._walk("up_drain")

    def disarm(self) -> None:
        """Take the proof callback off the listeners, unless another program wants it."""
        list(self.everywhere("up_disarm"))

    def release(self) -> None:
        """Put back what was set on sockets that have left, and wake readers that wait for TCP."""
        list(self.everywhere("up_release"))

    # -- the guard -------------------------------------------------------------------------

    def meet(self, key: int, program: abi.Program) -> None:
        """Enter a program into the guard's list, unless it is there."""
        program.first_seen = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        rules = self.rules()
        program.rule = rules.get((key, b"")) or rules.get((0, program.name), 0)
        libbpf.update(self.fd("programs"), abi.u64(key), program, only_new=True)

    def programs(self) -> list[Program]:
        """Every program that the guard knows, the latest first."""
        found = libbpf.items(self.fd("programs"), abi.u64, abi.Program)
        ordered = sorted(found, key=lambda item: -item[1].first_seen)
        return [programs.describe(k.value, p, self.about.knobs) for k, p in ordered]

    def rules(self) -> dict[tuple[int, bytes], int]:
        """(key, name) -> rule; either the key is 0 or the name empty."""
        found = libbpf.items(self.fd("rules"), abi.RuleKey, abi.u32)
        return {(at.program, at.name): rule.value for at, rule in found}

    def _known(self, name: str) -> list[tuple[ctypes.c_uint64, abi.Program]]:
        """The programs of this name, or the one of this id."""
        found = libbpf.items(self.fd("programs"), abi.u64, abi.Program)
        return [(k, p) for k, p in found if name in (programs.id_of(k.value), programs.name_of(p))]

    def _key(self, name: str) -> int:
        """The key of the program or the rule whose id ``name`` is; 0 if it is none's."""
        known = [key.value for key, _ in self._known(name)]
        keys = [*known, *(key for key, _ in self.rules() if key)]
        return next((key for key in keys if programs.id_of(key) == name), 0)

    def set_rule(self, name: str, rule: Rule) -> int:
        """Allow or deny a program, or (Rule.NONE) take that back; from its next message on.

        Args:
            name: of its executable, or its id as :meth:`programs` gives it.
            rule: what to say of it.

        Returns:
            How many known programs it is about.
        """
        key_of_id = self._key(name)
        at = abi.RuleKey(program=key_of_id) if key_of_id else abi.RuleKey(name=name.encode())
        if rule == Rule.NONE:
            libbpf.delete(self.fd("rules"), at)
        else:
            libbpf.update(self.fd("rules"), at, abi.u32(rule))
        known = self._known(name)  # after the rule is there: who comes now finds it
        for key, program in known:
            program.rule = rule
            libbpf.update(self.fd("programs"), key, program)
        self.tell()
        return len(known)

    def forget(self, name: str) -> int:
        """Take rules and findings about a program (name or id) back; how many there were.

        Its entry stays: a server that only accepts would not be entered again.
        """
        ruled = bool({(0, name.encode()), (self._key(name), b"")} & self.rules().keys())
        self.set_rule(name, Rule.NONE)
        known = self._known(name)
        for key, program in known:
            program.active_ns = program.last_seen = program.signs = 0
            libbpf.update(self.fd("programs"), key, program)
        return len(known) + ruled

    def tell(self) -> None:
        """Let every endpoint look again whether it may take the shortcut, with its next message."""
        news = abi.News()
        libbpf.lookup(self.fd("news"), _ZERO, news)
        news.epoch += 1 << 32  # far from what the programs add meanwhile
        libbpf.update(self.fd("news"), _ZERO, news)

    def take_over_guard(self, before: Dataplane) -> None:
        """Know all that the guard of ``before`` knows."""
        for name, key, value in _GUARD_MAPS:
            for element in libbpf.items(before.fd(name), key, value):
                libbpf.update(self.fd(name), *element)


def _abi_of(about: int, sizes: tuple[int, int, int]) -> int | None:
    """The number that every version's `about` begins with, whatever follows; None: it is none."""
    kind, key, size = sizes
    if (kind, key) != _SIZES["about"][:2] or not ctypes.sizeof(abi.u32) <= size <= _LARGEST_ABOUT:
        return None
    value = (abi.u32 * (size // ctypes.sizeof(abi.u32) + 1))()
    libbpf.lookup(about, _ZERO, value)
    return int(value[0])


def _place(record: abi.Record) -> abi.Place:
    """Where a listener stands."""
    at = abi.Address((abi.u8 * 16)(*record.local_ip), record.local_port)
    return abi.Place(netns=record.netns_cookie, at=at)


def _attach_error(error: KernelError, cgroup: Path, fd: int) -> KernelError:
    """Name the program that is in the way, if one is."""
    if error.errno not in (errno.EPERM, errno.EBUSY):
        return error
    others = []
    with contextlib.suppress(KernelError):
        others = [libbpf.program_label(n) for n in libbpf.attached(fd)]
    detail = f"held by sock_ops program {', '.join(others)}" if others else ""
    step = "detach it, or attach it with BPF_F_ALLOW_MULTI"
    return KernelError("attach sock_ops to", cgroup, error.errno, step, detail)
