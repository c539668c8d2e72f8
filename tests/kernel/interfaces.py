"""A second interface between the client's and the server's pod of a bed."""

from __future__ import annotations

import pytest

from tests.kernel.bed import Bed

KINDS = ("veth", "macvlan", "ipvlan")
SECOND = {"client": "10.99.0.1", "server": "10.99.0.2"}
"""The address of each end."""


def second_interface(bed: Bed, kind: str) -> None:
    """Give both pods an eth1: a cable of their own, or a share of one device of the node's.

    Skips the test where the kernel has no such device.
    """
    if kind == "veth":
        veth = "link add eth1 type veth peer name eth1 netns"
        bed.within("client", "ip", *veth.split(), bed.netns["server"])
    else:
        bed.within("router", "ip", "link", "add", "parent", "type", "veth", "peer", "name", "wire")
        for name in ("parent", "wire"):
            bed.within("router", "ip", "link", "set", name, "up")
    for where, address in SECOND.items():
        if kind != "veth":
            mode = "bridge" if kind == "macvlan" else "l2"
            share = f"name eth1 netns {bed.netns[where]} link parent"
            make_device(bed, "router", f"{share} type {kind} mode {mode}")
        bed.within(where, "ip", "addr", "add", f"{address}/24", "dev", "eth1")
        bed.within(where, "ip", "link", "set", "eth1", "up")


def make_device(bed: Bed, where: str, words: str) -> None:
    """Add a device as `ip link add` has it; skips the test where the kernel has no such device."""
    try:
        bed.within(where, "ip", "link", "add", *words.split())
    except AssertionError as error:
        if any(said in str(error) for said in ("Unknown device type", "not supported")):
            pytest.skip(f"this kernel has no such device: {words}")
        raise
