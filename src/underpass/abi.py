"""Mirror of ``bpf/underpass.h``: what the programs and user space exchange.

Sizes and offsets are compared with the header's by ``tests/unit``.
"""

from __future__ import annotations

import ctypes
import enum
import ipaddress
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from underpass.model import Reason, Small

ABI = 10
REASONS = len(Reason)

u8, u32, u64 = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_uint64


class Calls(ctypes.Structure):
    """``struct up_calls``: numbers of system calls."""

    _fields_ = [
        (name, u32)
        for name in (
            "splice", "recvfrom", "recvmsg", "recvmmsg", "sendto", "sendmsg", "sendmmsg",
            "getsockopt", "accept", "accept4", "ioctl",
            "setsockopt", "poll", "ppoll", "epoll_ctl", "sendfile",
        )
    ]  # fmt: skip


class Known(ctypes.Structure):
    """``struct up_known``."""

    _fields_ = [("name", u64), ("bits", u64), ("signs", u64)]


class Knobs(ctypes.Structure):
    """``struct up_knobs``."""

    _fields_ = [
        ("faults", u32),
        ("cgroup_level", u32),
        ("cgroup_id", u64),
        ("budget_bytes", u32),
        ("budget_messages", u32),
        ("shallow_bytes", u32),
        ("shallow_messages", u32),
        ("grants", u32),
        ("rdonly_cast", u32),
        ("fionread_broken", u32),
        ("counts_redirected", u32),
        ("memory_pages", u64),
        ("buffer_most", u64),
        ("recv_wake", u64),
        ("poll_wake", u64),
        ("epoll_wake", u64),
        ("recv_code", u64 * 14),
        ("known", Known * 16),
        ("observe_ns", u64),
        ("calls", Calls),
    ]


class About(ctypes.Structure):
    """``struct up_about``."""

    _fields_ = [
        ("abi", u32),
        ("capacity", u32),
        ("generation", u64),
        ("node_budget", u64),
        ("knobs", Knobs),
        ("version", ctypes.c_char * 32),
        ("cgroup", ctypes.c_char * 512),
    ]


class Control(ctypes.Structure):
    """``struct up_control``."""

    _fields_ = [
        ("stop", u32),
        ("forced", u32),
        ("closed", u32),
        ("adopting", u32),
        ("small", u32 * len(Small._fields)),
        ("reproof_ns", u64),
        ("policy", u32),
        ("pad", u32),
    ]


class Policy(ctypes.Structure):
    """``struct up_policy``."""

    _fields_ = [
        *((name, u64) for name in ("allow", "any_port", "any_cidr", "unknown_group")),
        ("default_allow", u32),
        ("unknown_waits", u32),
    ]


class Group(ctypes.Structure):
    """``struct up_group``."""

    _fields_ = [("cgroup", u64), ("bank", u32), ("pad", u32)]


class Port(ctypes.Structure):
    """``struct up_port``."""

    _fields_ = [("port", u32), ("bank", u32)]


class Network(ctypes.Structure):
    """``struct up_network``."""

    _fields_ = [("bits", u32), ("bank", u32), ("ip", u8 * 16)]


class Counters(ctypes.Structure):
    """``struct up_counters``, one per CPU."""

    _fields_ = [
        ("messages", u64 * REASONS),
        ("connections", u64 * REASONS),
        ("shortcut_bytes", u64),
    ]


def add_up(many: Iterable[Counters]) -> Counters:
    """The sum, field by field."""
    total = Counters()
    for one in many:
        for reason in range(REASONS):
            total.messages[reason] += one.messages[reason]
            total.connections[reason] += one.connections[reason]
        total.shortcut_bytes += one.shortcut_bytes
    return total


class Program(ctypes.Structure):
    """``struct up_program``."""

    _fields_ = [
        ("first_seen", u64),
        ("last_seen", u64),
        ("active_ns", u64),
        ("signs", u32),
        ("rule", u32),
        ("pid", u32),
        ("by_arguments", u8),
        ("accepts", u8),
        ("hands_on", u8),
        ("looks", u8),
        ("name", ctypes.c_char * 32),
        ("command", u8 * 128),
    ]


class RuleKey(ctypes.Structure):
    """``struct up_rule_key``."""

    _fields_ = [("program", u64), ("name", ctypes.c_char * 32)]


class Address(ctypes.Structure):
    """``struct up_address``."""

    _fields_ = [("ip", u8 * 16), ("port", u32)]


class Place(ctypes.Structure):
    """``struct up_place``."""

    _fields_ = [("netns", u64), ("at", Address), ("pad", u32)]


class Owner(ctypes.Structure):
    """``struct up_owner``."""

    _fields_ = [
        ("program", u64),
        ("listener", u64),
        ("cookie", u64),
        ("accepts", u32),
        ("shared", u32),
    ]


class News(ctypes.Structure):
    """``struct up_news``."""

    _fields_ = [("epoch", u64)]


class Record(NamedTuple):
    """``struct up_record``, in its order."""

    cookie: int
    peer: int
    shortcut_bytes: int
    shortcut_messages: int
    tcp_messages: int
    netns_cookie: int
    inode: int
    program: int
    local_ip: bytes
    local_port: int
    remote_ip: bytes
    remote_port: int
    netns: int
    unread: int
    role: int
    reason: int
    state: int
    in_map: int
    covered: int
    armed: int


class Order(ctypes.Structure):
    """``struct up_order``."""

    _fields_ = [
        *((name, u64) for name in ("peer", "program", "peer_program", "number", "sock", "state")),
        *((name, u32) for name in ("descriptors", "threaded", "step", "role")),
        *((name, u32) for name in ("loopback", "sent_from", "received_from", "answer")),
    ]


class Step(enum.IntEnum):
    """``enum up_step``."""

    WATCH = 0
    ENTER = 1
    CHECK = 2
    PAIR = 3
    GIVE_UP = 4


class Standing(NamedTuple):
    """``struct up_standing``, in its order."""

    cookie: int
    peer: int
    inode: int
    left_at: int
    local_ip: bytes
    local_port: int
    remote_ip: bytes
    remote_port: int
    sent_from: int
    received_from: int
    netns: int
    reason: int
    leaves: int


STANDING = struct.Struct("=4Q16sI16sI3I2B2x")
RECORD = struct.Struct("=8Q16sI16sI2I6B2x")
CLIENT, SERVER = 1, 2
TCP_LISTEN = 10


def records(data: bytes) -> Iterator[Record]:
    """The records in what an iterator wrote; a trailing fragment is dropped."""
    whole = len(data) - len(data) % RECORD.size
    return (Record(*fields) for fields in RECORD.iter_unpack(memoryview(data)[:whole]))


def standing(data: bytes) -> Iterator[Standing]:
    """The same of ``up_standing``."""
    whole = len(data) - len(data) % STANDING.size
    return (Standing(*fields) for fields in STANDING.iter_unpack(memoryview(data)[:whole]))


def address(raw: bytes) -> str:
    """``struct up_address.ip`` as text; IPv4-mapped as plain IPv4."""
    if raw[:12] == b"\0" * 10 + b"\xff\xff":
        return f"{raw[12]}.{raw[13]}.{raw[14]}.{raw[15]}"
    return str(ipaddress.IPv6Address(raw))
