"""Pods from the container runtime: two calls of CRI v1 over its socket.

gRPC is spoken by hand, over `h2`: `grpcio` and `protobuf` with the generated API cost 16 MiB of
resident memory and 22 MB on disk, `h2` 2 MiB and 1 MB, for two calls without arguments.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from underpass.errors import UnderpassError
from underpass.pod import Pod

_SERVICE = "/runtime.v1.RuntimeService/"
#: Bytes of an answer that are taken: a node's pods are far below.
_MOST = 32 << 20
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_OK = "0"
#: ``PodSandboxState``: a sandbox that does not run has no processes.
_NOT_READY = 1
_EXITED = 2


def pods(path: Path, timeout: float = 5.0) -> list[Pod]:
    """The pods whose sandbox runs, without what only the API server knows.

    Args:
        path: the runtime's socket.
        timeout: seconds for each call.

    Raises:
        UnderpassError: the runtime cannot be asked, or what it says cannot be understood.
    """
    try:
        sandboxes = call(path, "ListPodSandbox", timeout)
        containers = call(path, "ListContainers", timeout)
        return read(sandboxes, containers)
    except OSError as error:
        raise _failed(path, error.strerror or str(error)) from None
    except (h2.exceptions.H2Error, ValueError) as error:
        raise _failed(path, f"it answers what CRI v1 does not: {error}") from None


def _failed(path: Path, cause: str) -> UnderpassError:
    return UnderpassError("list pods at", path, cause, "see that the runtime runs and serves CRI")


def read(sandboxes: bytes, containers: bytes) -> list[Pod]:
    """Pods from the two answers. Pure.

    Raises:
        ValueError: they are no such messages.
    """
    names: dict[str, dict[str, str]] = {}
    for item in _messages(containers, 1):
        fields = _fields(item)
        if _number(fields, 6) != _EXITED:
            of = names.setdefault(_text(fields, 2), {})
            of[_text(fields, 1)] = _text(_fields(_last(fields, 3)), 1)
    found = []
    for item in _messages(sandboxes, 1):
        fields = _fields(item)
        if _number(fields, 3) == _NOT_READY:
            continue
        about = _fields(_last(fields, 2))
        found.append(
            Pod(
                namespace=_text(about, 3),
                name=_text(about, 1),
                uid=_text(about, 2),
                labels=_map(fields, 5),
                annotations=_map(fields, 6),
                containers=names.get(_text(fields, 1), {}),
            )
        )
    return found


# -- gRPC ------------------------------------------------------------------------------------


def call(path: Path, method: str, timeout: float) -> bytes:
    """One call with an empty request; the answer's message.

    Raises:
        OSError: the socket says so, or time is up.
        ValueError: the answer is an error or no answer.
        h2.exceptions.H2Error: it is no HTTP/2.
    """
    deadline = time.monotonic() + timeout
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=False))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(str(path))
        connection.initiate_connection()
        stream = connection.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", _SERVICE + method),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        connection.send_headers(stream, headers)
        connection.send_data(stream, bytes(5), end_stream=True)
        return _answer(sock, connection, deadline)


def _answer(sock: socket.socket, connection: h2.connection.H2Connection, deadline: float) -> bytes:
    body, status, said = b"", "", ""
    while True:
        sock.sendall(connection.data_to_send())
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        data = sock.recv(1 << 16)
        if not data:
            raise ValueError("it hung up")
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                body += event.data
                if len(body) > _MOST:
                    raise ValueError(f"more than {_MOST} bytes")
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                for name, value in event.headers:
                    status = value.decode() if name == b"grpc-status" else status
                    said = value.decode() if name == b"grpc-message" else said
            elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                raise ValueError("it reset the call")
            elif isinstance(event, h2.events.StreamEnded):
                return _message(body, status, said)


def _message(body: bytes, status: str, said: str) -> bytes:
    if status != _OK:
        raise ValueError(f"status {status or 'missing'} {said}".rstrip())
    if len(body) < 5 or body[0] or int.from_bytes(body[1:5]) != len(body) - 5:
        raise ValueError("not one message")
    return body[5:]


# -- protobuf --------------------------------------------------------------------------------

_Fields = dict[int, list[bytes | int]]


def _fields(data: bytes) -> _Fields:
    """Field number -> its values, of one message.

    Raises:
        ValueError: it is none.
    """
    found: _Fields = {}
    for number, value in _walk(data):
        found.setdefault(number, []).append(value)
    return found


def _walk(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _LEN:
            size, at = _varint(data, at)
        elif kind in (_I64, _I32):
            size = 8 if kind == _I64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field is cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is cut short")


def _messages(data: bytes, number: int) -> list[bytes]:
    return [v for n, v in _walk(data) if n == number and isinstance(v, bytes)]


def _last(fields: _Fields, number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    return value if isinstance(value, bytes) else b""


def _text(fields: _Fields, number: int) -> str:
    return _last(fields, number).decode()


def _number(fields: _Fields, number: int) -> int:
    value = fields.get(number, [0])[-1]
    return value if isinstance(value, int) else 0


def _map(fields: _Fields, number: int) -> dict[str, str]:
    entries = (_fields(v) for v in fields.get(number, []) if isinstance(v, bytes))
    return {_text(entry, 1): _text(entry, 2) for entry in entries}
