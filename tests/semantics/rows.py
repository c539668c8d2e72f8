"""All rows, in the order of the document."""

from __future__ import annotations

from tests.semantics import (
    closing,
    connecting,
    network,
    options,
    processes,
    readiness,
    reading,
    sending,
)
from tests.semantics.table import Row

SUBJECTS = (
    reading.READING,
    reading.SPECIAL,
    readiness.READINESS,
    sending.SENDING,
    closing.CLOSING,
    options.OPTIONS,
    processes.PROCESSES,
    connecting.CONNECTING,
    network.NETWORK,
)
ROWS: tuple[Row, ...] = tuple(row for subject in SUBJECTS for row in subject.rows)
BY_NAME = {row.name: row for row in ROWS}
RUN = tuple(row for row in ROWS if row.act is not None)
