"""Interfaces of the calling thread's network namespace, by rtnetlink: no program is needed."""

from __future__ import annotations

import os
import socket
import struct

from underpass.errors import KernelError

# <linux/netlink.h>, <linux/rtnetlink.h>, <linux/if_link.h>, <linux/if_addr.h>
_ROUTE = 0
_ERROR, _NEWLINK, _NEWADDR = 2, 16, 20
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_IFNAME, _MASTER, _LINKINFO, _NET_NS_FD = 3, 10, 18, 28
_KIND, _DATA, _PEER = 1, 2, 1
_ADDRESS, _LOCAL = 1, 2
_UP = 0x1


def add_bridge(name: str) -> None:
    """Add a bridge that is up.

    Raises:
        KernelError: the kernel refuses, as for all that follows.
    """
    body = _header(up=True) + _text(_IFNAME, name) + _attribute(_LINKINFO, _text(_KIND, "bridge"))
    _ask(f"bridge {name}", _NEWLINK, _CREATE | _EXCL, body)


def add_veth(name: str, bridge: str, peer: str, netns: int) -> None:
    """Add a cable: one end on the bridge, up; the other in the namespace of the file ``netns``."""
    to = _attribute(_NET_NS_FD, struct.pack("=I", netns))
    other = _attribute(_PEER, _header() + _text(_IFNAME, peer) + to)
    info = _text(_KIND, "veth") + _attribute(_DATA, other)
    body = _header() + _text(_IFNAME, name) + _attribute(_LINKINFO, info)
    _ask(f"veth {name}", _NEWLINK, _CREATE | _EXCL, body)
    master = _attribute(_MASTER, struct.pack("=I", socket.if_nametoindex(bridge)))
    _ask(f"veth {name}", _NEWLINK, 0, _header(name, up=True) + master)


def set_up(name: str) -> None:
    """Let an interface be up."""
    _ask(f"interface {name}", _NEWLINK, 0, _header(name, up=True))


def add_address(name: str, address: str, prefix: int) -> None:
    """Give an interface an IPv4 address."""
    packed = socket.inet_aton(address)
    head = struct.pack("=BBBBi", socket.AF_INET, prefix, 0, 0, socket.if_nametoindex(name))
    body = head + _attribute(_LOCAL, packed) + _attribute(_ADDRESS, packed)
    _ask(f"address {address}", _NEWADDR, _CREATE | _EXCL, body)


def _header(name: str = "", *, up: bool = False) -> bytes:
    """``struct ifinfomsg`` of the interface that has this name, or of one that has none yet."""
    index, flags = (socket.if_nametoindex(name) if name else 0), (_UP if up else 0)
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags)


def _attribute(kind: int, data: bytes) -> bytes:
    head = struct.pack("=HH", 4 + len(data), kind)
    return head + data + b"\0" * (-len(data) % 4)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, os.fsencode(text) + b"\0")


def _ask(what: str, kind: int, flags: int, body: bytes) -> None:
    """Send one request and read its acknowledgement."""
    request = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE) as ours:
        ours.sendall(request)
        answer = ours.recv(1 << 16)
    _, said = struct.unpack_from("=IH", answer)
    code = -struct.unpack_from("=i", answer, 16)[0] if said == _ERROR else 0
    if code:
        raise KernelError("make", what, code, "see whether the kernel has veth and bridge")
