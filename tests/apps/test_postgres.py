"""PostgreSQL through the shortcut gives right answers: queries, COPY, notifications."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.apps import postgres
from tests.apps.programs import RUN_DEADLINE, STREAMS, Checked, Compare, ask
from tests.kernel.bed import SERVER4, Bed

_AT = ["--host", SERVER4, "--port", str(postgres.PORT), "--username", "test"]
_CLIENTS, _TRANSACTIONS = 8, 2000
_ROWS = 200_000
_REPEAT = 31
"""How often a row has the md5 of its number: 200 MB in all."""
_NOTES = 3000
_NOTE = re.compile(r'^Asynchronous notification "notes" with payload "(.*)" received from .*$')


@pytest.fixture
def _database(bed: Bed, compare: Compare) -> Iterator[None]:  # noqa: ARG001 - ends after this
    with postgres.running(bed, "server"):
        yield


@pytest.mark.usefixtures("_database")
def test_postgres_answers_queries(bed: Bed, compare: Compare) -> None:
    """Claim: not one of pgbench's prepared statements fails."""
    pgbench = [postgres.program("pgbench"), *_AT]
    bed.worker("client", outside=True).call(ask, [*pgbench, "--initialize", "postgres"])
    compare("PostgreSQL, pgbench -S -M prepared", _select, pgbench)


@pytest.mark.usefixtures("_database")
def test_postgres_copies_are_right(compare: Compare) -> None:
    """Claim: COPY of 200 MB out of PostgreSQL and into it is right in every row."""
    compare("PostgreSQL, COPY", _copy, [postgres.program("psql"), *_AT], floor=STREAMS)


@pytest.mark.usefixtures("_database")
def test_postgres_notifications_come_in_order(compare: Compare) -> None:
    """Claim: an idle listener gets every notification, whole and in order."""
    compare("PostgreSQL, NOTIFY", _notify, [postgres.program("psql"), *_AT])


def _select(pgbench: list[str]) -> Checked:
    """In a worker: single-row SELECTs on several connections."""
    options = ["--select-only", "--protocol=prepared", "--no-vacuum", "--jobs=2"]
    count = [f"--client={_CLIENTS}", f"--transactions={_TRANSACTIONS}"]
    # what a prepared SELECT and its answer have at least
    checked = Checked(_CLIENTS * _TRANSACTIONS * 100)
    with checked.timed():
        report = ask([*pgbench, *options, *count, "postgres"]).decode()
    total = _CLIENTS * _TRANSACTIONS
    assert f"transactions actually processed: {total}/{total}" in report, report
    assert "failed transactions: 0 " in report, report
    return checked


def _copy(psql: list[str]) -> Checked:
    """In a worker: COPY rows out, and the same rows in; the server says if they are right."""
    psql = [*psql, "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "postgres"]
    row = f"repeat(md5(i::text), {_REPEAT})"
    rows = b"".join(
        b"%d\t%b\n" % (i, hashlib.md5(b"%d" % i).hexdigest().encode() * _REPEAT)
        for i in range(_ROWS)
    )
    checked = Checked(2 * len(rows))
    select = f"SELECT i, {row} FROM generate_series(0, {_ROWS - 1}) i"
    ask([*psql, "-c", "DROP TABLE IF EXISTS copied; CREATE UNLOGGED TABLE copied (i int, t text)"])
    with checked.timed():
        copied = ask([*psql, "-c", f"COPY ({select}) TO STDOUT"])
        ask([*psql, "-c", "COPY copied FROM STDIN"], rows)
    assert copied == rows
    right = ask([*psql, "-c", f"SELECT count(DISTINCT i), bool_and(t = {row}) FROM copied"])
    assert right.decode().strip() == f"{_ROWS}|t"
    return checked


def _notify(psql: list[str]) -> Checked:
    """In a worker: one session notifies, in a transaction each, another has listened all along."""
    psql = [*psql, "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "postgres"]
    notes = [f"{number} {'x' * (number % 500)}" for number in range(_NOTES)]
    checked = Checked(2 * sum(map(len, notes)))
    pipe = subprocess.PIPE
    with subprocess.Popen(psql, stdin=pipe, stdout=pipe, text=True, bufsize=1) as listener:
        assert listener.stdin
        assert listener.stdout
        listener.stdin.write("LISTEN notes;\n\\echo listening\n")
        assert listener.stdout.readline() == "listening\n"
        with checked.timed():
            ask(psql, "".join(f"NOTIFY notes, '{note}';\n" for note in notes).encode())
            # psql looks for notifications after a command
            said, _ = listener.communicate("SELECT 1;\nSELECT 1;\n", timeout=RUN_DEADLINE)
    told = [_NOTE.match(line) for line in said.splitlines() if line != "1"]
    assert [note and note[1] for note in told] == notes
    return checked
