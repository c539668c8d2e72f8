"""A lying environment: closed streams, no /proc, limits: one line, never a traceback."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.kernel.bed import BPFFS, Bed
from tests.kernel.commands import Done, command, finish, start, underpass, underpass_where
from tests.kernel.kernel_objects import sock_ops_on

FAILED, USAGE, UNSUPPORTED = 1, 2, 4
#: An emulated machine has mounted it twice.
_NO_PROC = "while umount -l /proc 2>/dev/null; do :; done"
COMMANDS = ("status", "status --json", "connections", "explain ::1 ::1", "pause", "resume")


def _shell(bed: Bed, words: str, around: str) -> Done:
    """Run a command inside a shell line, in which `"$@"` stands for it."""
    return finish(start(["sh", "-c", around, "sh", *command(bed.pins, *shlex.split(words))]))


def _up(bed: Bed) -> str:
    words = f"up --cgroup {bed.cgroup}"
    underpass(bed.pins, *words.split()).ok()
    return words


def test_closed_streams(bed: Bed) -> None:
    """Claim: without stdin, stdout and stderr commands do their work as they would with them."""
    up = _up(bed)
    for words in (*COMMANDS, up, "--help"):
        done = _shell(bed, words, 'exec "$@" <&- >&-')
        assert (done.code, done.err) == (0, ""), words
    assert _shell(bed, "fly", 'exec "$@" <&- >&- 2>&-').code == USAGE
    assert _shell(bed, "down", 'exec "$@" <&- >&- 2>&-').code == 0
    assert not bed.pins.exists()


def test_full_streams(bed: Bed) -> None:
    """Claim: what cannot be written is an error of one line; without stderr the code tells."""
    up = _up(bed)
    for words in (*COMMANDS, up, "--version"):
        _shell(bed, words, 'exec "$@" >/dev/full').failed(FAILED, "No space left")
    assert _shell(bed, "fly", 'exec "$@" 2>/dev/full').code == USAGE
    assert _shell(bed, "pause", 'exec "$@" >/dev/full 2>&1').code == FAILED
    _shell(bed, "status", 'exec "$@" | true').ok()


def test_a_poor_environment(bed: Bed) -> None:
    """Claim: nothing depends on PATH, HOME, the locale or the terminal."""
    _up(bed)
    ascii_only = "env -i LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii"
    _shell(bed, "doctor", f'exec {ascii_only} "$@"').ok()
    for setting in ("env -i PATH= LC_ALL=xx_YY.nope TERM=none COLUMNS=-1", ascii_only):
        for words in COMMANDS:
            _shell(bed, words, f'exec {setting} "$@"').ok()
        for words in ("explain ::1 é\udcff", "--pins é/é\udcff/x up"):
            _shell(bed, words, f'exec {setting} "$@"').failed(USAGE)


@pytest.mark.parametrize("word", ["up", "down", "connections", "explain ::1 ::1", "doctor"])
def test_without_proc(bed: Bed, word: str) -> None:
    """Claim: where /proc is not mounted the line says so; nothing is lost, and `down` ends it."""
    up = _up(bed)
    words = up if word == "up" else word
    underpass_where(bed.pins, _NO_PROC, *words.split()).failed(FAILED, "mount proc")
    assert len(sock_ops_on(bed.cgroup)) == 1
    underpass(bed.pins, "down").ok()


def test_hidden_symbols(bed: Bed, tmp_path: Path) -> None:
    """Claim: `up` works where the kernel shows no addresses, or none of its symbols."""
    lines = Path("/proc/kallsyms").read_text().splitlines()
    hidden = {"zero": "\n".join(f"{0:016x} {line.split(' ', 1)[1]}" for line in lines), "no": ""}
    for name, text in hidden.items():
        symbols = tmp_path / name
        symbols.write_text(text)
        hide = f"mount --bind {symbols} /proc/kallsyms"
        underpass_where(bed.pins, hide, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
        underpass(bed.pins, "down").ok()


def test_limits(bed: Bed) -> None:
    """Claim: without room for memory or descriptors `up` ends in one line and leaves nothing."""
    words = f"up --cgroup {bed.cgroup}"
    for limit in ("--as=45000000", "--nofile=10", "--nofile=16"):
        done = _shell(bed, words, f'exec prlimit {limit} "$@"')
        assert done.code in {FAILED, UNSUPPORTED}, (limit, done)
        done.failed(done.code)
        assert list(BPFFS.glob(f"{bed.name}*")) == []
        assert sock_ops_on(bed.cgroup) == []


def test_no_room_for_a_thread(bed: Bed) -> None:
    """Claim: an `up` that can attach but not visit namespaces says so; the next completes it."""
    words = f"up --cgroup {bed.cgroup}"
    no_thread = 'exec prlimit --stack=9000000000 --as=1000000000 "$@"'
    _shell(bed, words, no_thread).failed(FAILED, "thread")
    assert len(sock_ops_on(bed.cgroup)) == 1
    underpass(bed.pins, *words.split()).ok()
    _shell(bed, "down", no_thread).failed(FAILED, "thread")
    underpass(bed.pins, "down").ok()


def test_a_clock_of_its_own(bed: Bed) -> None:
    """Claim: commands whose clock stands a year off the node's do the same, timeouts included."""
    year = 365 * 24 * 3600
    shifted = f'exec unshare --time --fork --monotonic {year} --boottime {year} "$@"'
    _shell(bed, f"up --cgroup {bed.cgroup}", shifted).ok()
    for words in (*COMMANDS, "down --timeout 1"):
        _shell(bed, words, shifted).ok()
    assert not bed.pins.exists()
