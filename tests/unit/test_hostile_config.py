"""Files that were never meant as a configuration: one usage error each, read in bounded time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.fuzz import FUZZED
from underpass import config
from underpass.errors import Usage
from underpass.model import Settings

FIELDS = ("capacity", "budget_bytes", "budget_messages", "node_budget_bytes")
_KEYS = st.one_of(st.sampled_from(FIELDS), st.text(max_size=8).map(repr))
_VALUES = st.one_of(
    st.integers().map(str),
    st.integers(min_value=0, max_value=1 << 300).map(hex),
    st.floats().map(str),
    st.sampled_from(["true", '""', "[]", "{}", "1979-05-27", "nan", "-0", "0x", "1e9", "1_0"]),
    st.text(max_size=8).map(lambda text: f'"{text}"'),
)
_FILES = st.lists(st.tuples(_KEYS, _VALUES), max_size=5).map(
    lambda pairs: "\n".join(f"{key} = {value}" for key, value in pairs)
)


def _refused(path: Path, *words: str) -> str:
    with pytest.raises(Usage) as raised:
        config.read(path)
    line = str(raised.value)
    assert line.isprintable()
    assert len(line) < 5000
    for word in (str(path), *words):
        assert word in line
    return line


def _settings_or_refusal(path: Path) -> None:
    try:
        found = config.read(path)
    except Usage:
        _refused(path)
    else:
        assert isinstance(found, Settings)
        assert all(type(getattr(found, field)) is int for field in FIELDS)


@FUZZED
@given(st.binary(max_size=200))
@example(b"capacity = " + b"9" * 5000)
@example(b"capacity = " + b"[\n" * 20_000)
@example(b"a" + b".a" * 20_000 + b" = 1")
@example((b"a" + b".a" * 490 + b" = 1\n") * 60)
@example(b"\0")
@example(b"\xef\xbb\xbfcapacity = 1")
@example(b"capacity = 1\xff")
@example(b'"\\u001b[2J\\n" = 1')
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    """Claim: any bytes as a file are settings or one usage error that names the file."""
    path = tmp_path / "underpass.toml"
    path.write_bytes(data)
    _settings_or_refusal(path)


@FUZZED
@given(_FILES)
def test_any_fields(tmp_path: Path, text: str) -> None:
    """Claim: the same for files that look like a configuration."""
    path = tmp_path / "underpass.toml"
    path.write_text(text, errors="surrogatepass")
    _settings_or_refusal(path)


@FUZZED
@given(st.sampled_from(FIELDS), st.one_of(st.floats(), st.integers(), st.booleans()))
def test_a_wrong_value_is_named(tmp_path: Path, field: str, value: float) -> None:
    """Claim: the error of a field out of range or of a wrong type names the field."""
    path = tmp_path / "underpass.toml"
    path.write_text(f"{field} = {str(value).lower()}")
    try:
        assert getattr(config.read(path), field) == value
    except Usage:
        _refused(path, field)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("capacity = 5\n]\n", "line 2"),
        ("capacity = 5\n\n\ncapacity = 6\n", "line 4"),
        ("capcity = 5", "capcity"),
        ("[budget_bytes]", "budget_bytes"),
        ("capacity = 1\ncapacity.x = 1\n", "line 2"),
    ],
)
def test_where_it_is_wrong(tmp_path: Path, text: str, word: str) -> None:
    """Claim: the error names the line where it is no TOML, else the field."""
    path = tmp_path / "underpass.toml"
    path.write_text(text)
    _refused(path, word)


@pytest.mark.timeout(20)
def test_what_is_no_file(tmp_path: Path) -> None:
    """Claim: directories, FIFOs, devices and loops are refused at once, without waiting."""
    fifo, loop = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    nul, long = Path("nul\0"), Path("/", "x" * 5000)
    for path in (fifo, loop, tmp_path, Path("/dev/zero"), Path("/dev/null"), fifo / "below"):
        _refused(path)
    for path in (nul, long):
        with pytest.raises(Usage):
            config.read(path)


def test_a_huge_file(tmp_path: Path) -> None:
    """Claim: of a file of a GiB no more than 64 KiB is read."""
    path = tmp_path / "underpass.toml"
    path.touch()
    os.truncate(path, 1 << 30)
    _refused(path, "65536 bytes")
