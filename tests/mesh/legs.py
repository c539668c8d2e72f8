"""Clients of a mesh, and the judgement whether its legs are on the shortcut."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from tests.apps.programs import find
from tests.kernel.commands import underpass
from tests.kernel.waiting import wait_until
from tests.mesh.conftest import Running
from underpass.bench import envoy
from underpass.bench.envoy import Kind
from underpass.bench.mesh import Leg, Mesh, Part

Pair = dict[str, Any]
DIRECTIONS = ("client_to_server", "server_to_client")
STEADY = 300
"""Messages of each direction of a leg in which hardly anything may go by TCP."""
BY_TCP = 0.05
"""Share that may: where processors are short, threads hold sockets for long (`reader-busy`)."""
CONNECTIONS = 4


def url(mesh: Mesh, kind: Kind, path: str = "small") -> str:
    return f"http://{mesh.server.address}:{kind.value}/{path}"


def curl(mesh: Mesh, kind: Kind, *words: str) -> str:
    """Ask once; what curl printed. UnderpassError when it failed, also by the answer's status."""
    version = ["--http2-prior-knowledge"] if kind is Kind.HTTP2 else ["--http1.1"]
    argv = [find("curl", "curl"), "-sS", "--fail", "--max-time", "30", *version, *words]
    return mesh.run(Part.CLIENT, argv, 40)


def h2load(kind: Kind, where: str, requests: int) -> list[str]:
    """Words that ask so many times over connections that stay open."""
    version = [] if kind is Kind.HTTP2 else ["--h1"]
    head = [find("h2load", "nghttp2-client"), "-n", str(requests), "-c", str(CONNECTIONS)]
    return [*head, "-m", "4" if kind is Kind.HTTP2 else "1", *version, where]


def succeeded(said: str) -> tuple[int, int]:
    """Of what h2load printed: requests answered with 2xx, and requests with any error."""
    counts = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", said)
    good = re.search(r"status codes: (\d+) 2xx", said)
    assert counts, said
    assert good, said
    return int(good[1]), sum(map(int, counts.groups()))


@contextlib.contextmanager
def load(run: Running, kind: Kind) -> Iterator[None]:
    """Requests without a pause over connections that stay open, until the end of the block."""
    where = url(run.mesh, kind)
    words = h2load(kind, where, 100_000_000)
    if kind is not Kind.HTTP2:
        words = [find("wrk", "wrk"), "-t", "1", "-c", str(CONNECTIONS), "-d", "600s", where]
    child = run.mesh.spawn(Part.CLIENT, words, run.mesh.home / "load.log")
    try:
        yield
    finally:
        child.kill()
        child.wait()


def pairs(run: Running) -> list[Pair]:
    """The open pairs, as `underpass connections` tells them."""
    told: list[Pair] = underpass(run.bed.pins, "connections", "--json").document()
    return told


def leg_of(pair: Pair, mesh: Mesh, kind: Kind) -> Leg | None:
    """Which leg a pair is, by its server's port and namespace; None for another kind's."""
    server = pair["server"]
    legs = {
        (envoy.OUTBOUND, mesh.client.netns): Leg.APP_ENVOY,
        (envoy.INBOUND, mesh.server.netns): Leg.ENVOY_ENVOY,
        (kind.value, mesh.server.netns): Leg.ENVOY_APP,
    }
    leg = legs.get((server["port"], server["netns"]))
    if leg is Leg.ENVOY_APP:
        assert pair["client"]["address"] == envoy.PASSTHROUGH, pair
    return leg


def both_ends(pair: Pair) -> str:
    return str((pair["client"], pair["server"]))


def messages(direction: dict[str, Any]) -> int:
    return int(direction["shortcut_messages"]) + int(direction["tcp_messages"])


def moved(before: list[Pair], after: list[Pair], run: Running, kind: Kind) -> dict[Leg, int]:
    """By leg, messages that each direction passed at least between two looks at the same pairs."""
    found = dict.fromkeys(Leg, 0)
    old = {both_ends(pair): pair for pair in before}
    for pair in after:
        leg = leg_of(pair, run.mesh, kind)
        if leg and both_ends(pair) in old:
            then = old[both_ends(pair)]
            found[leg] += min(messages(pair[way]) - messages(then[way]) for way in DIRECTIONS)
    return found


def wrong(
    before: list[Pair],
    after: list[Pair],
    run: Running,
    kind: Kind,
    legs: tuple[Leg, ...] = tuple(Leg),
) -> list[str]:
    """Why these legs are not wholly on the shortcut, or another is: no line when all is right."""
    lines = [
        f"{leg}: {count} messages on its pairs"
        for leg, count in moved(before, after, run, kind).items()
        if (count < STEADY if leg in legs else count)
    ]
    old = {both_ends(pair): pair for pair in before}
    for pair in after:
        leg = leg_of(pair, run.mesh, kind)
        for way in DIRECTIONS if leg and both_ends(pair) in old else ():
            then = old[both_ends(pair)][way]
            more = pair[way]["tcp_messages"] - then["tcp_messages"]
            if more > BY_TCP * (messages(pair[way]) - messages(then)):
                lines.append(f"{leg}: {more} by TCP, {way}: {pair[way]['reason']}")
    return lines


def steady(
    run: Running, kind: Kind, legs: tuple[Leg, ...] = tuple(Leg)
) -> tuple[list[Pair], list[Pair]]:
    """Under load: two looks at the pairs, between which these legs passed STEADY messages."""

    def open_legs() -> list[Pair]:
        told = pairs(run)
        spoken = {
            leg_of(pair, run.mesh, kind)
            for pair in told
            if all(messages(pair[way]) for way in DIRECTIONS)
        }
        return told if spoken >= set(legs) else []

    before = wait_until(open_legs, f"{legs} are open: {run.plane.counters()}")

    def far_enough() -> list[Pair]:
        told = pairs(run)
        done = moved(before, told, run, kind)
        return told if all(done[leg] >= STEADY for leg in legs) else []

    return before, wait_until(far_enough, f"{STEADY} messages on {legs}", 40)
