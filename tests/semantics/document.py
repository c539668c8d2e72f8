"""docs/SEMANTICS.md, from the rows: what the table says, not what one machine saw."""

from __future__ import annotations

from pathlib import Path

from tests.kernel.worker import REPOSITORY
from tests.semantics.rows import ROWS, SUBJECTS
from tests.semantics.table import Row, Verdict

PATH: Path = REPOSITORY / "docs" / "SEMANTICS.md"

_HEAD = """\
# What programs can notice

<!-- Written by `python -m tests.semantics`; edit the rows in tests/semantics/ instead. -->

A program whose connection takes the shortcut makes the same calls as before, and nearly all of
them do what they did: of {total} rows below {same} are the same, {guarded} differ and are
guarded, {accepted} differ and are accepted.

- **same**: a test does it on plain TCP and on the shortcut, and sees the same.
- **guarded**: it would be different, so it does not go by the shortcut: this direction,
  connection or program stays on TCP. *Unguarded* is what is seen where the guard is off or comes
  too late: it knows a program by what it does, so the first time may be such a time.
- **accepted**: it is different, no byte is lost or out of order, and the last column says why we
  live with it. Programs that cannot belong outside the cgroup that `underpass up --cgroup` names.

**Five lines for those in a hurry.** Reading without blocking, with any kind of poll, is the same.
A *blocking* `recv` may return EAGAIN where TCP goes on sleeping or names the error at once: after
a signal, a reset, a shutdown by another thread, or when another thread got the bytes. A peer that
closes with bytes unread is seen as end of file, not as ECONNRESET. A sender may be further ahead
of its reader: up to 16 MiB. Nothing that looks at packets (tcpdump, a firewall rule that comes
later, TCP_INFO) sees the shortcut's bytes.

Every row is run by `tests/semantics/test_semantics.py`, twice, each time in a process of its own
on a fresh connection: outside the attached cgroup, and inside it, where underpass's counters have
to show that the row's bytes went by the shortcut, or that none did. A row that sees anything else
fails. "a *or* b" depends on the kernel.
"""
_COLUMNS = (
    "| call | plain TCP | shortcut | verdict | why, or what guards it |\n|---|---|---|---|---|\n"
)


def text() -> str:
    """The whole document."""
    counts = {verdict: sum(row.verdict is verdict for row in ROWS) for verdict in Verdict}
    parts = [
        _HEAD.format(
            total=len(ROWS),
            same=counts[Verdict.SAME],
            guarded=counts[Verdict.GUARDED],
            accepted=counts[Verdict.ACCEPTED],
        )
    ]
    for subject in SUBJECTS:
        lines = "".join(f"| {' | '.join(_cells(row))} |\n" for row in subject.rows)
        parts.append(f"## {subject.name}\n\n{_COLUMNS}{lines}")
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    plain, shortcut = (" *or* ".join(seen) for seen in (row.plain, row.shortcut))
    if row.verdict is Verdict.GUARDED:
        shortcut = f"as on TCP; unguarded: {shortcut}" if shortcut else "as on TCP"
    return row.call, plain, shortcut, row.verdict.value, row.why
