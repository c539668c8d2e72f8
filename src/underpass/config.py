"""The configuration file (TOML): sizes of a generation, what the agent does, pods, the policy.

Unknown or wrong fields are refused, with line and field.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from underpass import policy_config, positions, programs
from underpass.errors import Usage
from underpass.model import Settings
from underpass.policy import Policy
from underpass.policy_config import PolicyTable, Wrong

_MIB = 1 << 20
#: Where a file is named: standard input.
STDIN = Path("-")
_MOST = 64 << 10  # bytes that are read: what never ends, or nearly, is no configuration
#: How msgspec says where; a field that is unknown is not in its path.
_AT = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_CHOICE = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)
_SERVER = re.compile(r"https://(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+)):([0-9]{1,5})/?")
_SHORTEST_REPROOF = 0.1  # seconds
_WIDEST = 1000  # characters of a line: tomllib's memory grows with the square of a dotted key


class _Guard(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    observe: Annotated[float, Meta(ge=0.1, le=86400)] = Settings.observe_seconds
    admit_unknown: bool = Settings.admit_unknown
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


_Seconds = Annotated[float, Meta(ge=0.1, le=86400)]
_Seconds0 = Annotated[float, Meta(ge=0, le=86400)]


class Agent(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What `underpass agent` does beside: the table ``[agent]``. Times are seconds.

    Attributes:
        listen: where it serves metrics and health: HOST:PORT, :PORT for every address; empty: not.
        cgroup: subtree to attach to; empty: the root; ``kubepods``: that of Kubernetes' pods.
        check: between two looks at the generation.
        scan: between two looks for network namespaces that no mount tells of; 0 = never.
        adopt: between two passes of adoption; 0 = none.
        names: between two looks at pods and policy.
        calibrate: measure at the first start, if nothing is kept.
        drain: how long `--down-on-exit` waits for readers.
    """

    listen: str = "127.0.0.1:9464"
    cgroup: str = ""
    check: _Seconds = 5.0
    scan: _Seconds0 = 60.0
    adopt: _Seconds0 = 60.0
    names: _Seconds = 1.0
    calibrate: bool = True
    drain: _Seconds0 = 20.0


