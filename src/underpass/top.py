"""What `underpass top` shows: rates between two looks, sorted, cut to the terminal. Pure."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from underpass.model import Direction, Endpoint, Pair, Reason


class Sort(enum.StrEnum):
    """By what the rows are sorted, the largest first; names the smallest."""

    RATE = "rate"
    MESSAGES = "messages"
    TOTAL = "total"
    UNREAD = "unread"
    NAME = "name"

    @property
    def following(self) -> Sort:
        """The next one, as the key `s` goes through them."""
        every = list(Sort)
        return every[(every.index(self) + 1) % len(every)]


@dataclass(frozen=True)
class Row:
    """One pair, or all pairs between two pods (or namespaces).

    Attributes:
        client: name of the one end.
        server: of the other.
        rate: bytes a second by the shortcut, both directions.
        messages: messages a second, by either path.
        share: of these messages, by the shortcut; None if there were none.
        total: bytes by the shortcut so far.
        unread: bytes that wait unread.
        pairs: how many it stands for.
        why: what the last messages took, and why.
    """

    client: str
    server: str
    rate: float
    messages: float
    share: float | None
    total: int
    unread: int
    pairs: int
    why: str


def rows(
    before: Iterable[Pair], after: Iterable[Pair], seconds: float, *, by_pod: bool = False
) -> list[Row]:
    """The pairs of ``after``, with what they carried since ``before``, unsorted.

    Args:
        before: the pairs as they were.
        after: the pairs as they are.
        seconds: between the two.
        by_pod: one row for all pairs between the same two pods, where they are known, else
            between the same two network namespaces.
    """
    old = {_identity(pair): pair for pair in before}
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in after:
        groups.setdefault(_names(pair, by_pod), []).append(pair)
    return [_row(names, pairs, old, seconds) for names, pairs in groups.items()]


def _identity(pair: Pair) -> tuple[Endpoint, Endpoint]:
    return pair.client, pair.server


def _names(pair: Pair, by_pod: bool) -> tuple[str, str]:
    if by_pod:
        return home(pair.client), home(pair.server)
    return f"{pair.client} {home(pair.client)}", f"{pair.server} {home(pair.server)}"


def home(end: Endpoint) -> str:
    """Where an endpoint lives: its pod, else its network namespace."""
    return end.pod or end.netns


def _row(
    names: tuple[str, str],
    pairs: list[Pair],
    old: Mapping[tuple[Endpoint, Endpoint], Pair],
    seconds: float,
) -> Row:
    moved = fast = slow = total = 0
    for pair in pairs:
        now, then = _sums(pair), (0, 0, 0)
        if (known := old.get(_identity(pair))) and all(
            a >= b for a, b in zip(now, _sums(known), strict=True)
        ):
            then = _sums(known)  # else another connection has taken its ports
        total += now[0]
        moved, fast, slow = (
            have + a - b for have, a, b in zip((moved, fast, slow), now, then, strict=True)
        )
    span = max(seconds, 1e-9)
    return Row(
        *names,
        rate=moved / span,
        messages=(fast + slow) / span,
        share=fast / (fast + slow) if fast + slow else None,
        total=total,
        unread=sum(pair.unread for pair in pairs),
        pairs=len(pairs),
        why=_why(pairs),
    )


def _sums(pair: Pair) -> tuple[int, int, int]:
    ways = (pair.client_to_server, pair.server_to_client)
    return (
        sum(way.shortcut_bytes for way in ways),
        sum(way.shortcut_messages for way in ways),
        sum(way.tcp_messages for way in ways),
    )


def _why(pairs: Sequence[Pair]) -> str:
    """The reasons for TCP, if there are any; else that all goes by the shortcut."""
    ways: list[Direction] = [
        way for pair in pairs for way in (pair.client_to_server, pair.server_to_client)
    ]
    quiet = Reason.NO_MESSAGE.word
    tcp = sorted({way.reason for way in ways if way.path == "tcp" and way.reason != quiet})
    if tcp:
        return "tcp: " + ", ".join(tcp)
    return "shortcut" if any(way.path == "shortcut" for way in ways) else "quiet"


_KEYS: dict[Sort, Callable[[Row], tuple[object, ...]]] = {
    Sort.RATE: lambda row: (-row.rate, -row.messages, -row.total, row.client, row.server),
    Sort.MESSAGES: lambda row: (-row.messages, -row.rate, row.client, row.server),
    Sort.TOTAL: lambda row: (-row.total, row.client, row.server),
    Sort.UNREAD: lambda row: (-row.unread, -row.rate, row.client, row.server),
    Sort.NAME: lambda row: (row.client, row.server),
}


def ordered(found: Iterable[Row], sort: Sort) -> list[Row]:
    """Sorted, the same rows always in the same order."""
    return sorted(found, key=_KEYS[sort])


#: Title, least width of the terminal at which it is shown, what it says, sorted by.
_Column = tuple[str, int, Callable[[Row], str], Sort | None]
_COLUMNS: tuple[_Column, ...] = (
    ("CLIENT", 0, lambda row: row.client, Sort.NAME),
    ("SERVER", 0, lambda row: row.server, None),
    ("PAIRS", 100, lambda row: str(row.pairs), None),
    ("RATE", 0, lambda row: f"{amount(row.rate)}/s", Sort.RATE),
    ("MSGS/S", 60, lambda row: f"{row.messages:.0f}", Sort.MESSAGES),
    ("SHORTCUT", 72, lambda row: "-" if row.share is None else f"{row.share:.0%}", None),
    ("TOTAL", 84, lambda row: amount(row.total), Sort.TOTAL),
    ("UNREAD", 96, lambda row: amount(row.unread), Sort.UNREAD),
    ("PATH", 110, lambda row: row.why, None),
)
_LEFT = {"CLIENT", "SERVER", "PATH"}
_LEAST_NAME = 4


def amount(count: float) -> str:
    """A number of bytes in five columns: ``1.5G``."""
    for unit in ("B", "K", "M", "G", "T"):
        if count < 999.5 or unit == "T":
            return f"{count:.0f}{unit}" if unit == "B" or count >= 99.95 else f"{count:.1f}{unit}"
        count /= 1024
    raise AssertionError


def frame(
    found: Sequence[Row], sort: Sort, size: tuple[int, int | None], head: str, foot: str = ""
) -> list[str]:
    """The lines of one picture, none wider or more than the terminal.

    Args:
        found: rows, sorted.
        sort: by what; its title is marked.
        size: columns and lines; None = as many as there are.
        head: the first line.
        foot: the last one, if there is room.
    """
    width, height = size
    columns = [column for column in _COLUMNS if width >= column[1] or column[3] is sort]
    titles = [title + ("*" if by is sort else "") for title, _, _, by in columns]
    room = None if height is None else max(0, height - 2 - bool(foot))
    shown = list(found) if room is None else list(found[:room])
    cells = [[say(row) for _, _, say, _ in columns] for row in shown]
    widths = _widths(titles, cells, width, [title in _LEFT for title, *_ in columns])
    lines = [head, *(_line(line, widths, columns) for line in (titles, *cells))]
    if height is not None:
        lines = lines[: max(1, height - bool(foot))]
    return [line[:width].rstrip() for line in (*lines, *([foot] if foot else []))]


def _widths(
    titles: list[str], cells: list[list[str]], width: int, elastic: list[bool]
) -> list[int]:
    """As wide as the widest cell; names give way until all fits, the widest first."""
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    gaps = 2 * (len(widths) - 1)
    while sum(widths) + gaps > width:
        most = max(
            (i for i, may in enumerate(elastic) if may), key=lambda i: (widths[i], i), default=-1
        )
        if most < 0 or widths[most] <= _LEAST_NAME:
            break
        widths[most] -= 1
    return widths


def _line(cells: Sequence[str], widths: Sequence[int], columns: Sequence[_Column]) -> str:
    words = (
        cut(cell, width).ljust(width) if title in _LEFT else cell.rjust(width)
        for cell, width, (title, *_) in zip(cells, widths, columns, strict=True)
    )
    return "  ".join(words)


def cut(text: str, width: int) -> str:
    """``text``, with its middle left out if it is too wide."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}~{text[len(text) - end :] if end else ''}"
