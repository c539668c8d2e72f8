"""Charts as inline SVG text, from the rows of a report. No I/O, no library, no look outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

#: Ways of the bytes by the names they have in a report's rows, with their words for people.
WAYS = {
    "default": "default TCP",
    "shortcut": "underpass",
    "naive": "naive bypass, a yardstick",
    "unix": "AF_UNIX, the practical limit",
}

#: Their colours on paper.
COLOURS = {"default": "#8b95a5", "shortcut": "#0b7a75", "naive": "#8e5bb5", "unix": "#d98324"}
#: Tests by message size, with what a panel of them says.
TITLES = {
    "tcp_lat": "Latency, one way (us): lower is better",
    "tcp_bw": "Throughput (Mb/s): higher is better",
}

_WIDTH, _LEFT, _RIGHT = 640, 64, 16
_TOP, _HEIGHT, _FOOT = 14, 230, 62
_BAR, _GAP, _NAMES, _VALUES = 15, 14, 150, 150
_TICKS = 4
#: A panel whose figures lie further apart than this has a logarithmic axis.
_LOGARITHMIC = 20

Rows = Sequence[dict[str, Any]]


def ways(rows: Rows) -> list[str]:
    """The ways that at least one row has figures of, in the order of :data:`WAYS`."""
    return [way for way in WAYS if any(row.get(way) for row in rows)]


def number(value: float) -> str:
    """A figure for people: three significant digits, thousands parted."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, 2 - math.floor(math.log10(abs(value)))):,.{digits}f}"


def lines(rows: Rows, title: str) -> str:
    """A line for each way over the rows as they come, low..high as a band, the ratio below."""
    figures = [row[way][end] for way in ways(rows) for row in rows if row.get(way)
               for end in ("low", "high")]  # fmt: skip
    scale = _Scale(figures)
    step = (_WIDTH - _LEFT - _RIGHT) / len(rows)
    at = [_LEFT + step * (index + 0.5) for index in range(len(rows))]
    parts = []
    for tick in scale.ticks():
        y = scale.y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, number(tick), "end"))
    for way in ways(rows):
        points = [(x, row[way]) for x, row in zip(at, rows, strict=True) if row.get(way)]
        upper = [f"{x:.1f},{scale.y(s['high']):.1f}" for x, s in points]
        lower = [f"{x:.1f},{scale.y(s['low']):.1f}" for x, s in reversed(points)]
        middle = [f"{x:.1f},{scale.y(s['median']):.1f}" for x, s in points]
        parts.append(f'<polygon class="band {way}" points="{" ".join(upper + lower)}"/>')
        parts.append(f'<polyline class="line {way}" points="{" ".join(middle)}"/>')
        parts += [
            f'<circle class="dot {way}" cx="{x:.1f}" cy="{scale.y(s["median"]):.1f}" r="3.5">'
            f"<title>{_words(way, s)}</title></circle>"
            for x, s in points
        ]
    for x, row in zip(at, rows, strict=True):
        parts.append(_text(x, _TOP + _HEIGHT + 18, row["label"], "middle"))
        if row["ratio"]:
            ratio = f"{row['ratio']['median']:.2f}x"
            parts.append(_text(x, _TOP + _HEIGHT + 36, ratio, "middle", "ratio"))
    return _svg(title, _TOP + _HEIGHT + _FOOT, parts)


def bars(rows: Rows, title: str) -> str:
    """Bars relative to each row's default, so that requests of unlike cost fit one panel."""
    shown = [row for row in rows if row["default"] and row["default"]["median"]]
    reach = [row[way]["high"] / row["default"]["median"]
             for row in shown for way in ways(rows) if row.get(way)]  # fmt: skip
    longest = max(reach, default=1.0)
    room = (_WIDTH - _NAMES - _VALUES) / longest
    parts, y = [], float(_TOP)
    for row in shown:
        here = [way for way in ways(rows) if row.get(way)]
        label = f"{row['label']} {row['ratio']['median']:.2f}x" if row["ratio"] else row["label"]
        parts.append(_text(_NAMES - 8, y + len(here) * _BAR / 2 + 4, label, "end"))
        for way in here:
            parts.append(_bar(row, way, y, room))
            y += _BAR
        y += _GAP
    return _svg(title, int(y), parts)


def _bar(row: dict[str, Any], way: str, y: float, room: float) -> str:
    base, spread = row["default"]["median"], row[way]
    end, low, high = (_NAMES + spread[key] / base * room for key in ("median", "low", "high"))
    middle = y + _BAR / 2 - 1
    return (
        f'<rect class="bar {way}" x="{_NAMES}" y="{y:.1f}" width="{max(0.0, end - _NAMES):.1f}"'
        f' height="{_BAR - 2}"><title>{_words(way, spread)}</title></rect>'
        f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}"/>'
        + _text(high + 6, y + _BAR - 4, f"{number(spread['median'])} {row['unit']}", "start")
    )


class _Scale:
    """The vertical axis: from 0, or logarithmic where figures lie far apart."""

    def __init__(self, figures: Sequence[float]) -> None:
        low, high = min(figures), max(figures) or 1.0
        self._logarithmic = low > 0 and high / low > _LOGARITHMIC
        self._low = math.floor(math.log10(low)) if self._logarithmic else 0.0
        self._high = math.ceil(math.log10(high)) if self._logarithmic else high * 1.05

    def y(self, value: float) -> float:
        place = math.log10(value) if self._logarithmic else value
        return _TOP + _HEIGHT * (1 - (place - self._low) / (self._high - self._low))

    def ticks(self) -> list[float]:
        if self._logarithmic:
            return [10.0**power for power in range(int(self._low), int(self._high) + 1)]
        step = 10.0 ** math.floor(math.log10(self._high / _TICKS))
        step *= next(factor for factor in (1, 2, 5, 10) if self._high / (factor * step) <= _TICKS)
        return [step * count for count in range(int(self._high / step) + 1)]


def _words(way: str, spread: dict[str, float]) -> str:
    median, low, high = (number(spread[key]) for key in ("median", "low", "high"))
    return escape(f"{WAYS[way]}: {median} ({low}..{high})")


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where}>{escape(words)}</text>'


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {_WIDTH} {height}" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
