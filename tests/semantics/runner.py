"""Plays rows, each in a process of its own with a hard deadline, on one of the two paths.

As a program it lives in one namespace and one cgroup and writes a line of JSON a row:
`python -m tests.semantics.runner NAMESPACE CGROUP PINS PATIENCE ROW...`, with `-` for no pins.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.kernel.bed import REPOSITORY, Bed
from tests.semantics.rows import BY_NAME
from tests.semantics.stage import Stage
from tests.semantics.table import Act, Row, Seen, judge
from underpass.dataplane import Dataplane
from underpass.torture.worker import Place

PATIENCE = 0.4
"""Seconds after which a call that has not returned counts as blocked."""
_MORE_PATIENCE = 8 * PATIENCE
_DEADLINE = 25.0
"""Seconds after which a row hangs."""
_PR_SET_PDEATHSIG = 1
_KILLED_WITH_PARENT = (_PR_SET_PDEATHSIG, signal.SIGKILL)

Both = tuple[Seen, Seen]
"""What was seen on plain TCP and on the shortcut."""


def observe(bed: Bed, rows: Sequence[Row], patience: float = PATIENCE) -> dict[str, Both]:
    """Play rows on both paths; on the shortcut by the data plane that is pinned in the bed."""
    names = [row.name for row in rows]
    places = (("client", bed.outside, "-"), ("server", bed.cgroup, str(bed.pins)))
    runs = [_start(bed, *place, str(patience), *names) for place in places]
    plain, shortcut = (
        [json.loads(line) for line in run.communicate()[0].splitlines()] for run in runs
    )
    seen = zip(names, plain, shortcut, strict=True)
    return {name: (Seen(**native), Seen(**ours)) for name, native, ours in seen}


def judged(bed: Bed, rows: Sequence[Row]) -> dict[str, str]:
    """What is wrong with each row, by its name; empty where it is as the table says.

    Those that are not are played once more with more patience: the machine may have been busy.
    """

    def judge_all(seen: dict[str, Both]) -> dict[str, str]:
        return {row.name: judge(row, *seen[row.name]) for row in rows if row.name in seen}

    wrong = judge_all(observe(bed, rows))
    if doubtful := [row for row in rows if wrong[row.name]]:
        wrong |= judge_all(observe(bed, doubtful, _MORE_PATIENCE))
    return wrong


def _start(bed: Bed, where: str, cgroup: Path, *words: str) -> subprocess.Popen[str]:
    command = (
        sys.executable,
        "-m",
        "tests.semantics.runner",
        bed.netns[where],
        str(cgroup),
        *words,
    )
    run = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    bed.undo.callback(run.kill)
    return run


def _play(act: Act, pins: str, patience: float) -> Seen:
    """One row in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that what it starts ends with it
        ctypes.CDLL(None).prctl(*_KILLED_WITH_PARENT)
        seen = Seen("ended early")
        try:
            plane = None if pins == "-" else Dataplane.open(Path(pins))
            stage = Stage(plane, patience)
            seen = Seen(act(stage), stage.carried())
        except BaseException as error:  # noqa: BLE001 - becomes the row's outcome
            traceback.print_exc()
            seen = Seen(f"{type(error).__name__}: {error}")
        finally:
            os.write(writing, json.dumps(asdict(seen)).encode())
            os._exit(0)
    os.close(writing)
    try:
        ready = select.select([reading], [], [], _DEADLINE)[0]
        told = os.read(reading, 1 << 16) if ready else b""
        return Seen(**json.loads(told)) if told else Seen("died" if ready else "hangs")
    finally:
        os.close(reading)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main() -> None:
    """Play the rows of the command line."""
    ctypes.CDLL(None).prctl(*_KILLED_WITH_PARENT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    netns, cgroup, pins, patience, *names = sys.argv[1:]
    Place(netns, Path(cgroup)).enter()
    for name in names:
        act = BY_NAME[name].act
        assert act is not None
        seen = _play(act, pins, float(patience))
        sys.stdout.write(json.dumps(asdict(seen)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
