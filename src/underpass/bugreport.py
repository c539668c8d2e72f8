"""What `underpass bugreport` packs: facts about underpass and this node, no payload, no secrets.

A part that cannot be had says why, and the others go on.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import platform
import re
import stat
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from underpass import __version__, abi, calibration, config, dataplane, features, kept, libbpf
from underpass.errors import UnderpassError, Usage
from underpass.generation import Dataplane
from underpass.model import Socket, plain

#: Where the systemd unit and the image have their configuration.
_CONFIGS = (Path("/etc/underpass/underpass.toml"), Path("/etc/underpass/config.toml"))
_SYSCTLS = (
    *("kernel/bpf_stats_enabled", "kernel/unprivileged_bpf_disabled", "kernel/kptr_restrict"),
    *("net/core/bpf_jit_enable", "net/ipv4/tcp_mem", "net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"),
)
_MOST_ROWS = 5000
_MOST_LOG = 1 << 20
#: A word that announces a secret; `pw` only by itself, or `_pw`.
_KEY = (
    r"(?:pass|pwd|(?<![a-z0-9])pw(?![a-z])|secret|token|api[-_]?key|authorization|credential"
    r"|private[-_]?key)[\w-]{0,40}"
)
#: Such a word and what it announces: in quotes (a log may escape them) or brackets up to their end,
#: else up to a blank, a quote or a comma.
_SECRET = re.compile(
    rf"(?i)({_KEY}\\*[\"']?\s*[=:]\s*)(?:"
    r"(?P<open>\")(?:[^\"\\\n]|\\.)+\"|(?P<quote>'|\\+[\"'])(?:(?!(?P=quote)).)+(?P=quote)"
    r"|\[[^\]]*\]|\{[^}]*\}|(?:(?:bearer|basic)\s+)?\\*[\"']?[^\s\"',;\\]+)"
)
#: The same as a line of YAML, where blanks belong to it.
_LINE = re.compile(rf"(?im)^([ \t]*(?:-[ \t]+)?[\w-]*?{_KEY}:[ \t]+)(?![\"'\[{{|>&*#])\S.*$")
#: A private key; what is cut off at the end, or (as of a log's tail) at the beginning, is one, too.
_PEM = re.compile(r"(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY.*?(?:-----END [A-Z0-9 ]*-----|\Z)")
_PEM_END = re.compile(
    r"(?s)\A(?:(?!-----BEGIN ).){0,16384}?-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_IN_URL = re.compile(r"(://[^\s/:@]+:)[^\s/@]+@")


@dataclass(frozen=True)
class Sources:
    """Where it is looked.

    Attributes:
        pins: the generation.
        config: configuration file; none there is fine.
        logs: a file of log lines, if one was given.
    """

    pins: Path
    config: Path
    logs: Path | None = None


def reduced(text: str) -> str:
    """``text`` with what looks like a secret left out. Pure."""
    for each in (_PEM_END, _PEM):
        text = each.sub("[left out]", text)
    text = _LINE.sub(r"\1[left out]", text)
    text = _SECRET.sub(_left_out, text)
    return _IN_URL.sub(r"\1[left out]@", _BEARER.sub(r"\1 [left out]", text))


def _left_out(found: re.Match[str]) -> str:
    """The word, and what is said instead; in quotes where there were some: JSON stays JSON."""
    quote = found["open"] or found["quote"] or ""
    return f"{found[1]}{quote}[left out]{quote}"


def check(to: Path) -> None:
    """That it can be written, or written over: a device, a pipe or a link is not ours to replace.

    Raises:
        Usage: it cannot.
    """
    step = "name another file with --output"
    if not to.name:
        raise Usage("write", repr(str(to)), "it is no name of a file", step)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(to.lstat().st_mode):
            raise Usage("write", to, "it is not a regular file", step)


def collect(sources: Sources, status: Callable[[], Mapping[str, Any]]) -> dict[str, str]:
    """Every part by the name of its file."""
    pins = sources.pins
    asked: dict[str, Callable[[], Any]] = {
        "versions.json": _versions,
        "doctor.json": lambda: [plain(check) for check in features.checks(pins)],
        "status.json": lambda: plain(status()),
        "connections.json": lambda: _of_planes(pins, _connections),
        "reasons.json": lambda: _of_planes(pins, _reasons),
        "guard.json": lambda: _of_planes(pins, _guard),
        "generations.json": lambda: _of_planes(pins, _generations),
        "config.json": lambda: _config(sources.config),
        "policy.json": lambda: plain(kept.read_policy(pins)),
        "pods.json": lambda: _pods(pins),
        "calibration.json": lambda: msgspec.to_builtins(calibration.read()),
        "node.json": _node,
        "metrics.txt": lambda: _metrics(sources.config),
    }
    if logs := sources.logs:
        asked["logs.txt"] = lambda: _tail(logs)
    return {name: reduced(_told(part)) for name, part in asked.items()}


def usual_config() -> Path:
    """The configuration of whom nothing else is said of."""
    return next((place for place in _CONFIGS if place.exists()), _CONFIGS[0])


def packed(parts: Mapping[str, str]) -> bytes:
    """The parts as one archive (tar.gz)."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, text in parts.items():
            data = text.encode(errors="backslashreplace")
            member = tarfile.TarInfo(f"underpass-bugreport/{name}")
            member.size, member.mtime, member.mode = len(data), int(time.time()), 0o600
            archive.addfile(member, io.BytesIO(data))
    return whole.getvalue()


