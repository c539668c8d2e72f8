"""One HTML page that can be passed on: charts, tables and every run, with nothing outside it.

``render`` is pure: the report's document in, text out. The page names no other host, runs no
script and tells the browser to fetch nothing, so that it shows the same wherever it is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from underpass.bench import drawing
from underpass.bench.compare import ALSO, HALF, SIDECARS
from underpass.errors import UnderpassError, Usage

#: The element that holds the document as JSON, for programs.
DATA_ID = "results"

_NOTHING_ELSE = "default-src 'none'; style-src 'unsafe-inline'"

_PALETTE = " ".join(f"--{way}: {colour};" for way, colour in drawing.COLOURS.items())
_STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --dim: #5b6472; --rule: #dfe3e8; --paper: #fff;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #a3acba; --rule: #39414c;
  --paper: #14181d; --shortcut: #3fb8b0; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .dim, small, caption { color: var(--dim); }
.bad { color: var(--bad); font-weight: bold; } .good { color: var(--shortcut); font-weight: bold; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { flex: 1 1 32rem; margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; } small { display: block; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
th { font-weight: 600; } .left { text-align: left; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--dim); }
svg .ratio { fill: var(--shortcut); font-weight: bold; }
.grid { stroke: var(--rule); } .whisker { stroke: var(--ink); }
.line { fill: none; stroke: var(--way); stroke-width: 2.4; }
.band { fill: var(--way); opacity: .16; } .dot, .bar { fill: var(--way); }
.unix.line, .naive.line { stroke-dasharray: 5 4; stroke-width: 1.6; }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .4em 0 1.2em;
  background: var(--way); }
"""
_RUN = (
    *("Placement", "Test", "Row", "Mode", "Round", "Figure", "Volume", "Pairs"),
    *(
        "Shortcut messages",
        "Shortcut bytes",
        "TCP messages by reason",
        "Path packets",
        "CPU seconds",
    ),
)


