"""The two programs of workload ``idle``: one holds connections open, one answers them.

    python -m underpass.bench.holder serve ADDRESS PORT MOST
    python -m underpass.bench.holder hold ADDRESS PORT PAIRS

``hold`` prints one JSON document: by how much the kernel's memory grew while it opened them. Each
connection has carried a byte each way, so that whatever a pair needs has been made for it.
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

_BACKLOG = 4096
_SPARE = 64  # descriptors that are no connection
_QUIET = 64 << 10
_PATIENCE, _BETWEEN = 3.0, 0.1
#: Closes at once with a reset: what waited in TIME_WAIT would be freed within the next run.
_AT_ONCE = struct.pack("ii", 1, 0)


def kernel_memory() -> tuple[int, int]:
    """Bytes of the whole node in slabs (sockets, files, map elements) and in TCP's buffers."""
    slab = tcp = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            slab = int(line.split()[1]) << 10
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            words = line.split()
            tcp = int(words[words.index("mem") + 1]) * resource.getpagesize()
    return slab, tcp


def settled() -> tuple[int, int]:
    """The same, once it has stopped to move (frees are late), or after a few seconds."""
    deadline, last = time.monotonic() + _PATIENCE, kernel_memory()
    while True:
        time.sleep(_BETWEEN)
        now = kernel_memory()
        if abs(sum(now) - sum(last)) < _QUIET or time.monotonic() > deadline:
            return now
        last = now


def serve(address: str, port: int) -> None:
    """Answer every byte with itself, until killed."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with selectors.DefaultSelector() as ready, socket.create_server(
        (address, port), family=family, backlog=_BACKLOG
    ) as listener:  # fmt: skip
        ready.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is listener:
                    ready.register(listener.accept()[0], selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket) and not _answered(key.fileobj):
                    ready.unregister(key.fileobj)
                    key.fileobj.close()


def _answered(connection: socket.socket) -> bool:
    with suppress(ConnectionError):
        said = connection.recv(64)
        connection.sendall(said)
        return bool(said)
    return False


def hold(address: str, port: int, pairs: int) -> dict[str, int]:
    """Open connections one by one, hold them all, and tell what they cost."""
    before = settled()
    held = []
    for _ in range(pairs):
        connection = socket.create_connection((address, port))
        held.append(connection)
        connection.sendall(b"u")
        if connection.recv(1) != b"u":
            raise ConnectionError("the server closed")
    after = settled()
    for connection in held:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        connection.close()
    slab, tcp = (end - start for end, start in zip(after, before, strict=True))
    return {"pairs": pairs, "slab_bytes": slab, "tcp_bytes": tcp}


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, count + _SPARE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))


def main(words: list[str]) -> None:
    """Run one of the two."""
    match words:
        case ["serve", address, port, most]:
            _allow_descriptors(int(most))
            serve(address, int(port))
        case ["hold", address, port, pairs]:
            _allow_descriptors(int(pairs))
            print(json.dumps(hold(address, int(port), int(pairs))))  # noqa: T201 (its output)
        case _:
            sys.exit("usage: holder serve ADDRESS PORT MOST | hold ADDRESS PORT PAIRS")


if __name__ == "__main__":
    main(sys.argv[1:])
