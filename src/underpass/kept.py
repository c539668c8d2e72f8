"""What the agent and `policy apply` keep in /run for other commands: the pods, and the policy.

Small files of root's own, written by rename: a reader sees an old one or a new one, whole.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from underpass.errors import UnderpassError
from underpass.pod import Pod
from underpass.policy import Policy

DIRECTORY = Path("/run/underpass")
#: Seconds between two writings of the pods, and after which nobody writes them any more.
HEARTBEAT, FRESH = 10.0, 35.0
_MOST = 32 << 20
_Kept = TypeVar("_Kept")


@dataclass(frozen=True)
class Pods:
    """The pods as an agent knows them.

    Attributes:
        written: seconds since boot.
        pid: of the agent.
        told: somebody tells of pods here; else there are none to be waited for.
        cgroups: path -> id, of cgroups that are no pod's.
        pods: the pods.
        trouble: who does not tell of any yet, and why; empty if nothing is wrong.
    """

    written: float
    pid: int = 0
    told: bool = True
    cgroups: dict[str, int] = field(default_factory=dict)
    pods: tuple[Pod, ...] = ()
    trouble: str = ""

    @property
    def fresh(self) -> bool:
        """Its writer is still at work."""
        return 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - self.written < FRESH


@dataclass(frozen=True)
class InForce:
    """The policy that was put in force last.

    Attributes:
        policy: its rules.
        source: the file that it was read from; empty: the built-in one.
    """

    policy: Policy
    source: str = ""


def now() -> float:
    """For :attr:`Pods.written`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _path(pins: Path, kind: str) -> Path:
    own = "" if pins == Path("/sys/fs/bpf/underpass") else f"-{pins.name}"
    return DIRECTORY / f"{kind}{own}.json"


def write_pods(pins: Path, pods: Pods) -> None:
    """Keep the pods for the commands that act on ``pins``.

    Raises:
        UnderpassError: they cannot be written.
    """
    _write(_path(pins, "pods"), msgspec.json.encode(pods))


def read_pods(pins: Path, *, fresh: bool = True) -> Pods | None:
    """The pods that an agent keeps for ``pins``; None if there is none at work.

    Args:
        pins: the generation.
        fresh: what an agent left that has ended does not count.
    """
    found = _read(_path(pins, "pods"), Pods)
    return found if found and (found.fresh or not fresh) else None


def write_policy(pins: Path, policy: InForce | None) -> None:
    """Keep what has just been put in force; None: nothing is.

    Raises:
        UnderpassError: it cannot be written.
    """
    path = _path(pins, "policy")
    if policy is not None:
        _write(path, msgspec.json.encode(policy))
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def read_policy(pins: Path) -> InForce | None:
    """What was put in force last, if anything is known of it."""
    return _read(_path(pins, "policy"), InForce)


def remove(pins: Path) -> None:
    """Keep nothing for ``pins`` any more: they are gone."""
    for kind in ("pods", "policy"):
        with contextlib.suppress(OSError):
            _path(pins, kind).unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            Path(name).rename(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        step = f"let {path.parent} be writable"
        raise UnderpassError("write", path, error.strerror or str(error), step) from None


def _read(path: Path, kind: type[_Kept]) -> _Kept | None:
    """What is kept; None if there is nothing, or not ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid())
        if not ours or status.st_size > _MOST:
            return None
        with contextlib.suppress(OSError, ValueError):
            return msgspec.json.decode(file.read(_MOST), type=kind)
    return None
