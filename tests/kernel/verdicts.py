"""What a connection has become: a pair that is named rightly, or plain TCP under a reason."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Any

from tests.kernel.bed import Bed
from tests.kernel.commands import underpass
from tests.kernel.remote import ROUND, Address, Remote, exchange
from tests.kernel.waiting import wait_until
from underpass.dataplane import Dataplane
from underpass.model import Endpoint

ROUNDS = 4
"""Rounds of an exchange; of each end the first message alone may go by TCP."""


def same(address: str, other: str) -> bool:
    """Whether two texts name one address; IPv4-mapped counts as IPv4, a scope as none."""
    return _plain(address) == _plain(other)


def _plain(address: str) -> str:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def check_paired(underpass: Dataplane, near: Remote, far: Remote) -> None:
    """The one pair is listed with both ends' own addresses and took the shortcut both ways."""
    check_all_paired(underpass, [(near, far)])


def check_all_paired(underpass: Dataplane, ends: list[tuple[Remote, Remote]]) -> None:
    """Talk on all connections in turn: each is a pair of its own, and no other pair is there."""
    for number, (near, far) in enumerate(ends):
        exchange(near, far, 2 * number + 1, ROUNDS)
    pairs = underpass.pairs()
    listed = Counter((_listed(pair.client), _listed(pair.server)) for pair in pairs)
    assert listed == Counter((_own(near), _own(far)) for near, far in ends)
    for pair in pairs:
        for direction in (pair.client_to_server, pair.server_to_client):
            assert (direction.path, direction.reason) == ("shortcut", "shortcut"), pair
            assert direction.shortcut_bytes >= (ROUNDS - 1) * ROUND
    assert underpass.counters().pairs_total == len(ends)


def _listed(end: Endpoint) -> tuple[str, str, int]:
    return end.netns, _plain(end.address), end.port


def _own(remote: Remote) -> tuple[str, str, int]:
    address, port = remote.names()[0]
    return remote.worker.place.netns, _plain(address), port


def check_plain(underpass: Dataplane, near: Remote, far: Remote, reason: str) -> None:
    """The connection works, over TCP alone, and the reason is counted."""
    exchange(near, far, 1)
    counters = underpass.counters()
    assert counters.pairs_total == 0
    assert counters.shortcut_messages_total == 0
    refused = {word for word, number in counters.refused_total.items() if number}
    assert reason in refused
    assert underpass.pairs() == []
    wait_until(lambda: underpass.endpoints() == [], "no socket is in the map")


def check_named(bed: Bed, near: Remote, far: Remote) -> None:
    """`connections` names both ends by their own addresses, `explain` what the client asked for."""
    text = underpass(bed.pins, "connections").ok().out
    [row] = [line.split() for line in text.splitlines() if _host(near.names()[0]) in line.split()]
    places = [near.worker.place.netns, far.worker.place.netns]
    assert row[:4] == [_host(near.names()[0]), places[0], _host(far.names()[0]), places[1]]
    for finding in explained(bed, near):
        assert (finding["path"], finding["reason"]) == ("shortcut", "shortcut")
        assert finding["subject"] == " -> ".join(map(_host, near.names()))


def explained(bed: Bed, near: Remote) -> list[dict[str, Any]]:
    """What `explain` finds of the connection, asked with the addresses that the client sees."""
    words = ("explain", *map(_host, near.names()), "--json")
    found: list[dict[str, Any]] = underpass(bed.pins, *words).document()["findings"]
    return found


def _host(name: Address) -> str:
    address = _plain(name[0])
    return f"[{address}]:{name[1]}" if ":" in address else f"{address}:{name[1]}"
