"""The stream contents that the kernel tests check with."""

from __future__ import annotations

import pytest

from underpass.torture.content import LONGEST, PERIOD, Sink, Wrong, WrongBytesError, content


def _take(stream: int, data: bytes) -> Wrong:
    sink = Sink(stream)
    sink.feed(bytes(content(stream, 0, 1000)))
    with pytest.raises(WrongBytesError) as raised:
        sink.feed(data)
    return raised.value.wrong


def test_right_bytes_pass_in_any_pieces() -> None:
    """Claim: a stream is right however it is cut, also across the key stream's end."""
    sink = Sink(9)
    sink.offset = PERIOD - LONGEST
    for size in (1, 7, 1000, LONGEST - 8, LONGEST, 1):
        sink.feed(bytes(content(9, sink.offset, size)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(content(5, 1100, 100)) + bytes(content(5, 1000, 100)), "its own bytes from 1100"),
        (bytes(content(5, 1000, 50)) + bytes(content(5, 1060, 50)), "its own bytes from 1060"),
        (bytes(content(5, 900, 100)), "its own bytes from 900"),
        (bytes(content(6, 1000, 100)), "stream 0x6's bytes from 1000"),
        (bytes(100), "bytes of no stream"),
    ],
    ids=["swapped", "lost", "repeated", "another stream's", "of no stream"],
)
def test_wrong_bytes_are_named(data: bytes, said: str) -> None:
    """Claim: what came instead of the right bytes is told apart and named."""
    wrong = _take(5, data)
    text = wrong.describe({5: 2000, 6: 2000}).replace("offset ", "")
    assert text == f"at {wrong.offset} came {said}"


def test_the_first_wrong_byte_is_told() -> None:
    """Claim: the offset told is that of the first wrong byte."""
    data = bytearray(content(5, 1000, 400))
    data[123] ^= 1
    assert _take(5, bytes(data)).offset == 1123
