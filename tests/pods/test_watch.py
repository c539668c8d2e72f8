"""The watch against a server that fails in every way: names stay, and it catches up.

The server is a stand-in that plays faults at a test's word; `test_kubernetes.py` has the real one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.waiting import wait_until
from tests.pods import faults
from tests.pods.faults import EXPIRED, Answer, Server, event, listing, pod
from underpass import apiserver
from underpass.apiserver import Kind, Watch
from underpass.daemonset import Owner

PODS = Kind("/api/v1/pods", "spec.nodeName=node1", False)
ONE, TWO = pod("one", 1), pod("two", 2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that has one pod."""
    with faults.serving(tmp_path) as found:
        found.lists = [Answer([listing(5, ONE)])]
        yield found


@contextlib.contextmanager
def _watching(server: Server) -> Iterator[Watch]:
    watch = Watch(server.access, PODS, lambda: None, (0.01, 0.05))
    watch.start()
    try:
        yield watch
    finally:
        server.end.set()
        watch.close()
        assert not watch._thread.is_alive()


def _names(watch: Watch) -> list[str]:
    return sorted(one.metadata.name for one in watch.objects())


def _become(watch: Watch, *names: str) -> None:
    wait_until(lambda: _names(watch) == sorted(names), f"{names}, not {_names(watch)}")


def test_changes(server: Server) -> None:
    """Claim: pods come, change and go by events; bookmarks only move the version on."""
    changed = pod("one", 7, app="web")
    lines = [event("ADDED", TWO), event("MODIFIED", changed), event("DELETED", TWO)]
    lines.append(event("BOOKMARK", {"metadata": {"resourceVersion": "99"}}))
    server.watches = [Answer(lines), Answer(hold=True)]
    with _watching(server) as watch:
        wait_until(lambda: len(server.watched_from()) == 2, "a second watch")
        assert server.watched_from() == ["5", "99"]
        assert _names(watch) == ["one"]
        assert watch.objects()[0].metadata.labels == {"app": "web"}
        assert (watch.lists, watch.errors) == (1, 0)
        first = server.asked[0]
        assert first.query == {"resourceVersion": "0", "fieldSelector": "spec.nodeName=node1"}


@pytest.mark.parametrize("gone", [Answer([EXPIRED]), Answer(status=410)], ids=["event", "status"])
def test_expired(server: Server, gone: Answer) -> None:
    """Claim: a version that is too old means a new list, and is no error."""
    server.lists = [Answer([listing(5, ONE)]), Answer([listing(9, TWO)])]
    server.watches = [gone, Answer(hold=True)]
    with _watching(server) as watch:
        _become(watch, "two")
        wait_until(lambda: watch.watches >= 1 and watch.connected, "a watch")
        assert server.watched_from() == ["5", "9"]
        assert (watch.lists, watch.errors) == (2, 0)


def test_cut(server: Server) -> None:
    """Claim: after a cut it goes on from the last version, without a new list."""
    server.watches = [Answer([event("ADDED", TWO)], cut=True), Answer(hold=True)]
    with _watching(server) as watch:
        _become(watch, "one", "two")
        wait_until(lambda: len(server.watched_from()) == 2, "a second watch")
        assert server.watched_from() == ["5", "2"]
        assert watch.lists == 1
        assert watch.errors == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"what\n",
        b"{}\n",
        b'{"type": "ADDED", "object": 1}\n',
        b'{"type": "ADDED", "object": {"metadata": {"name": 5}}}\n',
        b'{"type": "ODD", "object": {}}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        event("ERROR", {"code": 500, "message": "etcd"}),
    ],
)
def test_garbage(server: Server, garbage: bytes) -> None:
    """Claim: what cannot be understood is counted, names stay, and all is listed anew."""
    server.lists = [Answer([listing(5, ONE)]), Answer([listing(9, ONE, TWO)])]
    server.watches = [Answer([garbage]), Answer(hold=True)]
    with _watching(server) as watch:
        _become(watch, "one", "two")
        assert watch.errors == 1
        assert watch.last_error


def test_an_event_without_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: an event that does not end is refused at its bound, and so is such a list."""
    monkeypatch.setattr(apiserver, "_MOST_EVENT", 1 << 16)
    monkeypatch.setattr(apiserver, "_MOST_LIST", 1 << 16)
    server.watches = [Answer([b"x" * (1 << 17)], hold=True), Answer(hold=True)]
    server.lists = [
        Answer([listing(5, ONE)]),
        Answer([b" " * (1 << 17)]),
        Answer([listing(9, TWO)]),
    ]
    with _watching(server) as watch:
        _become(watch, "two")
        assert watch.errors == 2


def test_silence(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a connection that says nothing for too long is given up, and made anew."""
    monkeypatch.setattr(apiserver, "_SILENCE", 0.2)
    server.watches = [Answer(hold=True), Answer([event("ADDED", TWO)], hold=True)]
    with _watching(server) as watch:
        _become(watch, "one", "two")
        assert watch.errors >= 1
        assert watch.lists == 1


