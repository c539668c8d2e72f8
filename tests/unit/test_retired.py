"""Which directories hold the generations that were replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from underpass import dataplane


@pytest.mark.parametrize("name", ["up", "up[1]", "up*", "u?", "[a-z]"])
def test_of_this_name_alone(tmp_path: Path, name: str) -> None:
    """Claim: whatever a pin directory's name looks like, its own are found and no other's."""
    for other in ("up", "up[1]", "up*", "u?", "[a-z]", "upper", "u"):
        (tmp_path / f"{other}-old-2").mkdir()
    (tmp_path / f"{name}-old-10").mkdir()
    found = [path.name for path in dataplane.retired(tmp_path / name)]
    assert found == [f"{name}-old-2", f"{name}-old-10"]
