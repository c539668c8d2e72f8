"""Servers in Python, one on asyncio and one with a thread each, echo what they get."""

from __future__ import annotations

import asyncio
import hashlib
import socketserver
import threading
from collections.abc import Callable

import pytest

from tests.apps.hasher import parts, sha256
from tests.apps.programs import STREAMS, Checked, Compare
from tests.kernel.bed import SERVER4, Bed
from underpass.torture.plans import KIB, MIB

PORT = 9000
_READ = 64 * KIB
_SIZES = [1, 700, *[100 * KIB] * 28, *[MIB] * 18, 30 * MIB, 30 * MIB]
"""Bytes of the 50 connections' streams."""
_TURNS = 100
_DEADLINE = 40.0


def _serve_threads() -> None:
    """In a worker: a thread for each connection."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(_READ):
                self.request.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        request_queue_size = 128

    threading.Thread(target=Server((SERVER4, PORT), Echo).serve_forever, daemon=True).start()


def _serve_asyncio() -> None:
    """In a worker: one thread, asyncio."""
    ready = threading.Event()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_READ):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(echo, SERVER4, PORT, backlog=128)
        ready.set()
        await server.serve_forever()

    threading.Thread(target=asyncio.run, args=[serve()], daemon=True).start()
    assert ready.wait(_DEADLINE)


@pytest.mark.parametrize("serve", [_serve_asyncio, _serve_threads], ids=["asyncio", "threads"])
def test_python_servers_echo_all(bed: Bed, compare: Compare, serve: Callable[[], None]) -> None:
    """Claim: 50 connections at once get every byte back, of requests and of long streams."""
    bed.worker("server").call(serve)
    compare(f"Python server, {serve.__name__.removeprefix('_serve_')}", _use_echo, floor=STREAMS)


def _use_echo() -> Checked:
    """In a worker: 50 connections at once, each with requests and then a stream of its own."""
    hashes = [sha256(stream, size) for stream, size in enumerate(_SIZES)]

    async def connection(stream: int, size: int) -> int:
        reader, writer = await asyncio.open_connection(SERVER4, PORT)
        for turn in range(_TURNS):
            request = bytes(*parts(stream, 1 + turn * 7))
            writer.write(request)
            assert await reader.readexactly(len(request)) == request
        receiving = asyncio.create_task(_hash(reader))
        for part in parts(stream, size):
            writer.write(part)
            await writer.drain()
        writer.write_eof()
        assert await receiving == hashes[stream], f"{size} bytes of stream {stream}"
        writer.close()
        await writer.wait_closed()
        return 2 * (size + sum(1 + turn * 7 for turn in range(_TURNS)))

    async def connections() -> int:
        streams = (connection(stream, size) for stream, size in enumerate(_SIZES))
        return sum(await asyncio.wait_for(asyncio.gather(*streams), _DEADLINE))

    checked = Checked()
    with checked.timed():
        checked.size = asyncio.run(connections())
    return checked


async def _hash(reader: asyncio.StreamReader) -> str:
    whole = hashlib.sha256()
    while data := await reader.read(_READ):
        whole.update(data)
    return whole.hexdigest()
