"""The parameter type of every option that takes seconds."""

from __future__ import annotations

import math
from typing import Any

import click

_YEAR = 365 * 86400.0


class Seconds(click.FloatRange):
    """A finite number of seconds; what waits longer than a year is a slip of the hand."""

    def __init__(self, least: float, most: float = _YEAR) -> None:
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; nan is refused, too: it compares with nothing."""
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return found
