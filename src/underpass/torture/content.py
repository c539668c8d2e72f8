"""What streams carry: bytes that tell which stream and which offset they belong to.

Every stream is a window into one pseudo-random key stream, so a swapped, lost, repeated or
foreign byte is found by comparing and named by looking up where the wrong bytes belong.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass

PERIOD = (8 << 20) - 3
"""Length of the key stream in bytes: streams repeat after it."""
LONGEST = 4 << 20
"""Longest slice that can be asked for at once, in bytes."""
_SPREAD = 0x9E3779B97F4A7C15


@functools.cache
def _key_stream() -> bytes:
    once = hashlib.shake_128(b"underpass test streams").digest(PERIOD)
    return once + once[:LONGEST]


@functools.cache
def key_file() -> int:
    """A memory file that holds the key stream, for sendfile: its descriptor."""
    handle = os.memfd_create("underpass-test-stream")
    with open(handle, "wb", closefd=False) as file:
        file.write(_key_stream())
    return handle


def position(stream: int, offset: int) -> int:
    """Where in the key stream the byte at ``offset`` of ``stream`` stands."""
    return (stream * _SPREAD + offset) % PERIOD


def content(stream: int, offset: int, length: int) -> memoryview:
    """``length`` bytes (at most ``LONGEST``) of ``stream`` from ``offset`` on."""
    start = position(stream, offset)
    return memoryview(_key_stream())[start : start + length]


@dataclass(frozen=True)
class Wrong:
    """The first wrong byte of a stream.

    Attributes:
        stream: its number.
        offset: where in the stream.
        belongs_at: position in the key stream of the bytes that came instead; None: in no
            stream at all.
    """

    stream: int
    offset: int
    belongs_at: int | None

    def describe(self, lengths: dict[int, int]) -> str:
        """Say what the wrong bytes are, given the lengths of the streams that may be meant."""
        instead = "bytes of no stream"
        if self.belongs_at is not None:
            instead = "bytes of a stream of another batch"
            for stream in sorted(lengths, key=lambda stream: stream != self.stream):
                offset = (self.belongs_at - position(stream, 0)) % PERIOD
                if offset < lengths[stream]:
                    whose = "its own" if stream == self.stream else f"stream {stream:#x}'s"
                    instead = f"{whose} bytes from offset {offset}"
                    break
        return f"at offset {self.offset} came {instead}"


class WrongBytesError(Exception):
    """A stream carried something else than it should."""

    def __init__(self, wrong: Wrong) -> None:
        super().__init__(wrong)
        self.wrong = wrong


class Sink:
    """Checks what arrives on one stream."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.offset = 0

    def feed(self, data: bytes | bytearray, length: int | None = None) -> None:
        """Take the next ``length`` (default: all) bytes of ``data``; at most ``LONGEST``.

        Raises:
            WrongBytesError: at the first wrong one.
        """
        size = len(data) if length is None else length
        expected = content(self.stream, self.offset, size)
        if not data.startswith(expected):  # one memcmp, where == would go byte by byte
            self._raise(bytes(data[:size]), bytes(expected))
        self.offset += size

    def _raise(self, data: bytes, expected: bytes) -> None:
        first = next(
            i for i, pair in enumerate(zip(data, expected, strict=True)) if len({*pair}) > 1
        )
        sample = data[first : first + 16]
        found = _key_stream().find(sample) if len(sample) >= 4 else -1
        belongs_at = found % PERIOD if found >= 0 else None
        raise WrongBytesError(Wrong(self.stream, self.offset + first, belongs_at))
