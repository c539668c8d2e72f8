"""The plan of a run, drawn from its seed: lanes of batches, and what disturbs them. No I/O.

The same seed draws the same batches and the same disturbances in the same order; how many of them a
run gets to, and what happens at once, is the machine's.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from underpass.model import Settings
from underpass.torture.churn import Churn
from underpass.torture.plans import FOREVER, KIB, MIB, SHAPES, Batch, Mode, Plan, Step

PODS = ("a", "b", "c")
ADDRESS4 = {pod: f"10.78.0.{number}" for number, pod in enumerate(PODS, 1)}
ADDRESS6 = {pod: f"fd78::{number}" for number, pod in enumerate(PODS, 1)}
LOOPBACK4, LOOPBACK6 = "127.0.0.1", "::1"
TCP_BUFFER = 2 * MIB
"""Most that TCP itself takes from a sender and keeps for a reader in the pods, in bytes each."""
_BATCHES = 1 << 20
"""Numbers that a lane has for its batches before they begin anew."""
_PORTS_OF_A_BATCH, _PORT_TURNS = 128, 100
LOCAL_PORTS = (10000, 24999)
"""Ports that the kernel gives; those below it does not, so that binding one always works."""
_FIRST_RECONNECT, _FIRST_PORT = 25000, 30000
_DEADLINE = 30.0


class Kind(enum.Enum):
    """What a lane is busy with."""

    SHAPES = "every shape"
    BULK = "bulk"
    STALL = "stalled readers"
    STALE = "peers that are gone"
    CHURN = "short connections"


@dataclass(frozen=True)
class Lane:
    """A client and a server process that play one batch after the other.

    Attributes:
        number: keys contents and draws; unique.
        client, server: names of the pods that they live in.
        port: where the server listens.
        routes: addresses to connect to, each with the one that the server binds.
    """

    number: int
    kind: Kind
    client: str
    server: str
    port: int
    routes: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.kind.value} {self.client}->{self.server}"


def _routes(server: str) -> tuple[tuple[str, str], ...]:
    four, six = ADDRESS4[server], ADDRESS6[server]
    return ((four, four), (six, six), (four, "::"), (f"::ffff:{four}", "::"))


_INSIDE = ((LOOPBACK4, LOOPBACK4), (LOOPBACK4, "::"), (LOOPBACK6, LOOPBACK6))

LANES = (
    Lane(0, Kind.SHAPES, "a", "b", 7001, _routes("b")),
    # the very same addresses and ports in every pod
    *(Lane(1 + i, Kind.SHAPES, pod, pod, 7000, _INSIDE[:1]) for i, pod in enumerate(PODS)),
    Lane(4, Kind.BULK, "c", "a", 7002, _routes("a")),
    Lane(5, Kind.BULK, "b", "b", 7003, _INSIDE),
    Lane(6, Kind.STALL, "b", "c", 7004, _routes("c")),
    Lane(7, Kind.STALL, "a", "a", 7005, _INSIDE),
    Lane(8, Kind.STALE, "a", "c", 7006, _routes("c")),
    Lane(9, Kind.CHURN, "a", "b", 7007, _routes("b")),
    Lane(10, Kind.CHURN, "c", "c", 7008, _INSIDE),
)

# -- batches ------------------------------------------------------------------------------------


def _draw(seed: int, *where: object) -> random.Random:
    return random.Random(f"{seed}/{'/'.join(map(str, where))}")


def batch(seed: int, lane: Lane, number: int) -> Batch:
    """The lane's batch of that number, of whatever kind but churn."""
    rng = _draw(seed, lane.number, number)
    draw, fewest, most = _DRAWN[lane.kind]
    plans = tuple(draw(rng) for _ in range(rng.randint(fewest, most)))
    target, listen = rng.choice(lane.routes)
    return Batch(
        number=lane.number * _BATCHES + number % _BATCHES,
        plans=plans,
        target=target,
        listen=listen,
        port=lane.port,
        first_port=_FIRST_PORT + number % _PORT_TURNS * _PORTS_OF_A_BATCH,
        deferred=rng.random() < 0.4,
        writer_waits=rng.random() < 0.2,
        pace=0.003 if lane.kind is Kind.STALE else 0,
        deadline=_DEADLINE,
    )


def churn(seed: int, lane: Lane, number: int) -> Churn:
    """The churn lane's run of that number."""
    rng = _draw(seed, lane.number, number)
    target, _ = rng.choice(lane.routes)
    how = rng.choice(("threads", "forked", "ports", "reconnect"))
    return Churn(
        address=(target, lane.port),
        count=rng.randint(200, 600),
        first=(lane.number << 40) + number * 1024,
        processes=0 if how == "threads" else 3,
        reuse_ports=how == "ports",
        source_port=_FIRST_RECONNECT + number % 5000 if how == "reconnect" else 0,
        deferred=rng.random() < 0.2,
    )