def test_waits_grow(server: Server) -> None:
    """Claim: tries that fail come at longer and longer intervals, up to a bound, and then anew."""
    server.lists = [*[Answer([b'{"message": "no"}'], status=503)] * 12, Answer([listing(5, ONE)])]
    server.watches = [Answer([event("ADDED", TWO)]), Answer(status=500)]
    watch = Watch(server.access, PODS, lambda: None, (1.0, 60.0))
    waits: list[float] = []
    watch._stop = faults.Spied(waits)
    watch.start()
    wait_until(lambda: len(waits) >= 16, "sixteen waits")
    server.end.set()
    watch.close()
    for number, seconds in enumerate(waits[:12]):
        longest = min(2.0**number, 60.0)
        assert longest / 2 <= seconds <= longest
    assert waits[12] == 1.0  # a watch that ends at once is no error, and not begun again at once
    assert waits[13] <= 1.0
    assert "503" in watch.last_error or "500" in watch.last_error
    assert {one.metadata.name for one in watch.objects()} == {"one", "two"}


def test_the_token_is_read_anew(server: Server) -> None:
    """Claim: each connection carries the token that the file has by then."""
    server.watches = [Answer()]
    assert server.access.token
    with _watching(server):
        wait_until(server.watched_from, "a first watch")
        server.access.token.write_text("second\n")
        wait_until(lambda: server.asked[-1].token == "second", "the new token")
    assert server.asked[0].token == "first"


def test_another_certificate(server: Server, tmp_path: Path) -> None:
    """Claim: a server with another certificate is asked nothing."""
    other = tmp_path / "other"
    other.mkdir()
    with faults.serving(other) as stranger, _watching(stranger) as watch:
        wait_until(lambda: watch.synced, "the right one is asked")
    fooled = server.access.__class__(
        "127.0.0.1", server.access.port, server.access.token, stranger.access.authority, "node1"
    )
    watch = Watch(fooled, PODS, lambda: None, (0.01, 0.05))
    watch.start()
    wait_until(lambda: watch.errors >= 3, "three refusals")
    watch.close()
    assert "certificate verify failed" in watch.last_error
    assert server.asked == []


def test_the_owner_is_asked_for_by_the_same_client(server: Server, tmp_path: Path) -> None:
    """Claim: the agent's DaemonSet is asked for with the token of the moment, until it is told."""
    there = Answer([b'{"metadata": {}, "spec": {"template": {"spec": {}}}}'])
    trouble, gone = Answer([b"{}"], status=503), Answer([b"{}"], status=404)
    server.lists = [there, there, trouble, there, there, gone, there]
    owner = Owner("ours/agent", server.access)
    assert owner.look()
    assert server.access.token
    server.access.token.write_text("second\n")
    verdict = owner.verdict()
    assert (verdict.going, verdict.why) == (True, "the DaemonSet has been deleted")
    of_it = "/apis/apps/v1/namespaces/ours/daemonsets/agent"
    round_ = ["/api/v1/namespaces/ours", of_it, "/api/v1/nodes/node1"]
    assert [asked.path for asked in server.asked] == [of_it, *round_, *round_]
    assert [asked.token for asked in server.asked] == ["first", *["second"] * 6]
    server.lists = [Answer([b"{"])]
    assert not Owner("ours/agent", server.access).look()
    before = len(server.asked)
    other = tmp_path / "other"
    other.mkdir()
    with faults.serving(other) as stranger:
        fooled = replace(server.access, authority=stranger.access.authority)
    assert not Owner("ours/agent", fooled).look()
    assert len(server.asked) == before


@pytest.mark.parametrize("when", ["watching", "waiting"])
def test_close(server: Server, when: str) -> None:
    """Claim: told to end, it ends, whatever it does at that moment."""
    if when == "waiting":
        server.lists = [Answer(status=500)]
    waits = (1000.0, 1000.0)
    watch = Watch(server.access, PODS, lambda: None, waits)
    watch.start()
    wait_until(lambda: watch.errors if when == "waiting" else watch.connected, "it is at work")
    watch.close()
    assert not watch._thread.is_alive()
