"""The configuration file (TOML): sizes of a generation. Unknown or wrong fields are refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from underpass.errors import Usage
from underpass.model import Settings

_MIB = 1 << 20
_Name = Annotated[str, Meta(min_length=1, max_length=31, pattern=r"^[^/\s]+$")]


class _Guard(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    observe: Annotated[float, Meta(ge=0.1, le=86400)] = Settings.observe_seconds
    admit_unknown: bool = Settings.admit_unknown
    allow: tuple[_Name, ...] = ()
    deny: tuple[_Name, ...] = ()


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
        fields = msgspec.convert(tomllib.loads(path.read_text()), _File)
    except OSError as error:
        raise Usage("read", path, error.strerror or str(error), "name a readable file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Usage("read", path, f"it is not TOML: {error}", "correct it") from None
    except msgspec.ValidationError as error:
        raise Usage("use", path, str(error), "see `underpass up --help` for the fields") from None
    sizes = msgspec.structs.asdict(fields)
    guard = sizes.pop("guard")
    return Settings(
        **sizes,
        observe_seconds=guard.observe,
        admit_unknown=guard.admit_unknown,
        allow=guard.allow,
        deny=guard.deny,
    )
