"""Where things are on this node: cgroup v2, bpffs, the network namespaces. No BPF here."""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from underpass import abi
from underpass.errors import KernelError, UnderpassError, Unsupported, Usage

BPFFS = Path("/sys/fs/bpf")
FLOOR = (6, 1)
"""The oldest kernel that the tests run on; docs/KERNELS.md says what older ones lack."""
CLONE_NEWNET = 0x40000000
_CLONE_NEWCGROUP = 0x02000000
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
_BPF_MAGIC = 0xCAFE4A11
_CGROUP2_MAGIC = 0x63677270

#: Enters network namespaces, and contains the two before it.
ENTERS = "CAP_SYS_ADMIN"
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39, ENTERS: 21}
_CONTAINED = {"CAP_PERFMON", "CAP_BPF"}

Result = TypeVar("Result")


class _Statfs(ctypes.Structure):
    _fields_ = [("type", ctypes.c_long), ("rest", ctypes.c_long * 30)]


def filesystem_magic(path: Path) -> int:
    """``f_type`` of the file system that holds ``path``, 0 if it does not exist."""
    data = _Statfs()
    libc = ctypes.CDLL(None, use_errno=True)
    return data.type if libc.statfs(os.fsencode(path), ctypes.byref(data)) == 0 else 0


def _proc_lines(name: str) -> list[str]:
    """Lines of ``/proc/self/NAME``.

    Raises:
        UnderpassError: it cannot be read, as where ``/proc`` is not mounted.
    """
    path = Path("/proc/self", name)
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        cause = error.strerror or str(error)
        raise UnderpassError("read", path, cause, "mount proc at /proc") from None


def _mounts() -> list[list[str]]:
    """Lines of ``/proc/self/mountinfo``, split; the optional fields are dropped."""
    lines = []
    for line in _proc_lines("mountinfo"):
        left, _, right = line.partition(" - ")
        lines.append(left.split()[:6] + right.split())
    return lines


def missing_capabilities() -> list[str]:
    """Names of the needed capabilities that this process does not have."""
    for line in _proc_lines("status"):
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            missing = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
            whole = ENTERS not in missing
            return [name for name in missing if not (whole and name in _CONTAINED)]
    return list(CAPABILITIES)


def kernel_version() -> tuple[int, ...]:
    """The running kernel's, as ``(6, 1)``."""
    parts = platform.release().split("-")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


def check_kernel() -> str:
    """The kernel's release, if it is not too old.

    Raises:
        Unsupported: it is.
    """
    release = platform.release()
    if kernel_version() < FLOOR:
        floor = ".".join(map(str, FLOOR))
        cause = f"it is {release}, underpass needs {floor}"
        raise Unsupported("use", "this kernel", cause, f"boot Linux {floor} or newer")
    return release


def check_node() -> None:
    """Is the kernel new enough, are the capabilities and its type information there?

    Raises:
        UnderpassError: a capability is missing.
        Unsupported: the kernel is too old or has no BTF.
    """
    check_kernel()
    missing = missing_capabilities()
    if missing:
        raise UnderpassError("load", "programs", f"missing {', '.join(missing)}", "run as root")
    if not os.access("/sys/kernel/btf/vmlinux", os.R_OK):
        raise Unsupported(
            "read",
            "/sys/kernel/btf/vmlinux",
            "the kernel has no type information",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF",
        )


def join_host_cgroups() -> None:
    """See cgroups as the node does, where this is a container that sees the node's processes.

    From a cgroup namespace of its own it could start no process outside of it (``nsdelegate``), and
    would read other paths than the node. Counts for the calling thread and those that it makes
    from now on. Where that is not allowed nothing changes.
    """
    # kthreadd, which always lives in the node's own; in a node that is a container itself, its init
    path = f"/proc/{2 if _inode('/proc/self/ns/pid') == _FIRST_PID_NAMESPACE else 1}/ns/cgroup"
    if _inode(path) in (0, _inode("/proc/self/ns/cgroup")):
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWCGROUP)
    finally:
        os.close(fd)


def find_cgroup2() -> Path:
    """Mount point of the cgroup v2 hierarchy (also where v1 is mounted beside it).

    Raises:
        Unsupported: there is none.
    """
    for fields in _mounts():
        if fields[6] == "cgroup2" and fields[3] == "/":
            return Path(fields[4])
    for fields in _mounts():
        if fields[6] == "cgroup2":
            return Path(fields[4])
    raise Unsupported(
        "find", "cgroup v2", "no cgroup2 file system is mounted", "boot with cgroup v2 or mount it"
    )


