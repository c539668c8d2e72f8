"""redis through the shortcut gives right answers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from tests.apps.programs import find, serve
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from underpass.torture.content import content

PORT = 6379
_SIZES = (1, 100, 5000, 70_000, 1_000_000)


def test_redis_answers_are_right(bed: Bed, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: SET, GET, MGET and deep pipelines return what was stored, by the shortcut."""
    redis = find("redis-server", "redis-server")
    underpass = plane()
    options = f"--port {PORT} --save --appendonly no --protected-mode no --dir {tmp_path}"
    serve(bed, "server", PORT, [redis, *options.split(" ")], tmp_path / "redis.log")
    carried = underpass.counters().shortcut_bytes_total
    checked = bed.worker("client").call(_use_redis)
    assert underpass.counters().shortcut_bytes_total - carried > checked // 2


def _use_redis() -> int:
    """In a worker: store and read values of every size; the number of bytes that were checked."""
    with (
        socket.create_connection((SERVER4, PORT), timeout=20) as sock,
        sock.makefile("rb") as answers,
    ):
        values = {f"key-{size}": bytes(content(size, 0, size)) for size in _SIZES}
        for key, value in values.items():
            sock.sendall(_words(b"SET", key.encode(), value))
            assert answers.readline() == b"+OK\r\n"
        sock.sendall(_words(b"MGET", *(key.encode() for key in values)))
        assert answers.readline() == b"*%d\r\n" % len(values)
        for value in values.values():
            assert _bulk(answers.readline(), answers.read) == value
        for _ in range(20):
            sock.sendall(_words(b"GET", b"key-5000") * 500)
            for _ in range(500):
                assert _bulk(answers.readline(), answers.read) == values["key-5000"]
    return 2 * sum(_SIZES) + 20 * 500 * 5000


def _words(*words: bytes) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def _bulk(head: bytes, read: Callable[[int], bytes]) -> bytes:
    return read(int(head[1:]) + 2)[:-2]