def write(to: Path, parts: Mapping[str, str]) -> None:
    """Pack them: readable by their owner alone, whole or not at all.

    Raises:
        Usage: as for :func:`check`.
        OSError: it cannot be written.
    """
    fresh = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(packed(parts))
        check(to)
        fresh.replace(to)
    finally:
        fresh.unlink(missing_ok=True)


def _told(part: Callable[[], Any]) -> str:
    try:
        found = part()
    except (UnderpassError, OSError, ValueError, http.client.HTTPException) as error:
        return f"cannot be had: {error}\n"
    return found if isinstance(found, str) else json.dumps(found, indent=1, default=str) + "\n"


def _versions() -> dict[str, Any]:
    return {
        "underpass": __version__,
        "abi": abi.ABI,
        "python": sys.version,
        "libbpf": libbpf.version(),
        "kernel": [platform.release(), platform.version(), platform.machine()],
        "system": _os_release(),
    }


def _os_release() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _of_planes(pins: Path, ask: Callable[[list[Dataplane]], Any]) -> Any:
    with dataplane.opened(pins) as planes:
        return ask(planes)


def _connections(planes: list[Dataplane]) -> Any:
    return [plain(pair) for plane in planes for pair in plane.pairs()][:_MOST_ROWS]


def _reasons(planes: list[Dataplane]) -> Any:
    """Why sockets are where they are: how many for each reason, and the sockets themselves."""
    sockets = planes[0].sockets()
    inside = [socket for socket in sockets if not socket.listening]
    return {
        "sockets": Counter(s.reason.word for s in inside),
        "meanings": {s.reason.word: s.reason.meaning for s in inside},
        "listeners": Counter("armed" if s.armed else "not armed" for s in sockets if s.listening),
        "list": [_socket(socket) for socket in sockets[:_MOST_ROWS]],
    }


def _socket(socket: Socket) -> dict[str, Any]:
    return {
        "local": str(socket.endpoint),
        "netns": socket.endpoint.netns,
        "remote": f"{socket.remote_address} {socket.remote_port}",
        "reason": socket.reason.word,
        **{n: getattr(socket, n) for n in ("listening", "in_map", "covered", "armed", "role")},
        "program": f"{socket.program:016x}",
    }


def _guard(planes: list[Dataplane]) -> Any:
    """What the guard knows; command lines may hold anything and stay here."""
    kept = [plain(program) for program in planes[0].programs()[:_MOST_ROWS]]
    return [{k: v for k, v in program.items() if k != "command"} for program in kept]


def _generations(planes: list[Dataplane]) -> Any:
    return [
        {
            "pins": str(plane.pins),
            "number": plane.number,
            "version": plane.version,
            "state": plane.state,
            "attached": plane.attached,
            "settings": plain(plane.settings),
            "handoffs": plane.leftovers(),
            "programs": {
                name: {
                    "id": libbpf.program_id(plane.fd(name)),
                    "run_ns_and_count": libbpf.program_runs(plane.fd(name)),
                }
                for name in plane.loaded
            },
        }
        for plane in planes
    ]


def _config(path: Path) -> Any:
    """What it sets, not the file: its comments may hold anything."""
    if not path.exists():
        return f"there is no {path}\n"
    settings, agent = config.read_all(path)
    policy, pods = config.read_policy(path)
    found = {"settings": settings, "policy": policy}
    return plain(found) | msgspec.to_builtins({"agent": agent, "pods": pods})


def _pods(pins: Path) -> Any:
    """The pods as an agent knows them; their labels and annotations may hold anything."""
    seen = kept.read_pods(pins, fresh=False)
    if not seen:
        return "no agent keeps them\n"
    rows = [{"pod": str(pod), "netns": pod.netns} for pod in seen.pods[:_MOST_ROWS]]
    return {"fresh": seen.fresh, "told": seen.told, "pods": rows}


def _node() -> dict[str, Any]:
    sysctls = {}
    for name in _SYSCTLS:
        try:
            sysctls[name] = Path("/proc/sys", name).read_text().strip()
        except OSError as error:
            sysctls[name] = str(error.strerror)
    kinds = (" - bpf ", " - cgroup2 ", " - nsfs ")
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return {
        "sysctls": sysctls,
        "mounts": [line for line in mounts if any(kind in line for kind in kinds)][:_MOST_ROWS],
        "processors": os.cpu_count(),
        "pages": os.sysconf("SC_PHYS_PAGES"),
        "uptime": Path("/proc/uptime").read_text().split()[0],
    }


def _metrics(path: Path) -> str:
    """The agent's, if one listens where the configuration says."""
    options = config.read_all(path)[1] if path.exists() else config.Agent()
    host, _, port = options.listen.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]") or "127.0.0.1", int(port), timeout=5)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read(_MOST_LOG).decode(errors="replace")
    finally:
        connection.close()
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if re.match(r"(# \w+ )?underpass_", line))


def _tail(path: Path) -> str:
    """The end of a file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MOST_LOG))
        return file.read(_MOST_LOG).decode(errors="replace")
