"""The configuration file: what it sets, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from underpass import config
from underpass.errors import Usage
from underpass.model import Settings


def _read(directory: Path, text: str) -> Settings:
    file = directory / "underpass.toml"
    file.write_text(text)
    return config.read(file)


@pytest.mark.parametrize("listen", ["9464", "localhost", "::1:80", "127.0.0.1:99999", "host:http"])
def test_where_nobody_can_listen(tmp_path: Path, listen: str) -> None:
    """Claim: it is refused as the file is read, with line and field, not once the agent starts."""
    with pytest.raises(Usage, match=r"line 2: agent.listen: "):
        _read(tmp_path, f'[agent]\nlisten = "{listen}"')


def test_no_file_means_defaults() -> None:
    """Claim: without a file, and with an empty one, the defaults hold."""
    assert config.read(None) == Settings()


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    """Claim: what a file does not name keeps its default."""
    assert _read(tmp_path, "") == Settings()
    assert _read(tmp_path, "capacity = 9") == Settings(capacity=9)


def test_every_field_can_be_set(tmp_path: Path) -> None:
    """Claim: all sizes of a generation can be set."""
    text = """
        capacity = 1000
        budget_bytes = 1048576
        budget_messages = 100
        node_budget_bytes = 33554432
    """
    assert _read(tmp_path, text) == Settings(1000, 1 << 20, 100, 32 << 20)


@pytest.mark.parametrize(
    "text",
    [
        "capacity = 0",
        "capacity = -1",
        "capacity = 1.5",
        'capacity = "many"',
        "budget_bytes = 17825792",
        "budget_messages = 1",
        "speed = 1",
        "[capacity]",
        "= 1",
        "\x00",
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str) -> None:
    """Claim: wrong, unknown and out-of-range fields are usage errors of one line."""
    with pytest.raises(Usage) as raised:
        _read(tmp_path, text)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('deny = ["/usr/bin/redis-server"]', "directory"),
        ('allow = [""]', "empty"),
        ('deny = ["two\\nlines"]', "printable"),
        (f'allow = ["{"x" * 32}"]', "31 bytes"),
        (f'deny = ["{"é" * 16}"]', "31 bytes"),
        ('deny = ["a"]\nallow = ["b", "a"]', "'a' is in both allow and deny"),
    ],
)
def test_wrong_names_are_refused_in_words(tmp_path: Path, text: str, word: str) -> None:
    """Claim: what is wrong with a program's name, or with two lists of them, is said in words."""
    with pytest.raises(Usage) as raised:
        _read(tmp_path, f"[guard]\n{text}")
    line = str(raised.value)
    assert word in line
    assert "regex" not in line
    assert "^" not in line
    assert "\n" not in line


def test_names_that_the_kernel_can_have(tmp_path: Path) -> None:
    """Claim: names of 31 bytes, with blanks or accents are taken as they are."""
    names = ("x" * 31, "é" * 15, "Web Content")
    read = _read(tmp_path, f"[guard]\ndeny = {list(names)}\nallow = ['other']")
    assert (read.deny, read.allow) == (names, ("other",))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Claim: a missing file is a usage error that names it."""
    with pytest.raises(Usage, match=r"missing\.toml"):
        config.read(tmp_path / "missing.toml")


def test_the_agents_table(tmp_path: Path) -> None:
    """Claim: [agent] is read, refused where it is wrong, and no matter to `up`."""
    file = tmp_path / "underpass.toml"
    file.write_text('capacity = 9\n[agent]\nlisten = ":9464"\nadopt = 0\n')
    settings, agent = config.read_all(file)
    assert settings == config.read(file) == Settings(capacity=9)
    assert (agent.listen, agent.adopt, agent.check) == (":9464", 0, 5)
    file.write_text("[agent]\ncheck = 0")
    with pytest.raises(Usage, match=r"agent\.check"):
        config.read_all(file)