def check_cgroup(path: Path) -> Path:
    """``path``, resolved, if it is a directory of cgroup v2.

    Raises:
        Usage: it is not.
    """
    hint = f"name a directory below {find_cgroup2()}"
    if not path.is_dir():
        raise Usage("use cgroup", path, "there is no such directory", hint)
    if filesystem_magic(path) != _CGROUP2_MAGIC:
        raise Usage("use cgroup", path, "it is not in the cgroup v2 hierarchy", hint)
    longest = abi.About.cgroup.size - 1
    if len(os.fsencode(path.resolve())) > longest:
        raise Usage("use cgroup", path, f"its path is longer than {longest} bytes", hint)
    return path.resolve()


def cgroup_id_and_level(path: Path) -> tuple[int, int]:
    """The kernel's id of a cgroup and its depth below the root; (0, 0) for the root.

    The id is the inode number of its directory (``cgroup_id``, kernfs).
    """
    relative = path.resolve().relative_to(find_cgroup2())
    return (path.stat().st_ino, len(relative.parts)) if relative.parts else (0, 0)


def check_bpffs(pins: Path) -> None:
    """Does ``pins`` lie in a bpffs?

    Raises:
        Usage: it does not.
    """
    if filesystem_magic(pins.parent) != _BPF_MAGIC:
        raise Usage("pin in", pins, "its parent is not in a bpffs", f"use a path below {BPFFS}")


def ensure_bpffs(pins: Path) -> None:
    """Make sure that ``pins`` will lie in a bpffs; mounts one at ``/sys/fs/bpf`` if missing.

    Raises:
        Usage: ``pins`` lies elsewhere.
        KernelError: the mount fails.
    """
    if filesystem_magic(pins.parent) == _BPF_MAGIC:
        return
    if pins.parent != BPFFS:
        check_bpffs(pins)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", 0, b"mode=0700") != 0:
        raise KernelError("mount bpffs at", BPFFS, ctypes.get_errno(), "run as root")


@dataclass(frozen=True)
class NetNamespace:
    """A network namespace: its inode, a path that opens it, and its name if it has one."""

    inode: int
    path: str
    name: str | None

    @property
    def label(self) -> str:
        """The name, or ``net:[inode]`` as ``/proc`` shows it."""
        return self.name or label(self.inode)


def label(inode: int) -> str:
    """How a namespace without a name is written."""
    return f"net:[{inode}]"


def net_namespaces() -> list[NetNamespace]:
    """Every network namespace of the node that a process lives in or a mount keeps.

    The caller's own comes first and is named ``host`` if it is that of process 1.
    """
    found: dict[int, NetNamespace] = {}
    for fields in _mounts():
        if fields[6] == "nsfs" and fields[3].startswith("net:["):
            inode = int(fields[3][5:-1])
            found.setdefault(inode, NetNamespace(inode, fields[4], Path(fields[4]).name))
    own = _inode("/proc/self/ns/net")
    if own == _inode("/proc/1/ns/net"):
        found[own] = NetNamespace(own, "/proc/self/ns/net", "host")
    for path in glob.iglob("/proc/[0-9]*/task/[0-9]*/ns/net"):  # noqa: PTH207 - that one raises if a process ends
        inode = _inode(path)
        if inode and inode not in found:
            found[inode] = NetNamespace(inode, path, None)
    return sorted(found.values(), key=lambda ns: ns.inode != own)


def _inode(path: str) -> int:
    try:
        return Path(path).stat().st_ino
    except OSError:
        return 0  # the process has gone


def in_namespace(namespace: NetNamespace, action: Callable[[], Result]) -> Result | None:
    """Run ``action`` inside ``namespace``, in a thread of its own (``setns`` is per thread).

    Returns:
        What ``action`` returned, or None if the namespace has gone meanwhile.

    Raises:
        UnderpassError: a thread cannot be had.
        Exception: whatever ``action`` raised.
    """
    outcome: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fd = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if os.fstat(fd).st_ino != namespace.inode:
                return
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(fd, CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise KernelError("enter namespace", namespace.label, code, "run as root")
            outcome.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)
        finally:
            os.close(fd)

    thread = threading.Thread(target=run)
    try:
        thread.start()
    except RuntimeError:
        cause, step = "there is no room for a thread", "raise the limits of memory and tasks"
        raise UnderpassError("enter namespace", namespace.label, cause, step) from None
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0] if outcome else None
