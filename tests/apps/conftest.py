"""What tests with real programs share: the same work by TCP and by the shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.apps.programs import Compare
from tests.kernel.bed import Bed
from tests.kernel.fixtures import MakePlane


@pytest.fixture
def compare(bed: Bed, plane: MakePlane, measured: Callable[[str], Any]) -> Compare:
    """Compares a client outside the data plane's cgroup with one inside it."""
    return Compare(bed, plane(), measured)
