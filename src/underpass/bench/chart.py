"""The chart: default, shortcut and AF_UNIX, a row of panels for each placement."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from underpass.bench import drawing
from underpass.bench.compare import Mode, Outcome, Placement
from underpass.bench.runner import Plan

_STYLE = {Mode(way): (drawing.COLOURS[way], words) for way, words in drawing.WAYS.items()}
#: Panels beside one another, and characters of a label in one line.
_ABREAST, _LABEL = 2, 20
_SIZES = {1024: "1K", 4096: "4K", 16384: "16K"}


def draw(
    outcomes: Sequence[Outcome], plan: Plan, document: dict[str, Any], directory: Path
) -> str | None:
    """Write ``chart.png`` and ``chart.svg``; a line that says why not, when it cannot."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return "no chart: matplotlib is not here; install underpass[bench]"
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e9ee",
        "svg.hashsalt": "underpass",
    }
    with matplotlib.rc_context(style):
        figure = _figure(pyplot, outcomes, plan, document)
        for name in ("chart.png", "chart.svg"):
            figure.savefig(directory / name, dpi=160, bbox_inches="tight", facecolor="white")
        pyplot.close(figure)
    return None


def _figure(pyplot: Any, outcomes: Sequence[Outcome], plan: Plan, document: dict[str, Any]) -> Any:
    tests = list(dict.fromkeys(o.row.test for o in outcomes))
    panels = [(placement, test) for placement in plan.placements for test in tests]
    columns = min(len(tests), _ABREAST)
    shape = (-(-len(panels) // columns), columns)
    size = (6.8 * shape[1] if shape[1] > 1 else 8.4, 4.4 * shape[0])
    figure, grid = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    draw_panel = _lines if plan.workload.name == "qperf" else _bars
    for axes, (placement, test) in zip(grid.flat, panels, strict=False):
        here = [o for o in outcomes if o.row.placement == placement.name and o.row.test == test]
        draw_panel(axes, here, placement)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    machine = document["machine"]
    figure.suptitle(
        f"underpass: {plan.workload.name}, default against shortcut",
        fontsize=14,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    figure.supxlabel(
        f"two network namespaces, {document['path']}; {machine['cpu']}, kernel {machine['kernel']};"
        f" {plan.rounds} alternating rounds of {plan.seconds} s\n"
        "median and lowest..highest; numbers: shortcut / default",
        fontsize=8.5,
        color="#5b6472",
        x=0.01,
        ha="left",
    )
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    return figure


def _lines(axes: Any, outcomes: Sequence[Outcome], placement: Placement) -> None:
    test = outcomes[0].row.test
    sizes = [int(o.row.label) for o in outcomes]
    for mode, (colour, name) in _STYLE.items():
        spreads = [o.spread(mode) for o in outcomes]
        found = [(size, s) for size, s in zip(sizes, spreads, strict=True) if s]
        if not found:
            continue
        at = [size for size, _ in found]
        dashed = mode is Mode.UNIX
        axes.plot(
            at,
            [s.median for _, s in found],
            color=colour,
            label=name,
            linewidth=1.6 if dashed else 2.4,
            linestyle="--" if dashed else "-",
            marker="o",
            markersize=3.5 if dashed else 5.5,
        )
        low, high = [s.low for _, s in found], [s.high for _, s in found]
        axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.set_xscale("log", base=4)
    axes.set_xticks(sizes, [_SIZES.get(size, str(size)) for size in sizes])
    axes.minorticks_off()
    if test == "tcp_bw":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 4, high)  # room for the ratios
    else:
        axes.set_ylim(bottom=0)
    for outcome, size in zip(outcomes, sizes, strict=True):
        if outcome.ratio:
            axes.text(
                size,
                0.035,
                f"{outcome.ratio.median:.2f}x",
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=9,
                color=_STYLE[Mode.SHORTCUT][0],
                fontweight="bold",
            )
    axes.set_xlabel("message size (byte)")
    axes.set_title(f"{drawing.TITLES[test]}\n{placement}", loc="left", fontsize=10.5)


def _bars(axes: Any, outcomes: Sequence[Outcome], placement: Placement) -> None:
    """Bars relative to the default run, so that requests of unlike cost fit one panel."""
    ends = list(range(len(outcomes)))
    modes = [m for m in (Mode.DEFAULT, Mode.SHORTCUT, Mode.NAIVE)
             if all(o.spread(m) for o in outcomes)]  # fmt: skip
    width = 0.76 / len(modes)
    for place, mode in enumerate(modes):
        offset = (place - (len(modes) - 1) / 2) * width
        colour, name = _STYLE[mode]
        heights, errors, texts = [], ([], []), []  # type: ignore[var-annotated]
        for outcome in outcomes:
            base, spread = outcome.spread(Mode.DEFAULT), outcome.spread(mode)
            if not base or not spread or not base.median:
                continue
            heights.append(spread.median / base.median)
            errors[0].append((spread.median - spread.low) / base.median)
            errors[1].append((spread.high - spread.median) / base.median)
            texts.append(f"{spread.median:,.0f}")
        at = [end + offset for end in ends[: len(heights)]]
        axes.bar(at, heights, width * 0.95, yerr=errors, color=colour, label=name, capsize=3,
                 error_kw={"ecolor": "#40464f", "elinewidth": 1})  # fmt: skip
        for x, height, error, text in zip(at, heights, errors[1], texts, strict=True):
            axes.annotate(text, (x, height + error), xytext=(0, 4), textcoords="offset points",
                          ha="center", fontsize=8.5, color=colour)  # fmt: skip
    names = [textwrap.fill(o.row.label, _LABEL) for o in outcomes]
    ratios = [f"\n{o.ratio.median:.2f}x" if o.ratio else "" for o in outcomes]
    axes.set_xticks(ends, [name + ratio for name, ratio in zip(names, ratios, strict=True)])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("relative to default")
    row = outcomes[0].row
    axes.set_title(f"{row.test}, {row.unit}\n{placement}", loc="left", fontsize=10.5)
