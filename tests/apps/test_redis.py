"""redis through the shortcut gives right answers: pipelines, pub/sub, large values."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest

from tests.apps.hasher import parts
from tests.apps.programs import STREAMS, Checked, Compare, find, serve
from tests.kernel.bed import SERVER4, Bed
from underpass.torture.content import content
from underpass.torture.plans import MIB

PORT = 6379
_SIZES = (1, 100, 5000, 70_000, 1_000_000)
_CHANNELS = ("red", "green", "blue")
_MESSAGES = 6000
_LARGE = 50 * MIB


@pytest.fixture
def redis(bed: Bed, tmp_path: Path) -> None:
    """A redis of the test's own."""
    program = find("redis-server", "redis-server")
    options = f"--port {PORT} --save --appendonly no --protected-mode no --dir {tmp_path}"
    serve(bed, "server", PORT, [program, *options.split(" ")], tmp_path / "redis.log")


@pytest.mark.usefixtures("redis")
def test_redis_answers_are_right(compare: Compare) -> None:
    """Claim: SET, GET, MGET return what was stored, by the shortcut."""
    compare("redis, single requests", _one_by_one)


@pytest.mark.usefixtures("redis")
def test_redis_pipelines_are_right(compare: Compare) -> None:
    """Claim: deep pipelines return every answer in its place, by the shortcut."""
    compare("redis, pipelined", _pipelined)


@pytest.mark.usefixtures("redis")
def test_redis_messages_come_in_order(compare: Compare) -> None:
    """Claim: every subscriber gets every published message of its channels, whole and in order."""
    compare("redis, pub/sub", _publish)


@pytest.mark.usefixtures("redis")
def test_redis_large_values_are_right(compare: Compare) -> None:
    """Claim: values larger than what may wait unread are stored and returned whole and right."""
    compare("redis, values of 50 MiB", _large_values, floor=STREAMS)


class _Redis:
    """A connection that speaks redis's protocol."""

    def __init__(self, sock: socket.socket, answers: BufferedReader) -> None:
        self._sock = sock
        self._answers = answers

    def send(self, *words: bytes) -> None:
        """Send a command."""
        self._sock.sendall(self.form(*words))

    def send_formed(self, commands: bytes) -> None:
        """Send what `form` made."""
        self._sock.sendall(commands)

    @staticmethod
    def form(*words: bytes) -> bytes:
        """A command as it travels."""
        parts = [b"*%d\r\n" % len(words)]
        parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
        return b"".join(parts)

    def answer(self) -> Any:
        """The next answer: bytes, an int or a list of them."""
        head = self._answers.readline()
        kind, rest = head[:1], head[1:-2]
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        if kind == b"$":
            return self._answers.read(int(rest) + 2)[:-2]
        assert kind in b"+:", head
        return int(rest) if kind == b":" else rest


@contextmanager
def _connected() -> Iterator[_Redis]:
    with (
        socket.create_connection((SERVER4, PORT), timeout=20) as sock,
        sock.makefile("rb") as answers,
    ):
        yield _Redis(sock, answers)


def _one_by_one() -> Checked:
    """In a worker: store and read values of every size."""
    values = {b"key-%d" % size: bytes(content(size, 0, size)) for size in _SIZES}
    checked = Checked(22 * sum(_SIZES))
    with _connected() as redis, checked.timed():
        for key, value in values.items():
            redis.send(b"SET", key, value)
            assert redis.answer() == b"OK"
        redis.send(b"MGET", *values)
        assert redis.answer() == list(values.values())
        for key in list(values) * 20:
            redis.send(b"GET", key)
            assert redis.answer() == values[key]
    return checked


def _pipelined() -> Checked:
    """In a worker: ask hundreds of things at once, of small and of middling values."""
    rounds, deep = 20, 500
    values = {b"%d" % number: bytes(content(number, 0, 2 + 40 * number)) for number in range(deep)}
    checked = Checked(2 * rounds * sum(map(len, values.values())))
    stores = b"".join(_Redis.form(b"SET", key, value) for key, value in values.items())
    asks = b"".join(_Redis.form(b"GET", key) for key in values)
    with _connected() as redis, checked.timed():
        for _ in range(rounds):
            redis.send_formed(stores)
            assert {redis.answer() for _ in range(deep)} == {b"OK"}
            redis.send_formed(asks)
            assert [redis.answer() for _ in range(deep)] == list(values.values())
    return checked


def _message(number: int) -> bytes:
    return b"%06d" % number + bytes(content(number, 0, number % 400))


def _publish() -> Checked:
    """In a worker: publish on three channels to four subscribers of one to three of them."""
    wanted = (_CHANNELS, _CHANNELS, _CHANNELS[:1], _CHANNELS[1:])
    sent = [(_CHANNELS[number % 3].encode(), _message(number)) for number in range(_MESSAGES)]
    checked = Checked()

    def listen(subscriber: _Redis, channels: tuple[str, ...]) -> int:
        names = [name.encode() for name in channels]
        messages = [[b"message", *message] for message in sent if message[0] in names]
        assert [subscriber.answer() for _ in messages] == messages
        return sum(len(message[-1]) for message in messages)

    with ExitStack() as opened:
        publisher, *subscribers = (opened.enter_context(_connected()) for _ in range(5))
        for subscriber, channels in zip(subscribers, wanted, strict=True):
            for number, channel in enumerate(channels, 1):
                subscriber.send(b"SUBSCRIBE", channel.encode())
                assert subscriber.answer() == [b"subscribe", channel.encode(), number]
        with ThreadPoolExecutor(4) as threads, checked.timed():
            pairs = zip(subscribers, wanted, strict=True)
            listening = [threads.submit(listen, *pair) for pair in pairs]
            for start in range(0, _MESSAGES, 100):
                batch = sent[start : start + 100]
                publisher.send_formed(b"".join(_Redis.form(b"PUBLISH", *it) for it in batch))
                assert all(publisher.answer() == 3 for _ in batch)
            checked.size = sum(done.result(30) for done in listening)
    return checked


def _large_values() -> Checked:
    """In a worker: store two values of 50 MiB and read them back."""
    checked = Checked(4 * _LARGE)
    values = {b"large-%d" % stream: b"".join(parts(stream, _LARGE)) for stream in (1, 2)}
    with _connected() as redis, checked.timed():
        for key, value in values.items():
            redis.send(b"SET", key, value)
            assert redis.answer() == b"OK"
        for key, value in values.items():
            redis.send(b"GET", key)
            assert redis.answer() == value, f"{key!r} is not what was stored"
    return checked
