"""The manual page underpass(1), made from the command line's own help. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from underpass import __version__

_FILES = (
    ("/sys/fs/bpf/underpass", "where the data plane is pinned"),
    ("/etc/underpass/underpass.toml", "configuration, as the systemd unit names it"),
    ("/var/lib/underpass/calibration.json", "what `underpass calibrate` has found"),
)


def page(root: click.Group) -> str:
    """The page in man(7)'s macros, with every command."""
    return "\n".join([*_head(root), *_commands(root), *_tail()]) + "\n"


def commands(
    group: click.Group, words: tuple[str, ...] = ("underpass",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that run it; a group comes before its members."""
    context = click.Context(group, info_name=words[-1])
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        yield (*words, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))


def escaped(text: str) -> str:
    """``text`` as roff prints it."""
    text = (  # after | a line may end
        text.replace("\\", "\\e").replace("-", "\\-").replace("|", "|\\:")
    )
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def _head(root: click.Group) -> Iterator[str]:
    yield f'.TH UNDERPASS 1 "" "underpass {__version__}" "User commands"'
    yield ".ad l"
    yield from (".SH NAME", "underpass \\- TCP between processes of one node, under the stack")
    yield from (".SH SYNOPSIS", ".B underpass", "[OPTIONS] COMMAND [ARGUMENTS]")
    yield ".SH DESCRIPTION"
    yield from _text(root.help or "")
    yield ".SH OPTIONS"
    yield from _options(root)
    yield ".SH COMMANDS"


def _commands(root: click.Group) -> Iterator[str]:
    for words, command in commands(root):
        usage = " ".join(command.collect_usage_pieces(click.Context(command)))
        yield f".SS {escaped(' '.join(words))} {escaped(usage)}".rstrip()
        yield from _text(command.help or "")
        yield from _options(command)


def _tail() -> Iterator[str]:
    yield ".SH FILES"
    for path, words in _FILES:
        yield from (".TP", f".I {escaped(path)}", escaped(words))
    yield from (".SH SEE ALSO", "docs/OPERATIONS.md and docs/ARCHITECTURE.md in the sources")


def _text(help_text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", help_text.strip())):
        if number:
            yield ".PP"
        lines = [line.strip() for line in paragraph.splitlines()]
        if lines[0] == "\b":  # its lines stay as they are
            raw = [line.rstrip() for line in paragraph.splitlines()[1:]]
            yield from (".nf", *(escaped(line) for line in raw), ".fi")
        else:
            yield escaped(" ".join(lines))


def _options(command: click.Command) -> Iterator[str]:
    context = click.Context(command)
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if record and isinstance(option, click.Option):
            yield from (".TP", f".B {escaped(record[0])}", escaped(" ".join(record[1].split())))
