"""Who a program is: the identity under which the guard remembers it.

Mirrors ``identify()`` of ``bpf/programs.h``: name, size and time of change of the executable, the
same in every container of an image; of an interpreter also its arguments.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from underpass import abi
from underpass.model import Program, Rule, Sign

_MULTIPLIER = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_INTERPRETERS = tuple(
    b"pyth node java ruby perl dotn busy ld-l qemu beam deno mono php lua bun".split()
)
_NAME, _ARGUMENTS, _COMMAND = 32, 512, 128
_BLOCK = 64
_RULED = {Rule.ALLOW: "allowed", Rule.DENY: "denied"}


def identify(pid: int) -> tuple[int, abi.Program] | None:
    """Key and description of the program that process ``pid`` runs; None if there is none."""
    process = Path(f"/proc/{pid}")
    try:
        name = os.fsencode((process / "exe").readlink().name).removesuffix(b" (deleted)")
        file = (process / "exe").stat()
        arguments = (process / "cmdline").read_bytes()
    except OSError:
        return None
    found = abi.Program(name=name[: _NAME - 1], pid=pid)
    found.command[:] = arguments[:_COMMAND].ljust(_COMMAND, b"\0")
    found.by_arguments = name.startswith(_INTERPRETERS)
    key = key_of(name, file.st_size, int(file.st_mtime_ns // 10**9), arguments)
    return key, found


def watchable(pid: int) -> bool:
    """Is the process's program one of 64 bits? The system calls of others have other numbers."""
    try:
        with Path(f"/proc/{pid}/exe").open("rb") as file:
            return file.read(5) == b"\x7fELF\x02"
    except OSError:
        return False


def listener(address: bytes, port: int, inode: int) -> tuple[int, abi.Program]:
    """What stands for the program behind a listener of which no process is to be seen."""
    found = abi.Program(name=b"(listener)")
    text = f"{abi.address(address)} port {port}".encode()
    found.command[:] = text[:_COMMAND].ljust(_COMMAND, b"\0")
    return key_of(found.name, inode, port, b""), found


def key_of(name: bytes, size: int, changed: int, arguments: bytes) -> int:
    """The key of a program; ``changed`` in seconds since 1970."""
    hashed = _mix(0, struct.unpack("=4Q", name[: _NAME - 1].ljust(_NAME, b"\0")))
    hashed = _mix(hashed, (size, changed & _WORD))
    if name.startswith(_INTERPRETERS):
        text = arguments[:_ARGUMENTS]
        padded = text.ljust(-(-len(text) // _BLOCK) * _BLOCK, b"\0")
        hashed = _mix(hashed, (word for (word,) in struct.iter_unpack("=Q", padded)))
    return hashed or 1


def _mix(hashed: int, words: Iterable[int]) -> int:
    for word in words:
        hashed = (hashed ^ word) * _MULTIPLIER & _WORD
        hashed ^= hashed >> 32
    return hashed


def wrong_name(name: str) -> str:
    """Why ``name`` can be no program's name; empty if it can."""
    if not name:
        return "a program's name is not empty"
    if "/" in name:
        return "a program goes by the name of its file, without a directory"
    if not name.isprintable():
        return "a program's name has printable characters only"
    if len(name.encode()) >= _NAME:
        return f"a program's name has {_NAME - 1} bytes at most"
    return ""


def id_of(key: int) -> str:
    """A key as people see it."""
    return f"{key:016x}"


def known_signs(name: bytes, knobs: abi.Knobs) -> Sign:
    """What a program of this name would show too late; mirrors ``known_signs()`` of ``guard.h``."""
    first = int.from_bytes(name[:8].ljust(8, b"\0"), sys.byteorder)
    found = Sign(0)
    for known in knobs.known:
        if known.bits and first & known.bits == known.name:
            found |= Sign(known.signs)
    return found


def name_of(program: abi.Program) -> str:
    """The name of its executable."""
    return str(program.name.decode(errors="replace"))


def describe(key: int, found: abi.Program, knobs: abi.Knobs) -> Program:
    """What `guard list` shows of an element of the map `programs`; mirrors ``admitted()``."""
    signs = Sign(found.signs & sum(Sign)) | known_signs(found.name, knobs)
    rule = Rule(found.rule & 3)
    ruled = None if rule is Rule.ALLOW and Sign.IN_KERNEL in signs else _RULED.get(rule)
    admitted = "admitted" if found.active_ns >= knobs.observe_ns else "watched"
    return Program(
        id=id_of(key),
        name=name_of(found),
        command=_text(bytes(found.command)),
        by_arguments=bool(found.by_arguments),
        verdict=ruled or ("kept-out" if signs else admitted),
        reason=", ".join([*(["rule"] if ruled else []), *signs.words]),
        signs=signs.words,
        observed_seconds=round(found.active_ns / 1e9, 1),
        pid=found.pid,
    )


def unseen(rules: dict[tuple[int, bytes], int], known: list[Program]) -> list[Program]:
    """What `guard list` shows of rules that are about none of the known programs."""
    ids, names = {p.id for p in known}, {p.name for p in known}
    found = []
    for (key, raw), rule in sorted(rules.items()):
        at, name = id_of(key) if key else "", raw.decode(errors="replace")
        if at in ids or name in names or Rule(rule) not in _RULED:
            continue
        verdict = _RULED[Rule(rule)]
        found.append(Program(at, name, "", False, verdict, "rule", [], 0.0, 0))
    return found


def in_path(name: str) -> tuple[str, str, bool] | None:
    """A command as a shell finds it: its path, the name its program goes by, is it a script.

    None if there is none of this name.
    """
    path = shutil.which(name)
    if not path:
        return None
    file = Path(path).resolve()
    try:
        with file.open("rb") as opened:
            script = opened.read(2) == b"#!"
    except OSError:
        script = False
    return path, os.fsencode(file.name)[: _NAME - 1].decode(errors="replace"), script


def _text(raw: bytes) -> str:
    shown = raw.replace(b"\0", b" ").decode(errors="replace").strip()
    return "".join(c if c.isprintable() else " " for c in shown)