def _size(rng: random.Random, most: int) -> int:
    """1 to ``most``, every power of two as likely as the next."""
    return min(most, int(2 ** rng.uniform(0, most.bit_length())))


def _closing(client: tuple[Step, ...], server: tuple[Step, ...], name: str, mode: Mode) -> Plan:
    """The client ends its side, the server answers with its own end."""
    ends = Step(shut=True, eof=True)
    return Plan(name, (*client, ends), (*server, Step(eof=True), Step(shut=True)), mode)


def _any_shape(rng: random.Random) -> Plan:
    draw = rng.choice((_standing, _one_way, _requests, _duplex, _bursts, _unread))
    return draw(rng)


def _standing(rng: random.Random) -> Plan:
    return replace(rng.choice(SHAPES), mode=rng.choice(tuple(Mode)))


def _one_way(rng: random.Random) -> Plan:
    size, write = _size(rng, 4 * MIB), max(64, _size(rng, 256 * KIB))
    size = min(size, 2000 * write)
    give, take = (Step(send=size, write=write, vary=rng.random() < 0.5),), (Step(receive=size),)
    ends = (give, take) if rng.random() < 0.5 else (take, give)
    return _closing(*ends, f"one-way {size}", rng.choice(tuple(Mode)))


def _requests(rng: random.Random) -> Plan:
    request, response = _size(rng, 64 * KIB), _size(rng, 256 * KIB)
    count = rng.randint(1, 20)
    return _closing(
        (Step(send=request), Step(receive=response)) * count,
        (Step(receive=request), Step(send=response)) * count,
        f"{count} requests {request}/{response}",
        rng.choice(tuple(Mode)),
    )


