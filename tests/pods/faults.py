"""An API server that fails on purpose: what a real one cannot be made to do at a test's word.

It speaks TLS, lists and watches, and plays a script; tests of right behaviour use the real one.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.kernel.bed import run
from underpass.apiserver import Access


class Asked(NamedTuple):
    """A request: where, what for, and by whose token."""

    path: str
    query: dict[str, str]
    token: str

    @property
    def watches(self) -> bool:
        return "watch" in self.query


def pod(name: str, version: int, **labels: str) -> dict[str, Any]:
    """A pod as the API server tells of it."""
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"{abs(hash(name)) % 10**8:08d}-0000-4000-8000-000000000000",
            "resourceVersion": str(version),
            "labels": labels,
        },
        "spec": {"nodeName": "node1"},
    }


def listing(version: int, *pods: dict[str, Any]) -> bytes:
    """A list's answer."""
    return json.dumps({"metadata": {"resourceVersion": str(version)}, "items": pods}).encode()


def event(kind: str, thing: dict[str, Any]) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


EXPIRED = event("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})


@dataclass
class Answer:
    """What one request gets.

    Attributes:
        body: written in turn, each as a chunk.
        status: of HTTP.
        cut: the connection is cut in the middle of a chunk after that.
        hold: nothing comes after that until the test ends.
    """

    body: Sequence[bytes] = ()
    status: int = 200
    cut: bool = False
    hold: bool = False


@dataclass
class Server:
    """The server; `lists` and `watches` are answered in turn, the last one again and again."""

    access: Access
    lists: list[Answer] = field(default_factory=lambda: [Answer([listing(1)])])
    watches: list[Answer] = field(default_factory=lambda: [Answer(hold=True)])
    asked: list[Asked] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, asked: Asked) -> Answer:
        with self.lock:
            self.asked.append(asked)
            script = self.watches if asked.watches else self.lists
            return script.pop(0) if len(script) > 1 else script[0]

    def watched_from(self) -> list[str]:
        """The versions that were watched from, in turn."""
        return [asked.query["resourceVersion"] for asked in self.asked if asked.watches]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    play: Server

    def do_GET(self) -> None:
        split = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(split.query))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        answer = self.play.answer(Asked(split.path, query, token))
        with contextlib.suppress(OSError):
            self._give(answer)

    def _give(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in answer.body:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
        if answer.cut:
            self.wfile.write(b"100\r\n{")
            self.close_connection = True
            return
        if answer.hold:
            while not self.play.end.wait(0.05):
                pass
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_words: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """The server at a port of 127.0.0.1, with a certificate and a token of its own."""
    key, certificate, token = (directory / name for name in ("key", "crt", "token"))
    run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-keyout", key, "-out", certificate, "-days", "1", "-subj", "/CN=api",
        "-addext", "subjectAltName=IP:127.0.0.1",
    )  # fmt: skip
    token.write_text("first\n")

    class Handler(_Handler):
        pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    found = Server(Access("127.0.0.1", http.server_address[1], token, certificate, "node1"))
    Handler.play = found
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.end.set()
        http.shutdown()
        thread.join()
        http.server_close()


class Spied(threading.Event):
    """An event that notes how long it was to be waited for, and waits a little."""

    def __init__(self, waits: list[float]) -> None:
        super().__init__()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        """Note it."""
        self._waits.append(timeout or 0.0)
        return super().wait(0.005)
