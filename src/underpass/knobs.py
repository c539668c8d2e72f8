"""What a generation is loaded with: sizes from the settings, facts from the running kernel."""

from __future__ import annotations

import functools
import os
import platform
import sys
from bisect import bisect
from pathlib import Path

from underpass import __version__, abi, namespaces
from underpass.errors import Unsupported
from underpass.model import Fault, Settings, Sign, Small

#: Numbers of the system calls that tell of a program, by machine: the fields of `abi.Calls`.
_CALLS = {
    "x86_64": (275, 45, 47, 299, 44, 46, 307, 55, 43, 288, 16, 54, 7, 271, 233, 40),
    "aarch64": (76, 207, 212, 243, 206, 211, 269, 209, 202, 242, 29, 208, 0xFFFFFFFF, 73, 21, 71),
}

#: How the names of programs begin that ask FIONREAD only when a read has filled their buffer, and
#: then wait for an event if it counts nothing more.
_ASK_LATE = (b"nginx", b"angie", b"openrest", b"stunnel")

#: The same of programs that hand a socket to the kernel: of iSCSI, NBD, USB/IP, OpenVPN.
_HAND_TO_KERNEL = (
    *(b"iscsid\0", b"iscsista", b"iscsi-sc", b"nbd-clie"),
    *(b"usbip\0", b"usbipd\0", b"openvpn\0"),
)


def about(
    cgroup: Path,
    settings: Settings,
    faults: Fault,
    fionread_broken: bool,
    generation: int = 1,
) -> abi.About:
    """What the generation for ``cgroup`` is described as and loaded with.

    Raises:
        Unsupported: this machine's system calls are not known.
    """
    machine = platform.machine()
    if machine not in _CALLS:
        step = f"use one of {', '.join(_CALLS)}"
        raise Unsupported("watch system calls on", machine, "their numbers are not known", step)
    number, level = namespaces.cgroup_id_and_level(cgroup)
    pages = os.sysconf("SC_PHYS_PAGES")
    node = settings.node_budget_bytes or pages * os.sysconf("SC_PAGE_SIZE") // 16
    grants = 1
    while grants * 2 * settings.budget_bytes <= node and grants < 1024:
        grants *= 2
    counts = _has_symbol("tcp_bpf_ioctl")
    late = () if counts or faults & Fault.MISCOUNTED else _ASK_LATE
    kernel = () if faults & Fault.KERNEL_ENDS else _HAND_TO_KERNEL
    known = [_known(name, Sign.FIONREAD) for name in late]
    known += [_known(name, Sign.IN_KERNEL) for name in kernel]
    knobs = abi.Knobs(
        faults=faults,
        cgroup_level=level,
        cgroup_id=number,
        budget_bytes=settings.budget_bytes,
        budget_messages=settings.budget_messages,
        shallow_bytes=min(256 << 10, settings.budget_bytes),
        shallow_messages=min(128, settings.budget_messages),
        grants=grants,
        rdonly_cast=_has_symbol("bpf_rdonly_cast"),
        fionread_broken=fionread_broken,
        counts_redirected=counts,
        memory_pages=_memory_limit(),
        buffer_most=_buffer_limit(),
        recv_wake=_symbol("woken_wake_function"),
        poll_wake=_symbol("pollwake"),
        epoll_wake=_symbol("ep_poll_callback"),
        recv_code=(abi.u64 * (2 * len(_RECV)))(*(edge for name in _RECV for edge in _code(name))),
        known=(abi.Known * 16)(*known),
        observe_ns=0 if settings.admit_unknown else round(settings.observe_seconds * 1e9),
        calls=abi.Calls(*_CALLS[machine]),
    )
    return abi.About(
        abi=abi.ABI,
        capacity=settings.capacity,
        generation=generation,
        node_budget=settings.node_budget_bytes,
        knobs=knobs,
        version=__version__.encode(),
        cgroup=os.fsencode(cgroup),
    )


def settings_of(about: abi.About, control: abi.Control) -> Settings:
    """The settings that a generation was loaded with, and what has been changed since."""
    seconds = about.knobs.observe_ns / 1e9
    return Settings(
        capacity=about.capacity,
        budget_bytes=about.knobs.budget_bytes,
        budget_messages=about.knobs.budget_messages,
        node_budget_bytes=about.node_budget,
        observe_seconds=seconds or Settings.observe_seconds,
        admit_unknown=seconds == 0,
        small=Small(*control.small),
        reproof_seconds=control.reproof_ns / 1e9,
    )


def control(settings: Settings, *, closed: bool) -> abi.Control:
    """How a generation begins to steer."""
    return abi.Control(
        closed=closed,
        small=(abi.u32 * len(Small._fields))(*settings.small),
        reproof_ns=round(settings.reproof_seconds * 1e9),
    )


def _memory_limit() -> int:
    """Pages of TCP memory where the kernel begins to feel pressure (``tcp_mem[1]``)."""
    return int(Path("/proc/sys/net/ipv4/tcp_mem").read_text().split()[1])


def _buffer_limit() -> int:
    """The largest send buffer that may be asked for, in bytes (``net.core.wmem_max``).

    Older kernels say so in the first network namespace alone; elsewhere their default is taken.
    """
    try:
        return int(Path("/proc/sys/net/core/wmem_max").read_text())
    except FileNotFoundError:
        return 212992


#: Functions that a sleeping reader returns to: three of native TCP, then those around ours.
_RECV = (
    *("tcp_recvmsg_locked", "tcp_recvmsg", "tcp_splice_read"),
    *("tcp_bpf_recvmsg_parser", "tcp_bpf_recvmsg", "inet_recvmsg", "inet6_recvmsg"),
)


@functools.cache
def _symbols() -> dict[str, tuple[int, int]]:
    """Where some symbols begin, and the next one after each."""
    wanted = {
        *("woken_wake_function", "pollwake", "ep_poll_callback"),
        *("bpf_rdonly_cast", "tcp_bpf_ioctl"),
        *_RECV,
    }
    with Path("/proc/kallsyms").open() as lines:
        every = [(int(f[0], 16), f[2]) for f in map(str.split, lines) if len(f) == 3]  # no modules
    at = sorted({address for address, _ in every})
    found = {name: address for address, name in every if name in wanted}
    return {name: (n, at[min(bisect(at, n), len(at) - 1)]) for name, n in found.items()}


def _known(name: bytes, signs: Sign) -> abi.Known:
    """Programs whose names begin so: its bytes as a number, and which bits of that count."""
    ends = (name.ljust(8, b"\0"), b"\xff" * len(name) + b"\0" * (8 - len(name)))
    number, bits = (int.from_bytes(end, sys.byteorder) for end in ends)
    return abi.Known(number, bits, signs)


def _code(name: str) -> tuple[int, int]:
    """Where a function's code begins and ends; (0, 0) if the kernel does not say."""
    return _symbols().get(name, (0, 0))


def _symbol(name: str) -> int:
    return _code(name)[0]


def _has_symbol(name: str) -> bool:
    return name in _symbols()
