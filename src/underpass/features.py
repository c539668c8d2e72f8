"""What this node and kernel can do: grouped checks, each by trying it for real."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from underpass import calibration, dataplane, generation, libbpf, namespaces, selftest
from underpass.errors import UnderpassError, Unsupported
from underpass.model import Small

#: Of what may be many, so many are named.
_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """One line of `doctor`.

    Attributes:
        group: heading it stands under.
        name: what was checked.
        status: ``ok``, ``warning`` (underpass works, something differs) or ``failed``.
        detail: what was found.
        next_step: what to do about it, empty if nothing.
        kernel: True if a failure means that this kernel cannot run underpass.
    """

    group: str
    name: str
    status: str
    detail: str = ""
    next_step: str = ""
    kernel: bool = False


def checks(pins: Path) -> Iterator[Check]:
    """Run every check, in order; stops before those that cannot work without the earlier ones."""
    node = list(_node(pins))
    yield from node
    # Programs load without it; what namespaces are entered for does not work.
    lacking = f"missing {namespaces.ENTERS}"
    if any(check.status == "failed" and check.detail != lacking for check in node):
        return
    programs = list(_programs())
    yield from programs
    yield from neighbours(pins, namespaces.find_cgroup2())
    yield _calibrated()
    if any(check.status == "failed" for check in programs):
        return
    yield from _behaviours()


def _calibrated() -> Check:
    """Which streams of small messages go by TCP, and how that is known."""
    found = calibration.read()
    bounds = found.bounds if found else Small()
    roads = ", ".join(
        f"{road.replace('_', ' ')} {size} B" for road, size in bounds._asdict().items()
    )
    if not found:
        step = "run `underpass calibrate` while the node is quiet"
        return Check("node", "small streams", "ok", f"built-in bounds: {roads}; {step}")
    day = time.strftime("%Y-%m-%d", time.localtime(found.measured_at))
    return Check("node", "small streams", "ok", f"measured on {day}: {roads}")


def exit_code(found: list[Check]) -> int:
    """0 if nothing failed, 4 if the kernel is the cause, else 1."""
    failed = [check for check in found if check.status == "failed"]
    if any(check.kernel for check in failed):
        return Unsupported.exit_code
    return UnderpassError.exit_code if failed else 0


def _node(pins: Path) -> Iterator[Check]:
    yield _tried("node", "kernel", namespaces.check_kernel)
    btf = Path("/sys/kernel/btf/vmlinux")
    yield (
        Check("node", "type information (BTF)", "ok", str(btf))
        if os.access(btf, os.R_OK)
        else Check(
            "node",
            "type information (BTF)",
            "failed",
            f"{btf} is missing",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF",
            True,
        )
    )
    missing = namespaces.missing_capabilities()
    yield (
        Check("node", "capabilities", "failed", f"missing {', '.join(missing)}", "run as root")
        if missing
        else Check("node", "capabilities", "ok", ", ".join(namespaces.CAPABILITIES))
    )
    yield _tried("node", "cgroup v2", lambda: str(namespaces.find_cgroup2()))
    if missing in ([], [namespaces.ENTERS]):
        yield _tried("node", "bpffs", lambda: _bpffs(pins))
    yield _tried("node", "libbpf", lambda: f"libbpf.so.1, {libbpf.version()}")


def _bpffs(pins: Path) -> str:
    namespaces.ensure_bpffs(pins)
    return str(pins.parent)


def _tried(group: str, name: str, action: Callable[[], str]) -> Check:
    try:
        return Check(group, name, "ok", action())
    except UnderpassError as error:
        kernel = isinstance(error, Unsupported)
        return Check(group, name, "failed", error.cause, error.next_step, kernel)


def _programs() -> Iterator[Check]:
    """Load each program by itself: the only probe that counts."""
    for name in generation.PROGRAMS:
        try:
            here = dataplane.try_load(name)
        except UnderpassError as error:
            step = "use a newer kernel; send us this line"
            yield Check("programs", name, "failed", error.cause, step, True)
        else:
            detail = "loads" if here else "not needed: this kernel has no io_uring"
            yield Check("programs", name, "ok", detail)


def neighbours(pins: Path, root: Path) -> Iterator[Check]:
    """Who else steers sockets: sock_ops programs on a cgroup or below it that are not ours."""
    own = dataplane.own_programs(pins)
    others = [
        f"{libbpf.program_label(number)} on {cgroup}"
        for cgroup, number in _attached_below(root)
        if number not in own
    ]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        detail = ", ".join(others[:_SHOWN]) + more
        step = "sockets that it holds in a sockmap stay on TCP (socket-busy)"
        yield Check("neighbours", "other sock_ops programs", "warning", detail, step)
    else:
        yield Check("neighbours", "other sock_ops programs", "ok", f"none below {root}")


def _attached_below(root: Path) -> Iterator[tuple[Path, int]]:
    """The sock_ops programs attached to any cgroup, by where and id."""
    for directory, _, _ in os.walk(root):
        with contextlib.suppress(OSError, UnderpassError):  # it has gone meanwhile
            yield from ((Path(directory), number) for number in dataplane.attached(Path(directory)))


def _behaviours() -> Iterator[Check]:
    try:
        outcomes = selftest.run()
    except UnderpassError as error:
        yield Check("self-test", "test bed", "failed", str(error), error.next_step)
        return
    for outcome in outcomes:
        if outcome.ok:
            yield Check("self-test", outcome.name, "ok", outcome.detail)
        elif outcome.vital:
            step = "do not use underpass on this kernel; send us this line"
            yield Check("self-test", outcome.name, "failed", outcome.detail, step, True)
        else:
            yield Check("self-test", outcome.name, "warning", outcome.detail, outcome.consequence)
