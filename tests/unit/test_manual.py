"""The manual page and the completion: every command is in them, and they are well-formed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from underpass import manual
from underpass.cli import cli

PROGRAM = str(Path(sys.executable).with_name("underpass"))


def _page() -> str:
    return subprocess.run([PROGRAM, "man"], check=True, capture_output=True, text=True).stdout


def test_every_command_and_option_is_in_the_manual() -> None:
    """Claim: each command has a section with its options, and each section is a command's."""
    assert isinstance(cli, click.Group)
    page = _page()
    found = dict(manual.commands(cli))
    assert {("underpass", name) for name in cli.list_commands(click.Context(cli))} <= found.keys()
    assert ("underpass", "guard", "list") in found
    sections = re.split(r"^\.SS ", page, flags=re.MULTILINE)[1:]
    assert len(sections) == len(found)
    for section, (words, command) in zip(sections, found.items(), strict=True):
        assert section.startswith(" ".join(words).replace("-", "\\-"))
        for option in command.params:
            for name in option.opts if isinstance(option, click.Option) else ():
                assert name.replace("-", "\\-") in section


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff here")
def test_the_manual_is_sound(tmp_path: Path) -> None:
    """Claim: groff has nothing to say about the page; it would about a wrong one."""

    def groff(text: str) -> str:
        page = tmp_path / "underpass.1"
        page.write_text(text)
        words = ["groff", "-man", "-ww", "-z", "-Tutf8", "-rLL=100n", str(page)]
        return subprocess.run(words, check=False, capture_output=True, text=True).stderr

    assert groff(_page()) == ""
    assert groff(_page().replace(".TP", ".TQQ", 1)) != ""


def test_roff_is_escaped() -> None:
    """Claim: what roff would take for its own is printed as it is."""
    assert manual.escaped("a-b\n.SH\n'x\\y") == "a\\-b\n\\&.SH\n\\&'x\\ey"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion(shell: str) -> None:
    """Claim: each shell's script asks the program in a way that it answers."""
    words = [PROGRAM, "completion", shell]
    script = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert f"_UNDERPASS_COMPLETE={shell}_complete" in script
    asking = {
        "_UNDERPASS_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "underpass st",
        "COMP_CWORD": "st" if shell == "fish" else "1",
    }
    done = subprocess.run(
        [PROGRAM], check=False, capture_output=True, text=True, env={**os.environ, **asking}
    )
    assert "status" in done.stdout
    assert "torture" not in done.stdout


def test_bash_completes() -> None:
    """Claim: in a real bash `underpass gu` becomes `guard`, and `guard ` its commands."""
    script = """
        source <(underpass completion bash)
        COMP_WORDS=(underpass gu); COMP_CWORD=1; _underpass_completion underpass
        echo "${COMPREPLY[@]}"
        COMPREPLY=(); COMP_WORDS=(underpass guard ""); COMP_CWORD=2; _underpass_completion underpass
        echo "${COMPREPLY[@]}"
    """
    path = f"{Path(PROGRAM).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.stdout.split("\n")[:2] == ["guard", "allow deny forget list"]
