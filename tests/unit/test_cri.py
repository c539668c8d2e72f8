"""What the runtime answers, read by hand: right, cut short, hostile, and at sockets that fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fuzz import FUZZED
from underpass import cri
from underpass.errors import UnderpassError
from underpass.pod import Pod

UID = "0f7a1a2b-3c4d-5e6f-8a9b-0c1d2e3f4a5b"


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: bytes | int | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _map(number: int, values: dict[str, str]) -> bytes:
    return b"".join(_field(number, _field(1, k) + _field(2, v)) for k, v in values.items())


def _sandbox(name: str, identity: str, state: int = 0, **labels: str) -> bytes:
    about = _field(1, name) + _field(2, UID) + _field(3, "default") + _field(4, 1)
    body = _field(1, identity) + _field(2, about)
    body += _field(3, state) if state else b""  # proto3 leaves out what is 0
    return _field(1, body + _field(4, 1 << 60) + _map(5, labels) + _map(6, {"note": "x"}))


def _container(name: str, identity: str, sandbox: str, state: int) -> bytes:
    body = _field(1, identity) + _field(2, sandbox) + _field(3, _field(1, name))
    return _field(1, body + (_field(6, state) if state else b""))


def test_what_is_told() -> None:
    """Claim: running sandboxes are pods, with labels, annotations and live containers."""
    sandboxes = _sandbox("web", "s1", app="web") + _sandbox("old", "s2", state=1)
    containers = _container("app", "c1", "s1", 1) + _container("init", "c2", "s1", 2)
    containers += _container("new", "c3", "s1", 0) + _container("other", "c4", "s2", 1)
    assert cri.read(sandboxes, containers) == [
        Pod(
            "default",
            "web",
            UID,
            labels={"app": "web"},
            annotations={"note": "x"},
            containers={"c1": "app", "c3": "new"},
        )
    ]
    assert cri.read(b"", b"") == []


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\xff", b"\x0b", b"\xff" * 11, b"\x0a\x05abc"])
def test_cut_short(data: bytes) -> None:
    """Claim: what ends in the middle, or is no message, is refused in words."""
    for answers in ((data, b""), (b"", data)):
        with pytest.raises(ValueError, match=r"cut short|wire type"):
            cri.read(*answers)


@FUZZED
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_any_bytes(sandboxes: bytes, containers: bytes) -> None:
    """Claim: any bytes are pods or a ValueError."""
    try:
        found = cri.read(sandboxes, containers)
    except ValueError:
        found = []
    assert all(isinstance(pod, Pod) for pod in found)


def _hang_up(sock: socket.socket) -> None:
    sock.close()


def _say(data: bytes) -> Callable[[socket.socket], None]:
    def say(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(data)

    return say


def _wait(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        (_hang_up, "cannot list pods at"),
        (_say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "cannot list pods at"),
        (_say(b"\xff" * 100), "cannot list pods at"),
        (_wait, "timed out"),
    ],
)
def test_sockets_that_fail(
    tmp_path: Path, behaviour: Callable[[socket.socket], None], cause: str
) -> None:
    """Claim: a runtime that is none, or does not answer, is one error in words, in bounded time."""
    path = tmp_path / "cri.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            near, _ = listener.accept()
            with near:
                behaviour(near)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UnderpassError, match=cause):
            cri.pods(path, timeout=0.3)
        thread.join()
    with pytest.raises(UnderpassError, match="Connection refused"):
        cri.pods(path)
