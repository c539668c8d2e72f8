"""Run every row, then write docs/SEMANTICS.md: `python -m tests.semantics` (root)."""

from __future__ import annotations

import contextlib
import sys

from tests.kernel import bed as beds
from tests.semantics import document
from tests.semantics.rows import RUN
from tests.semantics.runner import judged
from underpass import dataplane


def main() -> int:
    """Write the document if every row is as the table says; else name those that are not."""
    beds.sweep()
    with contextlib.ExitStack() as undo:
        bed = beds.make_bed(undo)
        dataplane.up(bed.pins, bed.cgroup, beds.UNGUARDED)
        wrong = judged(bed, RUN)
    for row in RUN:
        if wrong[row.name]:
            sys.stderr.write(f"{row.name}: {wrong[row.name]}\n")
    if any(wrong.values()):
        return 1
    document.PATH.write_text(document.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
