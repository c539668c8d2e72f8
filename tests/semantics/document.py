"""docs/SEMANTICS.md, from the rows: what the table says, not what one machine saw."""

from __future__ import annotations

from pathlib import Path

from tests.kernel.bed import REPOSITORY
from tests.semantics.rows import ROWS, SUBJECTS
from tests.semantics.table import Row, Verdict

PATH: Path = REPOSITORY / "docs" / "SEMANTICS.md"

_HEAD = """\
# What programs can notice

<!-- Written by `python -m tests.semantics`; edit the rows in tests/semantics/ instead. -->

A program whose connection takes the shortcut makes the same calls as before, and most of them do
what they did. Of {total} rows below
{same} are the same, {guarded} would differ and are guarded, {accepted} differ and are accepted.

- **same**: what is seen on the shortcut is what is seen on plain TCP.
- **guarded**: it would differ, so it does not go by the shortcut: this direction, connection or
  program stays on TCP. *Unguarded* is what is seen where the guard is off or comes too late: it
  knows a program by what it does, so the first time may be such a time.
- **accepted**: it differs; no byte is lost, swapped or delivered to the wrong socket; the last
  column says why we live with it. A program that cannot belongs outside the cgroup that
  `underpass up --cgroup` names.

For somebody in a hurry:

- Reading without blocking, after any kind of poll, is the same.
- A *blocking* `recv` that sleeps may return EAGAIN where TCP goes on sleeping or tells the cause
  at once: after a signal, a stop (job control, a debugger, a frozen cgroup), a reset, another
  thread's shutdown, or when another reader got the bytes.
- One thread that shuts a socket down in the very moment in which another's `send` on it is under
  way may cut off that message, though `send` tells its size.
- A peer that closes with bytes unread is seen as end of file, not as ECONNRESET.
- A sender may run ahead of its reader by 16 MiB, whatever the buffer sizes.
- What looks at packets or at TCP's own queues (tcpdump, a firewall rule that comes later, `ss`,
  TCP_INFO) does not see the shortcut's bytes.

Every row that is not marked [not run] is played by `tests/semantics`, twice, each time in a process
of its own on a fresh connection: outside the attached cgroup, and inside it. There the counters of
underpass have to show that the row's bytes went by the shortcut, or that none did. A row that sees
anything else fails. "a *or* b" depends on the kernel.
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
    if row.verdict is Verdict.SAME:
        shortcut = "the same"
    elif row.verdict is Verdict.GUARDED:
        shortcut = f"stays on TCP; unguarded: {shortcut}" if shortcut else "stays on TCP"
    return row.call, plain, shortcut, row.verdict.value, row.why
