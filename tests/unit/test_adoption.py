"""Which open connections are taken in, and when: the pure part."""

from __future__ import annotations

import math
import random

from underpass import abi, adoption
from underpass.abi import Standing
from underpass.adoption import Couple, Outcome, couples, proven, waits
from underpass.model import Endpoint, Reason

_SECOND = 10**9
_LAST = 2**32 - 1


def _end(cookie: int, sent_from: int, received_from: int, remote_port: int = 0) -> Standing:
    return Standing(
        cookie=cookie,
        peer=0,
        inode=cookie,
        left_at=0,
        local_ip=bytes(16),
        local_port=cookie,
        remote_ip=bytes(16),
        remote_port=remote_port,
        sent_from=sent_from,
        received_from=received_from,
        netns=1,
        reason=0,
        leaves=0,
    )


def _connection(number: int, client_starts: int, server_starts: int) -> tuple[Standing, Standing]:
    """A client counts its SYN among what was acknowledged, a server its SYN-ACK not."""
    after = server_starts + 1 & _LAST
    client = _end(number, client_starts, after, remote_port=number + 1)
    server = _end(number + 1, after, client_starts + 1 & _LAST, remote_port=number)
    return client, server


def test_ends_are_put_together_in_any_order() -> None:
    """Claim: by their numbers alone, which also tell client from server, also where they wrap."""
    rng = random.Random(1)
    made = [_connection(2 * n, rng.getrandbits(32), rng.getrandbits(32)) for n in range(200)]
    made += [_connection(1000, _LAST, 5), _connection(1002, 5, _LAST)]
    ends = [end for pair in made for end in pair] + [_end(5000, 1, 2), _end(5001, 3, 4)]
    rng.shuffle(ends)
    found = {couple.ends for couple in couples(ends)}
    assert found == set(made)
    assert all(map(proven, couples(ends)))


def test_those_that_look_alike_are_none() -> None:
    """Claim: two connections with the same numbers are not told apart, so neither is one."""
    one, two = _connection(1, 100, 200), _connection(3, 100, 200)
    assert couples([*one, *two]) == []
    assert couples([*one, two[0]]) == []
    assert couples([*one, two[1]]) == []


def test_the_servers_view_of_the_client_counts() -> None:
    """Claim: another address there is no proof, unless the two were proven before."""
    client, server = _connection(1, 100, 200)
    elsewhere = server._replace(remote_port=77)
    assert not proven(Couple(client, elsewhere))
    before = Couple(client._replace(peer=server.cookie), elsewhere._replace(peer=client.cookie))
    assert proven(before)
    assert not proven(Couple(client._replace(peer=server.cookie), elsewhere))


def test_one_that_left_waits_twice_as_long_each_time() -> None:
    """Claim: 10 s, then 20, up to an hour; the end that waits longer decides."""
    client, server = _connection(1, 100, 200)
    assert waits(Couple(client, server), 5 * _SECOND) == 0
    for leaves, seconds in ((1, 10), (2, 20), (5, 160), (200, 3600)):
        left = server._replace(leaves=leaves, left_at=100 * _SECOND)
        assert waits(Couple(client, left), 100 * _SECOND) == seconds
        assert waits(Couple(left, client), (100 + seconds) * _SECOND) == 0


def test_a_pass_is_told_in_one_line() -> None:
    """Claim: how many came in, and for which reasons the others did not, the most first."""

    def outcomes(*reasons: Reason) -> list[Outcome]:
        at = Endpoint("10.0.0.1", 1, "pod")
        return [Outcome(at, at, reason) for reason in reasons]

    assert adoption.told(outcomes(Reason.SHORTCUT)) == "1 open connection taken in"
    found = outcomes(Reason.GUARDED, Reason.OBSERVED, Reason.OBSERVED)
    told = adoption.told(found)
    assert told == "0 open connections taken in; on TCP for now: 2 observed, 1 guarded"


def test_a_busy_thread_is_worth_another_pass() -> None:
    """Claim: the soonest of those that something passing was in the way of; others do not hurry."""
    at = Endpoint("10.0.0.1", 1, "pod")
    rest = [Outcome(at, at, Reason.GUARDED), Outcome(at, at, Reason.SHORTCUT)]
    assert adoption.again([]) == adoption.again(rest) == math.inf
    busy = [Outcome(at, at, Reason.READER_WAITS, again=seconds) for seconds in (40.0, 10.0)]
    assert adoption.again([*rest, *busy]) == 10.0


def test_the_records_of_an_iterator_are_cut_at_a_fragment() -> None:
    """Claim: what the kernel did not finish to write is left out."""
    one = _end(1, 2, 3)
    raw = abi.STANDING.pack(*one)
    assert list(abi.standing(raw + raw[:-1])) == [one]
