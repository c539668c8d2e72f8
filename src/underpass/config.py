"""The configuration file (TOML): sizes of a generation. Unknown or wrong fields are refused."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from underpass import programs
from underpass.errors import Usage
from underpass.model import Settings

_MIB = 1 << 20
_MOST = 64 << 10  # bytes that are read: what never ends, or nearly, is no configuration
_WIDEST = 1000  # characters of a line: tomllib's memory grows with the square of a dotted key


class _Guard(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    observe: Annotated[float, Meta(ge=0.1, le=86400)] = Settings.observe_seconds
    admit_unknown: bool = Settings.admit_unknown
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    capacity: Annotated[int, Meta(ge=1, le=1_000_000)] = Settings.capacity
    budget_bytes: Annotated[int, Meta(ge=64 << 10, le=16 * _MIB)] = Settings.budget_bytes
    budget_messages: Annotated[int, Meta(ge=16, le=16384)] = Settings.budget_messages
    node_budget_bytes: Annotated[int, Meta(ge=0, le=1 << 40)] = Settings.node_budget_bytes
    guard: _Guard = _Guard()


def read(path: Path | None) -> Settings:
    """Settings from ``path``; the defaults without one.

    Raises:
        Usage: the file cannot be read, is no TOML, or has a field that is unknown or out of range.
    """
    if path is None:
        return Settings()
    try:
        fields = msgspec.convert(tomllib.loads(_text(path)), _File)
    except OSError as error:
        raise Usage("read", path, error.strerror or str(error), "name a readable file") from None
    except msgspec.ValidationError as error:
        raise Usage("use", path, str(error), "see `underpass up --help` for the fields") from None
    except RecursionError:
        raise Usage("read", path, "it is nested too deeply", "correct it") from None
    except ValueError as error:  # of TOML, of UTF-8, of a number of thousands of digits
        raise Usage("read", path, f"it is not TOML: {error}", "correct it") from None
    sizes = msgspec.structs.asdict(fields)
    guard = sizes.pop("guard")
    if cause := _wrong_names(guard):
        raise Usage("use", path, cause, "correct it in [guard]")
    return Settings(
        **sizes,
        observe_seconds=guard.observe,
        admit_unknown=guard.admit_unknown,
        allow=guard.allow,
        deny=guard.deny,
    )


def _wrong_names(guard: _Guard) -> str:
    """What is wrong with the names of programs; empty if nothing is."""
    for field, names in (("allow", guard.allow), ("deny", guard.deny)):
        for name in names:
            if cause := programs.wrong_name(name):
                return f"{name!r} in {field}: {cause}"
    if both := sorted({*guard.allow} & {*guard.deny}):
        return f"{both[0]!r} is in both allow and deny"
    return ""


def _text(path: Path) -> str:
    """The file's text, read without waiting: a FIFO or a device is refused."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Usage("read", path, "it is not a regular file", "name a regular file")
        data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise Usage("read", path, f"it is larger than {_MOST} bytes", "name a TOML file")
    text = data.decode()
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > _WIDEST:
            cause = f"line {number} is longer than {_WIDEST} characters"
            raise Usage("read", path, cause, "correct it")
    return text
