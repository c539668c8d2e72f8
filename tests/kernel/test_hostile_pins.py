"""Pins of every wrong kind, contents that lie, paths from anywhere, and users without rights."""

from __future__ import annotations

import ctypes
import errno
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.bed import REPOSITORY, SERVER4, Bed
from tests.kernel.commands import Done, command, finish, start, underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.kernel_objects import pin_foreign_map, sock_ops_on
from tests.kernel.remote import couple, exchange
from underpass import abi, libbpf
from underpass.torture.kernel_objects import pinned, pinned_at

FAILED, USAGE = 1, 2
COMMANDS = ("status", "connections", "explain ::1 ::1", "pause", "resume", "up", "down")
#: A user with every right over files, so that it can run the interpreter wherever that is.
NOBODY = (
    *("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"),
    *("--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search"),
)
#: One without any right at all.
NOTHING = (*NOBODY[:6], "--inh-caps", "-all")


def _run(bed: Bed, word: str, *before: str) -> Done:
    options = ["--cgroup", str(bed.cgroup)] if word == "up" else []
    return finish(start([*before, *command(bed.pins, *word.split(), *options)]))


def _up(bed: Bed) -> set[str]:
    _run(bed, "up").ok()
    return {path.name for path in bed.pins.iterdir()}


def test_every_pin_missing_in_turn(bed: Bed) -> None:
    """Claim: whichever pin is missing, every command answers in one line; none harms traffic."""
    names = sorted(_up(bed))
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    aside = bed.pins.with_name(f"{bed.name}-aside")
    for name in names:
        (bed.pins / name).rename(aside)
        done = _run(bed, "status")
        if name == "about" or name.startswith("link_"):
            done.ok()
        else:
            done.failed(FAILED, name)
        aside.rename(bed.pins / name)
        exchange(near, far, 1)
    _run(bed, "down").ok()


def test_another_object_in_the_place_of_each_pin(bed: Bed) -> None:
    """Claim: a map of another size, and a program, under our names are used for nothing.

    A map with larger values than ours would write past the memory that it is read into.
    """
    names = _up(bed)
    aside = bed.pins.with_name(f"{bed.name}-aside")
    for name in sorted(names):
        (bed.pins / name).rename(aside)
        for foreign in ("map", "program"):
            if foreign == "map":
                pin_foreign_map(bed.pins / name, 65536)
            else:
                with libbpf.get(aside if name == "up_list" else bed.pins / "up_list") as fd:
                    libbpf.pin(fd.number, bed.pins / name)
            done = _run(bed, "explain ::1 ::1")
            if done.code:
                done.failed(FAILED)
            (bed.pins / name).unlink()
        aside.rename(bed.pins / name)
    assert len(sock_ops_on(bed.cgroup)) == 1
    _run(bed, "down").ok()


@pytest.mark.parametrize("beside", ["", "-scratch", "-lock"])
def test_directories_where_pins_should_be(bed: Bed, beside: str) -> None:
    """Claim: a directory among the pins, in the scratch or the lock stops `down` in one line."""
    _up(bed)
    directory = bed.pins.with_name(f"{bed.name}{beside}") / "foreign"
    directory.mkdir(parents=True)
    _run(bed, "status").ok()
    try:
        _run(bed, "down").failed(FAILED, "foreign" if beside != "-lock" else "")
        assert directory.exists()
    finally:
        directory.rmdir()
    _run(bed, "down").ok()
    assert list(bed.pins.parent.glob(f"{bed.name}*")) == []


def test_somebodys_files(bed: Bed, tmp_path: Path) -> None:
    """Claim: `down` with a wrong `--pins` removes no file and no directory, whatever its name."""
    for directory in ("files", "files-scratch", "files-lock", "empty"):
        (tmp_path / directory).mkdir()
    for name in ("sockets", "about", "link_steer"):
        (tmp_path / "files" / name).touch()
        (tmp_path / "files-scratch" / name).touch()
    before = sorted(tmp_path.rglob("*"))
    for name in ("files", "empty"):
        for word in ("down", f"up --cgroup {bed.cgroup}", "pause"):
            done = underpass(tmp_path / name, *word.split())
            done.failed(FAILED if word == "pause" else USAGE, str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "pins",
    [
        "/",
        "",
        "..",
        "/dev/null",
        "é/\udcff",
        "a\nb\x1b[2J",
        "x" * 300,
        "/x" * 3000,
        "/proc/self/fd/0",
    ],
)
def test_paths_from_anywhere(bed: Bed, pins: str) -> None:
    """Claim: whatever `--pins` says, commands answer in one line with a documented code."""
    for word in ("status", "pause", "up", "down"):
        options = ["--cgroup", str(bed.cgroup)] if word == "up" else []
        words = command(Path("unused"), *word.split(), *options)
        words[words.index("unused")] = pins
        done = finish(start(words))
        assert done.code in {0, FAILED, USAGE}, done
        if done.code:
            line = done.failed(done.code).err
            assert line.strip().isprintable()
    assert sock_ops_on(bed.cgroup) == []


def _rewrite(bed: Bed, name: str, kind: type[abi.About | abi.Control], **fields: object) -> None:
    zero, value = ctypes.c_uint32(0), kind()
    with libbpf.get(bed.pins / name) as fd:
        libbpf.lookup(fd.number, zero, value)
        for field, content in fields.items():
            setattr(value, field, content)
        libbpf.update(fd.number, zero, value)