def check(target: Path) -> None:
    """Refuse a file that cannot be written before anything is measured for it.

    Raises:
        Usage: it cannot.
    """
    try:
        new = not target.exists()
        # A pipe without a reader must not hold us up.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644))
        if new:
            target.resolve().unlink()  # what a link points to, not the link
    except (OSError, ValueError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise Usage("write", target, cause, "name a file that can be written") from None


def write(document: dict[str, Any], target: Path) -> None:
    """Write the page.

    Raises:
        UnderpassError: the file cannot be written.
    """
    try:
        target.write_text(render(document), encoding="utf-8")
    except OSError as error:
        raise UnderpassError("write", target, error.strerror or "?", "name another file") from None


def render(document: dict[str, Any]) -> str:
    """The whole page of a report (see ``report.document``)."""
    title = f"underpass bench: {document['benchmark']}"
    placements = document["settings"]["placements"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_ELSE}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>",
        f"<style>:root {{ {_PALETTE} }}{_STYLE}{_colours()}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{escape(document["path"])}; {escape(document["started"])}</p>',
        _verdict(document),
        _legend(document["rows"]),
        *(_placement(document, placement) for placement in placements),
        _reading(document),
        _origin(document),
        _runs(document),
        f'<script type="application/json" id="{DATA_ID}">{_data(document)}</script>',
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _data(document: dict[str, Any]) -> str:
    """JSON in which no ``<`` stands, so that nothing in it can end its element."""
    text = json.dumps(document)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _colours() -> str:
    return "".join(f".{way} {{ --way: var(--{way}); }}\n" for way in drawing.WAYS)


def _verdict(document: dict[str, Any]) -> str:
    if document["ok"]:
        return (
            "<p>The kernel's own counters bear this comparison out: the shortcut carried the"
            " shortcut runs, and none of the default runs.</p>"
        )
    lines = "".join(f"<li>{escape(line)}</li>" for line in document["failures"])
    return (
        '<p class="bad">Not proven: the kernel\'s own counters do not bear this comparison'
        f" out.</p><ul>{lines}</ul>"
    )


def _legend(rows: drawing.Rows) -> str:
    keys = (
        f'<span class="key {way}"></span>{escape(drawing.WAYS[way])}' for way in drawing.ways(rows)
    )
    return f"<p>{''.join(keys)}</p>"


def _placement(document: dict[str, Any], placement: dict[str, Any]) -> str:
    rows = [row for row in document["rows"] if row["placement"] == placement["name"]]
    if not rows:
        return ""
    ends = (f"{side} on core {', '.join(map(str, placement[f'{side}_cpus']))}"
            for side in ("client", "server"))  # fmt: skip
    figures = []
    for test in dict.fromkeys(row["test"] for row in rows):
        here = [row for row in rows if row["test"] == test]
        sized = test in drawing.TITLES
        better = "lower" if here[0]["less_is_better"] else "higher"
        title = drawing.TITLES.get(test, f"{test}, relative to default: {better} is better")
        chart = (drawing.lines if sized else drawing.bars)(here, title)
        axis = "Message size in bytes; below it shortcut / default." if sized else ""
        head = f"<strong>{escape(title)}</strong> <span class=dim>{axis}</span>"
        figures.append(f"<figure><figcaption>{head}</figcaption>{chart}</figure>")
    return (
        f"<h2>{escape(placement['name'])}</h2><p class=dim>{escape('; '.join(ends))}</p>"
        f'<div class="charts">{"".join(figures)}</div>{_table(rows)}{_also(rows)}'
    )


def _table(rows: drawing.Rows) -> str:
    ways = drawing.ways(rows)
    lines = [
        _line(
            [row["test"], row["label"], row["unit"]],
            [*(_way(row, way) for way in ways), _ratio(row), _carried(row)],
        )
        for row in rows
    ]
    names = ["Test", "Row", "Unit", *(drawing.WAYS[way] for way in ways), "Ratio", "Carried"]
    return _grid("Median, under it the lowest and the highest run.", names, lines)


def _way(row: dict[str, Any], way: str) -> str:
    broken = row.get("naive_broken") if way == "naive" else None
    told = f"<small class=bad>{len(broken)} broke: {escape(broken[0])}</small>" if broken else ""
    return _spread(row.get(way)) + told


def _also(rows: drawing.Rows) -> str:
    """The figures beside the rows' own, less is better; nothing where there are none."""
    ways = [way for way in drawing.WAYS if any(row["also"].get(way) for row in rows)]
    lines = [
        _line(
            [row["test"], row["label"], words],
            [_spread(row["also"].get(way, {}).get(name)) for way in ways],
        )
        for row in rows
        for name, words in ALSO.items()
        if any(name in told for told in row["also"].values())
    ]
    names = ["Test", "Row", "Figure", *(drawing.WAYS[way] for way in ways)]
    shares = any(SIDECARS in told for row in rows for told in row["also"].values())
    caption = f"Beside it; less is better{', but for the share of the Envoys' if shares else ''}."
    return _grid(caption, names, lines) if lines else ""


def _grid(caption: str, names: Sequence[str], lines: Iterable[str], texts: int = 3) -> str:
    head = "".join(
        f"<th{' class=left' if index < texts else ''}>{escape(name)}</th>"
        for index, name in enumerate(names)
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(texts: Sequence[object], cells: Sequence[str]) -> str:
    """A line of a table; ``cells`` are HTML already."""
    words = "".join(f"<td class=left>{escape(str(text))}</td>" for text in texts)
    return f"<tr>{words}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _spread(spread: dict[str, float] | None) -> str:
    if not spread:
        return "-"
    median, low, high = (drawing.number(spread[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median}<small>{low}..{high}</small>"


def _ratio(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    if not ratio:
        return "-"
    better = ratio["median"] < 1 if row["less_is_better"] else ratio["median"] > 1
    rounds = f"<small>{ratio['low']:.2f}..{ratio['high']:.2f}</small>"
    return f"<span class={'good' if better else 'bad'}>{ratio['median']:.2f}x</span>{rounds}"


def _carried(row: dict[str, Any]) -> str:
    if row["off_node"]:
        return "none, as it must"
    if not row["carried"]:
        return "-"
    low = row["carried"]["low"]
    return f"{low:.0%}" if low >= HALF else f"<span class=bad>{low:.0%} *</span>"


def _reading(document: dict[str, Any]) -> str:
    held = any(r["carried"] and r["carried"]["low"] < HALF and not r["off_node"]
               for r in document["rows"])  # fmt: skip
    star = (
        " * In some run most of this went by TCP: a stream of small messages, which left the map,"
        " or one that stood at the budget. Read it as underpass's own choice, not as the speed of"
        " the shortcut."
    )
    naive = (
        " Naive: a 4-tuple sockhash bypass without proof, gate, budget, guard or drain, to show"
        " what the promise costs; it can lose, reorder and misdeliver: no way to run anything."
    )
    return (
        "<p>Ratio: shortcut / default, of the medians, under it by round. Carried: least share of a"
        " shortcut run that the kernel's counters show on the shortcut."
        f"{star if held else ''}{naive if document['settings']['naive'] else ''}</p>"
    )


def _origin(document: dict[str, Any]) -> str:
    """Where the figures come from: machine, kernel, settings, versions."""
    lines = []
    for part in ("machine", "settings", "versions"):
        for name, value in document[part].items():
            shown = json.dumps(value) if isinstance(value, (dict, list)) else value
            lines.append(_line([part, name.replace("_", " "), shown], []))
    lines.append(_line(["run", "duration seconds", document["duration_seconds"]], []))
    return f"<h2>Machine, kernel, settings</h2>{_grid('', ['Of', 'What', 'Value'], lines)}"


def _runs(document: dict[str, Any]) -> str:
    lines = []
    for row in document["rows"]:
        for run in row["runs"]:
            counters = run["counters"]
            tcp = ", ".join(f"{why} {n}" for why, n in counters["tcp_messages"].items() if n)
            amount = f"{drawing.number(run['volume']['amount'])} {run['volume']['unit']}"
            what = [row["placement"], row["test"], row["label"], run["mode"], run["round"]]
            cells = [f"{run['figure']:g} {escape(row['unit'])}", escape(amount)]
            counted = ("pairs", "shortcut_messages", "shortcut_bytes")
            cells += [f"{counters[name]:,}" for name in counted]
            cpu = "-" if run["cpu_seconds"] is None else f"{run['cpu_seconds']:.3f}"
            path = "-" if counters["path_packets"] is None else f"{counters['path_packets']:,}"
            lines.append(_line(what, [*cells, escape(tcp) or "-", path, cpu]))
    caption = (
        "What the program reported, and by how much the kernel's counters moved meanwhile."
        f" Path packets: {document['path_counter']}."
    )
    return (
        "<h2>Every run</h2><details><summary>All rounds, one by one; the same as JSON is in the"
        f" source of this page.</summary>{_grid(caption, _RUN, lines, texts=5)}</details>"
    )
