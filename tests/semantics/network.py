"""Rows: what stands beside the connection and sees packets, or does not."""

from __future__ import annotations

import ctypes
import select
import socket
import struct

from tests.semantics.options import drop
from tests.semantics.stage import Stage
from tests.semantics.table import TEN, Subject, Verdict

NETWORK = Subject("The network around it")
_MARK = b"underpass-semantics-mark"
_ETH_P_ALL = 3
_SO_ATTACH_FILTER = 26
NO_PACKET = "there is no packet"


@NETWORK.accepted(
    "tcpdump (AF_PACKET)",
    "seen",
    "not seen",
    f"{NO_PACKET}; `underpass pause` makes all bytes visible, `connections` tells of the "
    "shortcut's",
    carries=len(_MARK),
)
def _captured(stage: Stage) -> str:
    client, server = stage.pair()
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    client.sendall(_MARK)
    server.recv(100)
    while stage.polled(sniffer, select.POLLIN) == "IN":
        if _MARK in sniffer.recv(65536):
            return "seen"
    return "not seen"


@NETWORK.accepted(
    "a firewall rule that comes later and drops the connection",
    "nothing",
    "IN",
    f"{NO_PACKET} to drop; the rule holds for new connections, whose handshake is always real",
)
def _dropped(stage: Stage) -> str:
    client, server = stage.pair()
    drop(server)
    client.sendall(TEN)
    return stage.polled(server, select.POLLIN)


@NETWORK.accepted(
    "`SO_ATTACH_FILTER` that lets nothing pass",
    "nothing",
    "IN",
    f"{NO_PACKET} to filter; cgroup_skb programs see none either",
)
def _filtered(stage: Stage) -> str:
    client, server = stage.pair()
    code = struct.pack("=HBBI", 6, 0, 0, 0)  # return 0
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", 1, ctypes.addressof(memory))
    server.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    client.sendall(TEN)
    return stage.polled(server, select.POLLIN)


NETWORK.not_run(
    "conntrack and IPVS idle timers",
    "every packet renews them",
    "a message every `reproof` seconds does",
    Verdict.ACCEPTED,
    "[not run here: `tests/kernel/test_reproof.py` does] with `reproof = 0` they run out under "
    "active use: conntrack forgets established connections after 5 days, IPVS after 15 minutes",
)
NETWORK.not_run(
    "memory cgroup that bytes in flight are charged to",
    "the sender's, then the reader's",
    "the reader's",
    Verdict.ACCEPTED,
    "[not run here: `tests/kernel/test_cgroup_memory.py` does, where cgroup 2 has the memory "
    "controller] the budget bounds them, and near a limit of the reader's cgroup they go by TCP "
    "(`cgroup-memory`)",
)
NETWORK.not_run(
    "checkpoint and restore (`TCP_REPAIR`)",
    "unread bytes are saved",
    "unread shortcut bytes are not",
    Verdict.ACCEPTED,
    "[not run: no CRIU at hand] they are in no TCP queue; run `underpass down` first",
)
NETWORK.not_run(
    "a program that hands its socket to the kernel (iSCSI)",
    "works",
    (),
    Verdict.GUARDED,
    "[not run here: `tests/kernel/test_kernel_ends.py` does, on Linux 6.1 and 6.12] the kernel "
    "could not close it again; iscsid, nbd-client, usbip and openvpn are known by name, others "
    "from what was seen of them while they were watched (`in-kernel`)",
)
NETWORK.not_run(
    "sockets of the kernel itself (NVMe over TCP, NFS, CIFS)",
    "work",
    (),
    Verdict.GUARDED,
    "[not run here: `tests/kernel/test_kernel_ends.py` does with NVMe, on Linux 6.1 and 6.12] both "
    "ends stay on TCP (`kernel-socket`)",
)
NETWORK.not_run(
    "kTLS (`TCP_ULP`)",
    "works",
    (),
    Verdict.GUARDED,
    "[not run: no kTLS in the kernels at hand] a direction with an upper layer protocol at either "
    "end stays on TCP",
)
NETWORK.not_run(
    "SMC (`AF_SMC`)",
    "works",
    (),
    Verdict.GUARDED,
    "[not run: no AF_SMC in the kernels at hand] its TCP socket is the kernel's own",
)