LIES: dict[str, Callable[[Bed], None]] = {
    "version": lambda bed: _rewrite(bed, "about", abi.About, version=b"\xff" * 32),
    "cgroup": lambda bed: _rewrite(bed, "about", abi.About, cgroup=b"/\xfe[/b]\n\x1b[2J" * 42),
    "no cgroup": lambda bed: _rewrite(bed, "about", abi.About, cgroup=b""),
    "capacity": lambda bed: _rewrite(bed, "about", abi.About, capacity=0),
    "abi": lambda bed: _rewrite(bed, "about", abi.About, abi=1 << 31),
    "stop": lambda bed: _rewrite(bed, "control", abi.Control, stop=77, forced=1 << 31),
}


@pytest.mark.parametrize("lie", LIES)
def test_contents_that_lie(bed: Bed, lie: str) -> None:
    """Claim: nonsense in `about` and `control` gives one line or an answer; traffic goes on."""
    _up(bed)
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    LIES[lie](bed)
    exchange(near, far, 1)
    if lie == "stop":
        assert underpass(bed.pins, "status", "--json").document()["state"] == "paused"
    for word in ("status", "explain ::1 ::1", "up", "down"):
        done = _run(bed, word)
        if lie == "abi":
            done.failed(FAILED, "ABI")
        else:
            done.ok()
        exchange(near, far, 1)


def _bpf_says(bed: Bed, *before: str) -> list[str]:
    """What bpf(2) answers to a process that opens each pin by path and each object by id."""
    objects = [(one.kind, one.number) for one in pinned(bed.pins)]
    paths = [str(path) for path in bed.pins.iterdir()]
    script = f"""
import errno, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from underpass.torture.kernel_objects import Object, pinned_at
for action in [lambda p=p: pinned_at(Path(p)) for p in {paths!r}] + [
    lambda k=k, n=n: Object(k, n).exists() for k, n in {objects!r}
]:
    try:
        print(bool(action()))
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    return finish(start([*before, sys.executable, "-c", script])).ok().out.split()


def test_a_user_without_rights(bed: Bed) -> None:
    """Claim: without the capabilities nobody reads or steers, by command, by path or by id."""
    _up(bed)
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    assert stat.S_IMODE(bed.pins.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in bed.pins.iterdir()} == {0}
    before = pinned(bed.pins)
    for word in COMMANDS:
        _run(bed, word, *NOBODY).failed(FAILED, "root")
    assert set(_bpf_says(bed)) == {"True"}
    refusals = {errno.errorcode[errno.EPERM], errno.errorcode[errno.EACCES]}
    assert set(_bpf_says(bed, *NOBODY)) <= refusals
    assert pinned(bed.pins) == before
    assert underpass(bed.pins, "status", "--json").document()["state"] == "active"
    exchange(near, far, 1)


def test_a_user_without_any_right(bed: Bed) -> None:
    """Claim: one who may not even look into the directory is refused by the kernel, too."""
    _up(bed)
    ls = finish(start([*NOTHING, "ls", str(bed.pins)]))
    assert ls.code != 0
    for name in sorted(path.name for path in bed.pins.iterdir()):
        read = finish(start([*NOTHING, "cat", str(bed.pins / name)]))
        assert "Permission denied" in read.err
    # the lock and the scratch directory are as closed as the pins, while they are there
    for beside in ("-lock", "-scratch"):
        assert not bed.pins.with_name(f"{bed.name}{beside}").exists()


@pytest.mark.parametrize("size", [ctypes.sizeof(abi.About) - 3, ctypes.sizeof(abi.About) + 8])
def test_another_abi_of_another_size(bed: Bed, size: int) -> None:
    """Claim: of a generation whose `about` has grown or shrunk the ABI is told, too."""
    bed.pins.mkdir()
    pin_foreign_map(bed.pins / "about", size)
    value = (ctypes.c_uint32 * (size // 4 + 1))(abi.ABI + 1)
    with libbpf.get(bed.pins / "about") as fd:
        libbpf.update(fd.number, ctypes.c_uint32(0), value)
        for word in COMMANDS:
            _run(bed, word).failed(FAILED, f"its ABI is {abi.ABI + 1}, this is {abi.ABI}")
        value[0] = abi.ABI
        libbpf.update(fd.number, ctypes.c_uint32(0), value)
    _run(bed, "status").failed(FAILED, "not a generation of this version")
    (bed.pins / "about").unlink()
    bed.pins.rmdir()


def test_a_foreign_pin_is_never_ours(bed: Bed, plane: MakePlane) -> None:
    """Claim: a map of the same sizes as `about`, but empty, is of no ABI of ours."""
    plane()
    (bed.pins / "about").unlink()
    foreign = pin_foreign_map(bed.pins / "about", ctypes.sizeof(abi.About))
    for word in COMMANDS:
        _run(bed, word).failed(FAILED, "ABI is 0")
    assert pinned_at(bed.pins / "about") == foreign
    assert len(sock_ops_on(bed.cgroup)) == 1
    with libbpf.get(bed.pins / "link_handshake") as link:
        libbpf.detach(link.number)
    for path in bed.pins.iterdir():
        path.unlink()
    bed.pins.rmdir()