class Pods(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Who tells of the node's pods: the table ``[pods]``. An empty word: is not asked.

    Attributes:
        apiserver: ``auto`` (by the service account of the pod that this is in) or https://HOST:PORT.
        token: file of the token, if the server is named.
        authority: file of the certificates that a named server is checked against.
        node: name of this node; ``auto``: NODE_NAME of the environment, else the host's name.
        cri: the runtime's socket; ``auto``: the first of the usual ones that is there.
    """

    apiserver: str = "auto"
    token: str = ""
    authority: str = ""
    node: str = "auto"
    cri: str = "auto"


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    capacity: Annotated[int, Meta(ge=1, le=1_000_000)] = Settings.capacity
    budget_bytes: Annotated[int, Meta(ge=64 << 10, le=16 * _MIB)] = Settings.budget_bytes
    budget_messages: Annotated[int, Meta(ge=16, le=16384)] = Settings.budget_messages
    node_budget_bytes: Annotated[int, Meta(ge=0, le=1 << 40)] = Settings.node_budget_bytes
    reproof: Annotated[float, Meta(ge=0, le=86400)] = Settings.reproof_seconds
    guard: _Guard = _Guard()
    agent: Agent = Agent()
    pods: Pods = Pods()
    policy: PolicyTable = PolicyTable()


def read(path: Path | None) -> Settings:
    """Settings from ``path``; the defaults without one.

    Raises:
        Usage: the file cannot be read, is no TOML, or has a field that is unknown or out of range.
    """
    return read_all(path)[0]


def read_all(path: Path | None) -> tuple[Settings, Agent]:
    """Settings from ``path``, and what the agent does beside; the defaults without one.

    Raises:
        Usage: as for :func:`read`.
    """
    if path is None:
        return Settings(), Agent()
    fields, _ = _fields(path)
    settings = Settings(
        capacity=fields.capacity,
        budget_bytes=fields.budget_bytes,
        budget_messages=fields.budget_messages,
        node_budget_bytes=fields.node_budget_bytes,
        reproof_seconds=fields.reproof,
        observe_seconds=fields.guard.observe,
        admit_unknown=fields.guard.admit_unknown,
        allow=fields.guard.allow,
        deny=fields.guard.deny,
    )
    return settings, fields.agent


def read_policy(path: Path | None) -> tuple[Policy, Pods]:
    """The policy that ``path`` describes and who tells of the pods; the defaults without one.

    Raises:
        Usage: as for :func:`read`.
    """
    if path is None:
        return Policy(), Pods()
    fields, found = _fields(path)
    return found, fields.pods


def _fields(path: Path) -> tuple[_File, Policy]:
    """What the file says, and the policy in it."""
    text = ""
    try:
        text = _text(path)
        fields = msgspec.convert(tomllib.loads(text), _File)
    except OSError as error:
        raise Usage("read", path, error.strerror or str(error), "name a readable file") from None
    except msgspec.ValidationError as error:
        raise _wrong(path, text, _placed(str(error))) from None
    except RecursionError:
        raise Usage("read", path, "it is nested too deeply", "correct it") from None
    except ValueError as error:  # of TOML, of UTF-8, of a number of thousands of digits
        raise Usage("read", path, f"it is not TOML: {error}", "correct it") from None
    try:
        found = policy_config.policy_of(fields.policy)
        for wrong in (
            _wrong_name(fields.guard),
            _wrong_reproof(fields.reproof),
            _wrong_pods(fields.pods),
            _wrong_listen(fields.agent.listen),
        ):
            if wrong:
                raise wrong
    except Wrong as wrong:
        raise _wrong(path, text, wrong) from None
    return fields, found


def _placed(message: str) -> Wrong:
    """What msgspec says, with its place as keys and indices."""
    found = _AT.fullmatch(message)
    cause, at = (found[1], positions.parse(found[2] or "")) if found else (message, ())
    if unknown := _UNKNOWN.fullmatch(cause):
        return Wrong((*at, unknown[1]), "there is no such field")
    if (choice := _CHOICE.fullmatch(cause)) and at and at[-1] in policy_config.CHOICES:
        words = ", ".join(policy_config.CHOICES[str(at[-1])])
        return Wrong(at, f"'{choice[1]}' is none of {words}")
    return Wrong(at, cause)


def _wrong(path: Path, text: str, wrong: Wrong) -> Usage:
    number = positions.line(text, wrong.path)
    where = f"line {number}: " if number else ""
    field = f"{positions.words(wrong.path)}: " if wrong.path else ""
    step = "correct it; `underpass up --help` and `underpass policy --help` name the fields"
    return Usage("use", path, f"{where}{field}{wrong.cause}", step)


def _wrong_name(guard: _Guard) -> Wrong | None:
    """What is wrong with the names of programs, if anything is."""
    for field, names in (("allow", guard.allow), ("deny", guard.deny)):
        for place, name in enumerate(names):
            if cause := programs.wrong_name(name):
                return Wrong(("guard", field, place), f"{name!r}: {cause}")
    if both := sorted({*guard.allow} & {*guard.deny}):
        return Wrong(("guard",), f"{both[0]!r} is in both allow and deny")
    return None


def _wrong_reproof(seconds: float) -> Wrong | None:
    if 0 < seconds < _SHORTEST_REPROOF:
        cause = f"below {_SHORTEST_REPROOF} s it would cost much; write 0 (never) or more"
        return Wrong(("reproof",), cause)
    return None


def _wrong_pods(pods: Pods) -> Wrong | None:
    if pods.apiserver not in ("", "auto") and not _SERVER.fullmatch(pods.apiserver):
        cause = f'{pods.apiserver!r}: write "auto", "" or "https://HOST:PORT"'
        return Wrong(("pods", "apiserver"), cause)
    if pods.apiserver.startswith("https") and not pods.authority:
        return Wrong(("pods", "apiserver"), "it needs `authority`, the file that it is checked by")
    return None


def _wrong_listen(listen: str) -> Wrong | None:
    if listen and parse_listen(listen) is None:
        return Wrong(("agent", "listen"), f"{listen!r} is no HOST:PORT (as 127.0.0.1:9464)")
    return None


def parse_listen(listen: str) -> tuple[str, int] | None:
    """Host and port of ``127.0.0.1:9464``, ``[::1]:9464`` or ``:9464`` (every address).

    None: it is none of these.
    """
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isdecimal() or int(port) > 65535 or (":" in host and not bracketed):
        return None
    return host.strip("[]"), int(port)


def server_of(pods: Pods) -> tuple[str, int] | None:
    """Host and port of the API server that is named; None if none is."""
    found = _SERVER.fullmatch(pods.apiserver)
    return (found[1] or found[2], int(found[3])) if found else None


def _text(path: Path) -> str:
    """Its text, or standard input's; read without waiting: a FIFO or a device is refused."""
    if path == STDIN:
        data = sys.stdin.buffer.read(_MOST + 1)
    else:
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
