"""qperf as the reference runs it: its command line, and reading what it prints."""

from __future__ import annotations

import re

from underpass.bench.compare import Reading, Volume
from underpass.errors import UnderpassError

#: 1 byte to 16 KiB by a factor of 4, the reference's ``msg_size:1:16K:*4``.
SIZES = tuple(4**power for power in range(8))
TESTS = ("tcp_lat", "tcp_bw")

_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "sec": 1.0}
_VALUE = re.compile(r"^\s+(latency|bw)\s+=\s+([\d.,]+)\s+(\S+)\s*$", re.MULTILINE)


def server(port: int) -> list[str]:
    """The reference's bare ``qperf``, at a port of its own."""
    return ["qperf", "-lp", str(port)]


def client(address: str, port: int, test: str, size: int, seconds: int) -> list[str]:
    """One test at one size. The port is all that the reference's own line does not have."""
    loop = f"msg_size:{size}:{size}:*4"
    head = ["qperf", "-t", str(seconds), "-lp", str(port), address]
    return [*head, "-ub", "-oo", loop, "-vu", test]


def parse(text: str, size: int, seconds: int) -> Reading:
    """The figure of one test: microseconds (one way) or Mb/s, and what it moved meanwhile.

    Raises:
        UnderpassError: qperf printed no figure.
    """
    found = _VALUE.search(text)
    if not found:
        said = " ".join(text.split()) or "nothing"
        raise UnderpassError(
            "read", "the output of qperf", f"it printed: {said[:120]}", "run qperf by hand to see"
        )
    name, number, unit = found.groups()
    value = float(number.replace(",", ""))
    if name == "latency":
        latency = value * _SECONDS[unit]
        # One way is half a round trip: in `latency` seconds one message is passed on.
        messages = seconds / latency
        return Reading(latency * 1e6, Volume("messages", messages), messages)
    bits = value * _SCALES[unit.removesuffix("b/sec")]
    moved = bits / 8 * seconds
    return Reading(bits / 1e6, Volume("bytes", moved), messages=moved / size)
