"""HAProxy, started for a test in a directory of its own."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from tests.apps.programs import find, serve
from tests.kernel.bed import Bed

_CONFIG = """
global
  maxconn 400
  nbthread 2
  stats socket {directory}/{name}.sock mode 600 level admin
defaults
  mode {mode}
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  {options}
listen proxy
  bind :{port}
  server one {to}
"""
SPLICE = "\n  ".join(f"option splice-{when}" for when in ("auto", "request", "response"))


def start(
    bed: Bed,
    where: str,
    directory: Path,
    port: int,
    to: str,
    *,
    mode: str,
    options: str = "",
    outside: bool = False,
) -> Path:
    """Start HAProxy as a proxy from `port` to the address `to`; returns its statistics socket.

    `mode` is HAProxy's, "http" or "tcp"; `options` are further lines of its defaults.
    """
    haproxy = find("haproxy", "haproxy")
    name = f"haproxy-{port}"
    config = directory / f"{name}.conf"
    words = {"name": name, "directory": directory, "mode": mode, "options": options}
    config.write_text(_CONFIG.format(port=port, to=to, **words))
    log = directory / f"{name}.log"
    serve(bed, where, port, [haproxy, "-db", "-f", str(config)], log, outside=outside)
    return directory / f"{name}.sock"


def spliced(statistics: Path) -> int:
    """Bytes that HAProxy has spliced from socket to socket since it started."""
    with socket.socket(socket.AF_UNIX) as asking, asking.makefile("rb") as answer:
        asking.settimeout(10)
        asking.connect(str(statistics))
        asking.sendall(b"show info\n")
        found = re.search(rb"^TotalSplic\w+BytesOut: (\d+)$", answer.read(), re.MULTILINE)
    assert found, "show info"
    return int(found[1])
