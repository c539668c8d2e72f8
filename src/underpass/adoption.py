"""Take open connections in that are on plain TCP: the way back, and those older than underpass.

Two ends are found by the numbers from which they began, which mirror as in a handshake. Then
``bpf/adopt.h`` acts on each under its lock, step by step, and this module sees to it between the
steps that no thread is left inside a native read, where redirected bytes would not wake it.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from underpass import abi, holders, libbpf, namespaces, pinning, programs
from underpass.abi import Standing, Step
from underpass.generation import Dataplane
from underpass.holders import Held
from underpass.model import REASONS, Endpoint, Reason, many

#: Seconds on TCP before one that has left may come back, doubled with every time that it left.
FIRST_WAIT, LONGEST_WAIT = 10.0, 3600.0
#: Seconds to wait for the threads of the processes that hold a socket.
PATIENCE = 0.5
#: How often to look whether all holders of a socket are known: calls of threads come and go.
CHECKS = 20
_WORD = (1 << 32) - 1
_DETAILS = {
    Reason.NOT_SUITABLE: "MPTCP, or another program has taken a callback that it needs",
    Reason.PEER_GONE: "it is closing",
}


@dataclass(frozen=True)
class Couple:
    """The two ends of one connection, neither of them in a map."""

    client: Standing
    server: Standing

    @property
    def ends(self) -> tuple[Standing, Standing]:
        """Both."""
        return self.client, self.server


@dataclass(frozen=True)
class Outcome:
    """What became of one connection: the reason is SHORTCUT if it was taken in.

    Attributes:
        client: its client's end.
        server: its server's end.
        reason: why it stays on TCP for now.
        detail: more about the reason, for people; may be empty.
        again: seconds after which another pass is worth it: a thread, or bytes that nobody had
            read yet, were in the way. None: it is not.
    """

    client: Endpoint
    server: Endpoint
    reason: Reason
    detail: str = ""
    again: float | None = None


class _StaysOut(Exception):
    """A connection is not taken in, and why."""

    def __init__(self, reason: Reason, detail: str = "", again: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.again = reason, detail, again


def possible() -> bool:
    """Can this kernel take open connections in? By an iterator that sets callbacks: Linux 6.12."""
    return namespaces.kernel_version() >= (6, 12)


def couples(standing: Iterable[Standing]) -> list[Couple]:
    """The connections of which both ends are among ``standing``. Pure.

    A client began to send at its initial number and its server to receive at the next, since the
    SYN counts; so the numbers also tell which end is the client. If two connections look alike,
    neither is one.
    """
    clients, servers = defaultdict(list), defaultdict(list)
    for end in standing:
        clients[end.sent_from + 1 & _WORD, end.received_from].append(end)
        servers[end.received_from, end.sent_from].append(end)
    return [
        Couple(found[0], servers[key][0])
        for key, found in clients.items()
        if len(found) == 1 and len(servers[key]) == 1
    ]


def proven(couple: Couple) -> bool:
    """Do the addresses agree, too, or were the two paired before? Pure."""
    client, server = couple.ends
    if client.peer == server.cookie and server.peer == client.cookie:
        return True
    return (client.local_ip, client.local_port) == (server.remote_ip, server.remote_port)


def waits(couple: Couple, now: int, first_wait: float = FIRST_WAIT) -> float:
    """Seconds for which it stays on TCP before it may come back; 0 = now. Pure.

    Args:
        couple: a connection.
        now: nanoseconds since boot.
        first_wait: seconds after it left for the first time.
    """
    wait = 0.0
    for end in couple.ends:
        if end.leaves:
            pause = min(first_wait * 2 ** (end.leaves - 1), LONGEST_WAIT)
            wait = max(wait, pause - (now - end.left_at) / 1e9)
    return wait


def adopt(pins: Path, patience: float = PATIENCE, first_wait: float = FIRST_WAIT) -> list[Outcome]:
    """Take in what can be: every open connection of this node of which both ends are on TCP.

    Args:
        pins: the generation to take them in.
        patience: seconds to wait for threads that are busy.
        first_wait: as for :func:`waits`.

    Returns:
        What became of each.

    Raises:
        NotLoaded: nothing is live at ``pins``.
        UnderpassError: another pass is at work, or the kernel refuses a call.
    """
    with Dataplane.open(pins) as plane, pinning.alone(pins):
        if plane.state != "active":
            return []
        return _Pass(plane, patience).run(first_wait)


class _Pass:
    """One go over the node's connections."""

    def __init__(self, plane: Dataplane, patience: float) -> None:
        self.plane, self.patience = plane, patience
        self.places = {ns.inode: ns for ns in namespaces.net_namespaces()}
        self.orders: dict[int, abi.Order] = {}
        self.netns: dict[int, int] = {}
        self.pids: set[int] = set()
        self.left: dict[Couple, Outcome] = {}

    def run(self, first_wait: float) -> list[Outcome]:
        """The whole of it."""
        self._clear()
        found = couples(self._standing())
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for couple in found:
            if wait := waits(couple, now, first_wait):
                reason = REASONS[couple.client.reason or couple.server.reason]
                self._leave(couple, _StaysOut(reason, f"may come back in {wait:.0f} s", wait))
            elif not proven(couple):
                self._leave(couple, _StaysOut(Reason.ADDRESS_MISMATCH))
        try:
            inside = self._see(self._enter(self._open(found)))
            inside = self._step(inside, Step.PAIR)
        finally:
            self._clear()
        done = {couple: self._outcome(couple, Reason.SHORTCUT) for couple in inside}
        return [done.get(couple) or self.left[couple] for couple in found]

    # -- which ----------------------------------------------------------------------------

    def _standing(self) -> list[Standing]:
        fd, found = self.plane.fd("up_standing"), list[Standing]()
        for place in self.places.values():
            data = namespaces.in_namespace(place, lambda: libbpf.iterate(fd))
            found += abi.standing(data or b"")
        return found

    def _open(self, found: list[Couple]) -> list[Couple]:
        return [couple for couple in found if couple not in self.left]

    def _enter(self, wanted: list[Couple]) -> list[Couple]:
        """Order those in whose programs may take the shortcut; those that have entered."""
        if not possible():
            for couple in wanted:
                self._leave(couple, _StaysOut(Reason.NOT_SUITABLE, "Linux before 6.12 cannot"))
            return []
        if not wanted:
            return []
        holding = self._holders(wanted)
        keys: dict[int, tuple[int, abi.Program] | None] = {}
        known = {program.id for program in self.plane.programs()}
        number = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for couple in wanted:
            try:
                client, server = (self._program(end, holding, keys, known) for end in couple.ends)
            except _StaysOut as reason:
                self._leave(couple, reason)
                continue
            number += 1
            self._order(couple, client, server, number)
        wanted = self._open(wanted)
        self._step(wanted, Step.WATCH, tells=False)
        return self._step(wanted, Step.ENTER)

    def _holders(self, some: list[Couple]) -> dict[int, Held]:
        """Who holds them of those that held one as the pass began: another shows as a reference."""
        among = self.pids or holders.processes()
        found = holders.of_sockets({end.inode for couple in some for end in couple.ends}, among)
        self.pids = self.pids or set().union(*(held.pids for held in found.values()))
        return found

    def _program(
        self,
        end: Standing,
        holding: dict[int, Held],
        keys: dict[int, tuple[int, abi.Program] | None],
        known: set[str],
    ) -> int:
        """The key of the one program that holds the socket, which the guard knows from now on."""
        pids = set(holding.get(end.inode, Held()).pids)
        if not pids:
            raise _StaysOut(Reason.UNPAIRED, "no process has accepted it, or none is to be seen")
        for pid in pids - keys.keys():
            keys[pid] = programs.identify(pid) if programs.watchable(pid) else None
        found = [keys[pid] for pid in pids]
        if found[0] is None or any(one is None or one[0] != found[0][0] for one in found):
            raise _StaysOut(Reason.OBSERVED, "programs share it, or one cannot be watched")
        key, program = found[0]
        if programs.id_of(key) not in known:
            self.plane.meet(key, program)
            known.add(programs.id_of(key))
        return key

    # -- steps ----------------------------------------------------------------------------

    def _order(self, couple: Couple, client: int, server: int, number: int) -> None:
        loopback = couple.client.netns == couple.server.netns
        for end, other, role, program, peer_program in (
            (couple.client, couple.server, abi.CLIENT, client, server),
            (couple.server, couple.client, abi.SERVER, server, client),
        ):
            self.netns[end.cookie] = end.netns
            self.orders[end.cookie] = abi.Order(
                peer=other.cookie,
                program=program,
                peer_program=peer_program,
                number=number,
                role=role,
                loopback=loopback,
                sent_from=end.sent_from,
                received_from=end.received_from,
            )

    def _step(self, some: list[Couple], step: Step, tells: bool = True) -> list[Couple]:
        """Carry one step out at both ends of some; those of which both ends agreed."""
        fd, cookies = self.plane.fd("orders"), [e.cookie for c in some for e in c.ends]
        for cookie in cookies:
            order = self.orders[cookie]
            order.step, order.answer = step, Reason.PEER_GONE
            libbpf.update(fd, ctypes.c_uint64(cookie), order)
        walk = self.plane.fd("up_adopt")
        for inode in {self.netns[cookie] for cookie in cookies}:
            namespaces.in_namespace(self.places[inode], lambda: libbpf.iterate(walk))
        agreed = []
        for couple in some:
            for end in couple.ends:
                libbpf.lookup(fd, ctypes.c_uint64(end.cookie), self.orders[end.cookie])
            answers = [REASONS[self.orders[end.cookie].answer] for end in couple.ends]
            worse = max(answers)
            if worse is Reason.SHORTCUT:
                agreed.append(couple)
            elif tells:
                self._leave(couple, _StaysOut(worse, _DETAILS.get(worse, "")))
        return agreed

    def _see(self, inside: list[Couple]) -> list[Couple]:
        """Those of whose holders no thread can be inside a native read unseen."""
        inside, held = self._checked(inside)
        busy = self._restless(set().union(*held.values()))
        calm = []
        for couple in inside:
            if any(busy.intersection(held[end.inode]) for end in couple.ends):
                self._leave(couple, _StaysOut(Reason.READER_WAITS, "a thread never rests"))
            else:
                calm.append(couple)
        return self._same_programs(self._checked(calm)[0])

    def _same_programs(self, some: list[Couple]) -> list[Couple]:
        """Those whose holders have not become other programs meanwhile (execve(2))."""
        holding, known = self._holders(some), {program.id for program in self.plane.programs()}
        keys: dict[int, tuple[int, abi.Program] | None] = {}
        for couple in some:
            for end in couple.ends:
                try:
                    if self._program(end, holding, keys, known) != self.orders[end.cookie].program:
                        raise _StaysOut(Reason.OBSERVED, "its program has just begun")
                except _StaysOut as why:
                    self._leave(couple, why)
        return self._open(some)

    def _restless(self, pids: set[int]) -> set[int]:
        fd, one = self.plane.fd("awake"), ctypes.c_uint32()
        for raw in libbpf.keys(fd, ctypes.sizeof(one)):
            libbpf.delete(fd, ctypes.c_uint32.from_buffer_copy(raw))
        same = holders.numbers_are_global()
        with libbpf.attach_tracepoint(self.plane.fd("up_awake")):
            return holders.restless(
                pids, self.patience, lambda tid: same and libbpf.lookup(fd, abi.u32(tid), one)
            )

    def _checked(self, some: list[Couple]) -> tuple[list[Couple], dict[int, set[int]]]:
        """Those that are held by the processes alone that /proc shows, and by which."""
        passed: list[Couple] = []
        held: dict[int, set[int]] = {}
        deadline = time.monotonic() + self.patience
        for _ in range(CHECKS):
            found = self._holders(some)
            for couple in some:
                for end in couple.ends:
                    held_by = found.get(end.inode, Held())
                    known = held_by.descriptors if held_by.clear else 0
                    self.orders[end.cookie].descriptors = known
                    self.orders[end.cookie].threaded = held_by.threaded
            good = self._step(some, Step.CHECK, tells=False)
            held |= {e.inode: found[e.inode].pids for c in good for e in c.ends}
            passed += good
            some = [couple for couple in some if couple not in good and not self._hopeless(couple)]
            if not some or time.monotonic() >= deadline:
                break
        for couple in some:
            self._leave(couple, _StaysOut(Reason.READER_WAITS, "a call on it is under way"))
        return passed, held

    def _hopeless(self, couple: Couple) -> bool:
        """Is it no use to look again? Then it is left, for the reason that was given."""
        worse = max(REASONS[self.orders[end.cookie].answer] for end in couple.ends)
        if worse is not Reason.READER_WAITS:
            self._leave(couple, _StaysOut(worse, _DETAILS.get(worse, "")))
        return worse is not Reason.READER_WAITS

    def _clear(self) -> None:
        """Take back what is not done, also what a killed pass has left."""
        fd = self.plane.fd("orders")
        left = list(libbpf.items(fd, ctypes.c_uint64, abi.Order))
        answers = {cookie.value: order.answer for cookie, order in left}
        torn = {order.peer for _, order in left if order.step != Step.PAIR}  # ended between the two
        for cookie, order in left:
            # all that is asked for a pair holds for good, once both ends are to be paired
            if order.step != Step.PAIR or cookie.value in torn:
                order.step = Step.GIVE_UP
                order.answer = max(order.answer, answers.get(order.peer, 0)) or Reason.READER_WAITS
            libbpf.update(fd, cookie, order)
        if left:
            list(self.plane.everywhere("up_adopt"))
        for cookie, _ in left:
            libbpf.delete(fd, cookie)

    def _leave(self, couple: Couple, why: _StaysOut) -> None:
        again = None
        if why.reason is Reason.TCP_UNREAD:
            again = why.again
        elif why.reason is Reason.READER_WAITS:
            failed = max(end.leaves for end in couple.ends)  # this time not counted
            again = why.again or min(FIRST_WAIT * 2**failed, LONGEST_WAIT)
        self.left[couple] = self._outcome(couple, why.reason, why.detail, again)

    def _outcome(
        self, couple: Couple, reason: Reason, detail: str = "", again: float | None = None
    ) -> Outcome:
        client, server = (
            Endpoint(abi.address(e.local_ip), e.local_port, self.places[e.netns].label)
            for e in couple.ends
        )
        return Outcome(client, server, reason, detail, again)


def summary(outcomes: list[Outcome]) -> tuple[int, Counter[str]]:
    """How many were taken in, and how many stay on TCP by reason. Pure."""
    stay = Counter(o.reason.word for o in outcomes if o.reason is not Reason.SHORTCUT)
    return sum(o.reason is Reason.SHORTCUT for o in outcomes), stay


def again(outcomes: list[Outcome]) -> float:
    """Seconds after which another pass is worth it for one of them; infinite: it is not. Pure."""
    return min((o.again for o in outcomes if o.again is not None), default=math.inf)


def told(outcomes: list[Outcome]) -> str:
    """A pass in one line, for people. Pure."""
    taken, stay = summary(outcomes)
    line = f"{many(taken, 'open connection')} taken in"
    if not stay:
        return line
    reasons = ", ".join(f"{n} {word}" for word, n in stay.most_common())
    return f"{line}; on TCP for now: {reasons}"
