"""A program that takes every body with one recv and MSG_WAITALL: whole_reader.py HOST PORT SECONDS.

It asks `tests.apps.hasher` for streams and prints a line for each: stream, size, sha256.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import sys
import time

_SIZES = (1, 700, 20_000, 300_000, 2_000_000)
_STREAMS = 16
_PATIENCE = struct.pack("ll", 15, 0)
"""A struct timeval: a recv that hangs for so long returns what it has."""


def main() -> None:
    """Fetch bodies over and over until the time is up."""
    host, port, seconds = sys.argv[1:]
    end = time.monotonic() + float(seconds)
    stream = 0
    while time.monotonic() < end:
        with socket.create_connection((host, int(port))) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
            for size in _SIZES:
                hashed = hashlib.sha256(_fetch(sock, stream, size)).hexdigest()
                sys.stdout.write(f"{stream} {size} {hashed}\n")
        stream = (stream + 1) % _STREAMS


def _fetch(sock: socket.socket, stream: int, size: int) -> bytes:
    sock.sendall(b"GET /%d/%d HTTP/1.1\r\nHost: hasher\r\n\r\n" % (stream, size))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, head
        head += byte
    return sock.recv(size, socket.MSG_WAITALL)


if __name__ == "__main__":
    main()
