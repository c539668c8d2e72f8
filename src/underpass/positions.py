"""Where in a TOML file a value stands; only asked once something is wrong with it. Pure.

`tomllib` keeps no positions. So the file's beginning is parsed, shorter and shorter by bisection:
the value stands where the shortest beginning ends that has it.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

#: How an array or table can go on that a beginning was cut in.
_ENDINGS = ("", "]", "}", "]}", "]]", "}]", "]}]")
#: Lines to go back from one in the middle of a value that none of the endings ends.
_BACK = 20
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")

Path = tuple[str | int, ...]


def parse(text: str) -> Path:
    """``policy.rule[1].ports[0]`` as keys and indices; up to the first that is no number."""
    return tuple(part[1] or int(part[2]) for part in _PART.finditer(text.partition("[...]")[0]))


def words(path: Path) -> str:
    """The contrary of :func:`parse`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def line(text: str, path: Path) -> int:
    """The number of the line on which the value at ``path`` begins; 0 if that cannot be told.

    Args:
        text: a whole file that `tomllib` understands.
        path: keys and indices.
    """
    lines = text.splitlines()
    low, high = 0, len(lines)  # the first `low` lines have it not, the first `high` have it
    if not _holds(_beginning(lines, high), path):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        if _holds(_beginning(lines, middle), path):
            high = middle
        else:
            low = middle
    return high


def _beginning(lines: list[str], count: int) -> Any:
    """What the first ``count`` lines say, or a few less if they end in the middle of a value."""
    for fewer in range(count, max(count - _BACK, 0), -1):
        start = "\n".join(lines[:fewer])
        for ending in _ENDINGS:
            try:
                return tomllib.loads(f"{start}\n{ending}" if ending else start)
            except (ValueError, RecursionError):
                continue
    return {}


def _holds(value: Any, path: Path) -> bool:
    for part in path:
        if isinstance(part, int):
            if not isinstance(value, list) or part >= len(value):
                return False
            value = value[part]
        else:
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
    return True
