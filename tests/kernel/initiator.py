"""Handing a socket to the kernel's iSCSI initiator, as iscsid does (``scsi/iscsi_if.h``)."""

from __future__ import annotations

import enum
import os
import socket
import struct
from pathlib import Path

import pytest

from tests.kernel import remote
from tests.kernel.bed import run
from tests.kernel.remote import Remote
from underpass import namespaces
from underpass.torture.patience import SLOW

_NETLINK_ISCSI = 8
_NLM_F_REQUEST = 1
_HANDLE = Path("/sys/class/iscsi_transport/tcp/handle")
_SESSIONS = Path("/sys/class/iscsi_session")
_EVENT = 256  # bytes; what is behind the kernel's own structure is not looked at
_END = 1  # STOP_CONN_TERM
_FIRST = "/proc/1/ns/net"  # that namespace alone is answered there


class _Event(enum.IntEnum):
    """``enum iscsi_uevent_e``."""

    CREATE_SESSION = 11
    DESTROY_SESSION = 12
    CREATE_CONN = 13
    DESTROY_CONN = 14
    BIND_CONN = 15
    STOP_CONN = 18


def have(*modules: str) -> None:
    """Load modules, or skip: what they serve is the whole machine's, so it has to be emulated."""
    if SLOW == 1:
        pytest.skip("runs on emulated machines alone: ./dev test-kernel")
    run("modprobe", "-a", *modules)


def _ask(event: _Event, body: bytes) -> None:
    def ask() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ISCSI) as kernel:
            head = struct.pack("=IIQ", event, 0, int(_HANDLE.read_text()))
            told = (head + body).ljust(_EVENT, b"\0")
            message = struct.pack("=IHHII", 16 + _EVENT, event, _NLM_F_REQUEST, 1, 0) + told
            kernel.sendto(message, (0, 0))
            error = struct.unpack_from("=i", kernel.recv(4096), 16 + 4)[0]
        if error:
            raise OSError(-error, os.strerror(-error), event.name)

    inode = Path(_FIRST).stat().st_ino
    namespaces.in_namespace(namespaces.NetNamespace(inode, _FIRST, None), ask)


def _take(number: int) -> int:
    """In a worker: the kernel reads this socket from now on; the session's number."""
    before = set(_SESSIONS.iterdir())
    _ask(_Event.CREATE_SESSION, struct.pack("=IHH", 1, 32, 32))
    (made,) = set(_SESSIONS.iterdir()) - before
    session = int(made.name.removeprefix("session"))
    _ask(_Event.CREATE_CONN, struct.pack("=II", session, 0))
    fd = remote._SOCKETS[number].fileno()
    _ask(_Event.BIND_CONN, struct.pack("=IIQI", session, 0, fd, 1))
    return session


def _give_back(session: int) -> None:
    _ask(_Event.STOP_CONN, struct.pack("=IIQI", session, 0, 0, _END))
    _ask(_Event.DESTROY_CONN, struct.pack("=II", session, 0))
    _ask(_Event.DESTROY_SESSION, struct.pack("=I", session))


def hand_over(end: Remote) -> int:
    """Let the kernel have the socket, by a call of its worker; returns the session's number."""
    return int(end.worker.call(_take, end.number))


def give_back(end: Remote, session: int) -> None:
    """End the session; the worker still has the socket."""
    end.worker.call(_give_back, session)
