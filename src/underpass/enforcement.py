"""The policy of one generation, in the kernel's tables (``bpf/policy.h``).

There are two banks of tables: the one that is in force is left alone while the other is written,
and then one word says which counts.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import time
from collections.abc import Iterable, Mapping
from typing import Any

from underpass import abi, libbpf
from underpass.errors import KernelError, UnderpassError
from underpass.generation import Dataplane
from underpass.policy import Compiled

_TABLES: tuple[tuple[str, type[Any]], ...] = (
    ("groups", abi.Group),
    ("ports", abi.Port),
    ("networks", abi.Network),
)
_EVERY_IPV4 = {"0.0.0.0/0": 0}  # lest ::/0 holds IPv4-mapped addresses
_RULES = 64
_GRACE = 0.02  # seconds after which nobody looks into the bank any more that was in force
_IPV4_BITS = 96  # before an IPv4 address, as IPv4-mapped IPv6


def set_policy(plane: Dataplane, compiled: Compiled | None) -> None:
    """Put a policy in force: for new connections at once, for open ones with their next message.

    Args:
        plane: a generation.
        compiled: the rules; None = all may take the shortcut.

    Raises:
        UnderpassError: a table is full, or there are more rules than bits; what was in force stays.
    """
    bank = 1 - _bank(plane) if plane.policy else 0
    if compiled is not None:
        try:
            _write(plane, bank, compiled)
        except BaseException:
            _clear(plane, bank)
            raise
    plane.choose_policy(0 if compiled is None else bank + 1)
    time.sleep(_GRACE)
    _clear(plane, 1 - bank)


def _write(plane: Dataplane, bank: int, compiled: Compiled) -> None:
    _clear(plane, bank)  # what a killed one left
    value = abi.Policy(
        allow=compiled.allow,
        any_port=compiled.any_port,
        any_cidr=compiled.any_cidr,
        unknown_group=compiled.unknown_group or 0,
        default_allow=compiled.default_allow,
        unknown_waits=compiled.unknown_group is None,
    )
    libbpf.update(plane.fd("policies"), abi.u32(bank), value)
    _put(plane, "groups", ((abi.Group(cgroup=c, bank=bank), m) for c, m in compiled.groups.items()))
    _put(plane, "ports", ((abi.Port(port=p, bank=bank), m) for p, m in compiled.ports.items()))
    networks = _EVERY_IPV4 | dict(compiled.cidrs)
    _put(plane, "networks", ((_network(n, bank), m) for n, m in networks.items()))


def set_groups(plane: Dataplane, groups: Mapping[int, int]) -> None:
    """Replace the groups of the policy that is in force, as pods come and go.

    Args:
        plane: a generation; nothing happens if it has no policy.
        groups: id of a cgroup to the mask of its rules.

    Raises:
        UnderpassError: the table is full; those that found no room are unknown groups.
    """
    if not plane.policy:
        return
    fd, bank = plane.fd("groups"), _bank(plane)
    items = libbpf.items(fd, abi.Group, abi.u64)
    present = {at.cgroup: mask.value for at, mask in items if at.bank == bank}
    changed = {cgroup: mask for cgroup, mask in groups.items() if present.get(cgroup) != mask}
    try:
        for cgroup in present.keys() - groups.keys():
            libbpf.delete(fd, abi.Group(cgroup=cgroup, bank=bank))
        _put(plane, "groups", ((abi.Group(cgroup=c, bank=bank), m) for c, m in changed.items()))
    finally:
        plane.tell()  # also of what one that was killed had changed


def take_over(plane: Dataplane, before: Dataplane) -> None:
    """Let a generation have the policy of the one that it replaces."""
    for name, key in _TABLES:
        for at, mask in libbpf.items(before.fd(name), key, abi.u64):
            libbpf.update(plane.fd(name), at, mask)
    for bank in (0, 1):
        value = abi.Policy()
        libbpf.lookup(before.fd("policies"), abi.u32(bank), value)
        libbpf.update(plane.fd("policies"), abi.u32(bank), value)
    plane.choose_policy(before.policy)


def _bank(plane: Dataplane) -> int:
    return (plane.policy - 1) & 1


def _clear(plane: Dataplane, bank: int) -> None:
    for name, key in _TABLES:
        fd = plane.fd(name)
        for raw in libbpf.keys(fd, ctypes.sizeof(key)):
            at = key.from_buffer_copy(raw)
            if at.bank == bank:
                libbpf.delete(fd, at)


def _put(plane: Dataplane, name: str, elements: Iterable[tuple[Any, int]]) -> None:
    fd = plane.fd(name)
    for at, mask in elements:
        if mask >> _RULES:
            raise UnderpassError(
                "set", "the policy", f"it has more than {_RULES} rules", "join some"
            )
        try:
            libbpf.update(fd, at, abi.u64(mask))
        except KernelError as error:
            if error.errno not in (errno.E2BIG, errno.ENOSPC):
                raise
            step = f"name fewer {name} in its rules"
            raise UnderpassError(
                "set", "the policy", f"the table of {name} is full", step
            ) from None


def _network(text: str, bank: int) -> abi.Network:
    network = ipaddress.ip_network(text)
    raw, bits = network.network_address.packed, network.prefixlen
    if network.version == 4:
        raw, bits = b"\0" * 10 + b"\xff\xff" + raw, bits + _IPV4_BITS
    return abi.Network(bits=32 + bits, bank=bank, ip=(abi.u8 * 16)(*raw))
