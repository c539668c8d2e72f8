"""What `top` shows: rates, groups, order, and a picture that fits."""

from __future__ import annotations

import pytest

from underpass import top
from underpass.model import Direction, Endpoint, Pair
from underpass.top import Sort

QUIET = Direction("tcp", "no-message-yet", 0, 0, 0)


def _pair(
    port: int, moved: int, fast: int, slow: int = 0, pod: str | None = None, reason: str = ""
) -> Pair:
    way = Direction("tcp" if reason else "shortcut", reason or "shortcut", moved, fast, slow)
    client = Endpoint("10.0.0.1", port, "net-client", pod)
    return Pair(client, Endpoint("10.0.0.2", 80, "net-server", pod), way, QUIET, unread=port)


def test_rates_are_between_two_looks() -> None:
    """Claim: a row says what went since the look before, by path, and what went in all."""
    before = [_pair(1, 1000, 10, 10)]
    after = [_pair(1, 5000, 13, 11)]
    [row] = top.rows(before, after, 2.0)
    assert (row.rate, row.messages, row.share, row.total) == (2000, 2, 0.75, 5000)
    assert (row.unread, row.pairs, row.why) == (1, 1, "shortcut")


def test_a_new_pair_counts_whole_and_a_reused_port_too() -> None:
    """Claim: a pair that was not there before has carried all of it since; so has a successor."""
    assert top.rows([], [_pair(1, 500, 5)], 1.0)[0].rate == 500
    assert top.rows([_pair(1, 900, 9)], [_pair(1, 500, 5)], 1.0)[0].rate == 500
    assert top.rows([_pair(1, 900, 9)], [], 1.0) == []


def test_pods_are_summed() -> None:
    """Claim: by pod there is one row for two pods; where none is known, for two namespaces."""
    pairs = [_pair(1, 10, 1, pod="shop/cart"), _pair(2, 20, 1, pod="shop/cart"), _pair(3, 5, 1)]
    rows = top.ordered(top.rows([], pairs, 1.0, by_pod=True), Sort.RATE)
    assert [(row.client, row.server, row.pairs, row.total) for row in rows] == [
        ("shop/cart", "shop/cart", 2, 30),
        ("net-client", "net-server", 1, 5),
    ]


@pytest.mark.parametrize(
    ("sort", "ports"),
    [
        (Sort.RATE, [2, 1, 3]),
        (Sort.MESSAGES, [3, 1, 2]),
        (Sort.TOTAL, [2, 1, 3]),
        (Sort.UNREAD, [3, 2, 1]),
        (Sort.NAME, [1, 2, 3]),
    ],
)
def test_every_order(sort: Sort, ports: list[int]) -> None:
    """Claim: each key sorts by its column."""
    pairs = [_pair(1, 20, 5), _pair(2, 30, 1), _pair(3, 10, 9)]
    rows = top.ordered(top.rows([], pairs, 1.0), sort)
    assert [row.unread for row in rows] == ports


def test_the_key_goes_through_every_order() -> None:
    """Claim: pressing `s` often enough comes back to where it began."""
    seen, sort = [], Sort.RATE
    for _ in Sort:
        seen.append(sort)
        sort = sort.following
    assert (sort, set(seen)) == (Sort.RATE, set(Sort))


def test_why() -> None:
    """Claim: a reason for TCP at either side is said, else the shortcut, else that all is quiet."""
    assert top.rows([], [_pair(1, 0, 0, 5, reason="paused")], 1)[0].why == "tcp: paused"
    quiet = Pair(Endpoint("a", 1, "n"), Endpoint("b", 2, "n"), QUIET, QUIET)
    assert top.rows([], [quiet], 1)[0].why == "quiet"


@pytest.mark.parametrize("width", range(20, 200, 7))
@pytest.mark.parametrize("height", [3, 10, None])
def test_a_picture_fits(width: int, height: int | None) -> None:
    """Claim: no picture is wider or higher than the terminal, and the figures are always in it."""
    pairs = [_pair(port, 1000 * port, port, pod="a-long/name-of-a-pod") for port in range(1, 40)]
    rows = top.ordered(top.rows([], pairs, 1.0), Sort.RATE)
    lines = top.frame(rows, Sort.RATE, (width, height), "head", "q quit")
    assert all(len(line) <= width for line in lines)
    assert height is None or len(lines) <= height
    assert lines[-1] == "q quit"
    assert height is not None or len(lines) == len(rows) + 3
    assert "RATE*" in lines[1]
    if width >= 27 and height != 3:
        assert "38.1K/s" in lines[2]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1023, "1.0K"),
        (1 << 20, "1.0M"),
        (150 << 20, "150M"),
    ],
)
def test_amounts(count: float, text: str) -> None:
    """Claim: a number of bytes takes five columns."""
    assert top.amount(count) == text
    assert len(text) <= 5


def test_cut() -> None:
    """Claim: what is too wide loses its middle, where names differ least."""
    assert top.cut("10.0.0.1:8080", 20) == "10.0.0.1:8080"
    assert top.cut("10.0.0.1:8080", 9) == "10.0~8080"
    assert [len(top.cut("abcdefgh", width)) for width in range(1, 8)] == [*range(1, 8)]
