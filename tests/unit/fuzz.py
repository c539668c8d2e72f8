"""How hard property tests try: the same examples every time, new and many with UNDERPASS_LONG."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_LONG = bool(os.environ.get("UNDERPASS_LONG"))

FUZZED = settings(
    max_examples=5000 if _LONG else 300,
    derandomize=not _LONG,
    database=None,  # leaves no directory behind
    deadline=None,
    # each example may use the test's directory again
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