def _duplex(rng: random.Random) -> Plan:
    up, down = _size(rng, MIB), _size(rng, MIB)
    write = max(64, _size(rng, 64 * KIB), max(up, down) // 1000)
    return _closing(
        (Step(send=up, receive=down, write=write, vary=True),),
        (Step(send=down, receive=up, write=write, vary=True),),
        f"duplex {up}/{down}",
        rng.choice(tuple(Mode)),
    )


def _bursts(rng: random.Random) -> Plan:
    """Bursts with pauses between, to a reader that is at times late."""
    size, count = _size(rng, 256 * KIB), rng.randint(2, 4)
    pause, late = rng.uniform(0.05, 0.4), rng.choice((0, 0, 0.2))
    send = tuple(Step(send=size, wait=pause * (i > 0)) for i in range(count))
    receive = tuple(Step(receive=size, wait=late) for _ in range(count))
    mode = rng.choice((Mode.BLOCKING, Mode.EDGE, Mode.SHORT))
    return _closing(send, receive, f"{count} bursts {size}", mode)


def _unread(rng: random.Random) -> Plan:
    """The server closes in the midst of what it is sent: its client must see an error."""
    first = _size(rng, 64 * KIB)
    return Plan(
        f"closed with bytes unread, {first} read",
        (Step(send=first), Step(until_error=True, write=max(100, _size(rng, 64 * KIB)))),
        (Step(receive=first),),
        rng.choice((Mode.BLOCKING, Mode.EDGE)),
    )


def _bulk(rng: random.Random) -> Plan:
    size, write = rng.randint(8, 64) * MIB, rng.choice((64 * KIB, 256 * KIB, MIB, 4 * MIB))
    give, take = (Step(send=size, write=write),), (Step(receive=size),)
    ends = (give, take) if rng.random() < 0.5 else (take, give)
    mode = rng.choice((Mode.BLOCKING, Mode.BLOCKING, Mode.EDGE))
    return _closing(*ends, f"bulk {size} by {write}", mode)


def _stall(rng: random.Random) -> Plan:
    """A sender that takes what it can get, a reader that comes late."""
    late = rng.uniform(2.0, 5.0)
    most = TORTURED[-1].budget_bytes * 3 // 2 + 2 * TCP_BUFFER
    fill = Step(
        fill=most, within=late / 2, write=rng.choice((4 * KIB, 16 * KIB, 64 * KIB)), shut=True
    )
    return Plan(f"stalled for {late:.1f} s", (fill,), (Step(receive=FOREVER, wait=late),))


def _stale(rng: random.Random) -> Plan:
    """The server closes; the client sends on after a while and must get an error."""
    first = rng.randint(1, 2000)
    wait = rng.uniform(0.05, 0.6)
    mode = rng.choice((Mode.EDGE, Mode.SHORT))
    client = (Step(send=first), Step(receive=1), Step(until_error=True, write=2000, wait=wait))
    return Plan("sends to a peer that is gone", client, (Step(receive=first), Step(send=1)), mode)


def _stale_or_lasting(rng: random.Random) -> Plan:
    return (_stale if rng.random() < 0.5 else _lasting)(rng)


def _lasting(rng: random.Random) -> Plan:
    """A connection that stays: its sockets may take the memory of those that have gone."""
    first, last, wait = rng.randint(1, 2000), rng.randint(1, 2000), rng.uniform(0.4, 0.8)
    client = (Step(send=first), Step(receive=1), Step(send=last, wait=wait))
    server = (Step(receive=first), Step(send=1), Step(receive=last))
    return _closing(client, server, "stays for a while", rng.choice((Mode.EDGE, Mode.SHORT)))


_DRAWN: dict[Kind, tuple[Callable[[random.Random], Plan], int, int]] = {
    Kind.SHAPES: (_any_shape, 40, 100),
    Kind.BULK: (_bulk, 1, 4),
    Kind.STALL: (_stall, 2, 5),
    Kind.STALE: (_stale_or_lasting, _PORTS_OF_A_BATCH, _PORTS_OF_A_BATCH),
}
"""What a batch is made of: who draws its plans, and how many they are."""

# -- disturbances -------------------------------------------------------------------------------


_ADMITTING = Settings(admit_unknown=True, budget_bytes=4 * MIB)
TORTURED = (
    replace(_ADMITTING, budget_bytes=256 * KIB),
    replace(_ADMITTING, budget_bytes=MIB, budget_messages=64),
    replace(_ADMITTING, capacity=16, reproof_seconds=1.0),
    replace(_ADMITTING, node_budget_bytes=16 * MIB),
    replace(_ADMITTING, reproof_seconds=0.2),
)
"""What generations are loaded with in turn: small and large budgets, a small map, many proofs."""


class Act(enum.Enum):
    """What is done to the running traffic."""

    FORCE = "force"
    PAUSE = "pause"
    CYCLE = "down-up"
    UPGRADE = "upgrade"
    KILL = "kill"
    ADOPT = "adopt"
    POLICY = "policy"


@dataclass(frozen=True)
class Disturbance:
    """One thing that is done to the traffic.

    Attributes:
        after: seconds of peace before it.
        act: what.
        share: FORCE: share of all messages that go by TCP from now on.
        seconds: PAUSE, POLICY: for how long.
        settings: CYCLE, UPGRADE: index into TORTURED for the next generation.
        lane, side: KILL: index into LANES, 0 the client, 1 the server; POLICY: lane that is denied.
    """

    after: float
    act: Act
    share: float = 0
    seconds: float = 0
    settings: int = 0
    lane: int = 0
    side: int = 0


_FIRST = (
    Disturbance(2.0, Act.CYCLE, settings=4),
    Disturbance(0.5, Act.FORCE, share=0.3),
    Disturbance(0.5, Act.KILL, lane=0, side=1),
    Disturbance(0.5, Act.PAUSE, seconds=0.2),
    Disturbance(0.5, Act.ADOPT),
    Disturbance(0.5, Act.POLICY, seconds=0.3, lane=0),
    Disturbance(0.5, Act.UPGRADE, settings=4),
    Disturbance(0.5, Act.FORCE, share=0.0),
)
"""What also the shortest run shall see."""
_WEIGHTS = {
    Act.FORCE: 4,
    Act.PAUSE: 3,
    Act.CYCLE: 2,
    Act.UPGRADE: 3,
    Act.KILL: 2,
    Act.ADOPT: 3,
    Act.POLICY: 2,
}


def disturbances(seed: int) -> Iterator[Disturbance]:
    """What is done to the traffic of a run, without end."""
    yield from _FIRST
    rng = _draw(seed, "disturbances")
    acts, weights = zip(*_WEIGHTS.items(), strict=True)
    while True:
        act = rng.choices(acts, weights)[0]
        yield Disturbance(
            after=round(rng.uniform(0.1, 2.0), 2),
            act=act,
            share=rng.choice((0.0, 0.0, 0.0, 0.02, 0.3, 0.9)) if act is Act.FORCE else 0,
            seconds=round(rng.uniform(0.01, 0.5), 2) if act in {Act.PAUSE, Act.POLICY} else 0,
            settings=rng.randrange(len(TORTURED)) if act in {Act.CYCLE, Act.UPGRADE} else 0,
            lane=rng.randrange(len(LANES)) if act in {Act.KILL, Act.POLICY} else 0,
            side=rng.randrange(2) if act is Act.KILL else 0,
        )


def digest(seed: int) -> str:
    """A name for the plan of a seed: 16 hex digits, of its first batches and disturbances."""
    said = hashlib.sha256()
    for lane in LANES:
        for number in range(20):
            make = churn if lane.kind is Kind.CHURN else batch
            said.update(repr(make(seed, lane, number)).encode())
    said.update(repr([*itertools.islice(disturbances(seed), 200)]).encode())
    return said.hexdigest()[:16]
