"""Sockets that are disconnected (AF_UNSPEC) and used again: nothing of the old connection stays."""

from __future__ import annotations

import contextlib

import pytest

from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import ROUND, Remote, connect, couple, exchange, listen
from underpass.dataplane import Dataplane

PORT, OTHER_PORT = 8080, 8081
_ROUNDS = 4
_OLD, _NEW = 1, 5
"""The first of the two streams of the old and of the new connection."""


def _couple_with_unread(
    bed: Bed, underpass: Dataplane, source: tuple[str, int] | None = None
) -> tuple[Remote, Remote]:
    """A pair whose client has not read what the server sent by the shortcut."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT), source)
    exchange(near, far, _OLD)
    before = underpass.counters().shortcut_bytes_total
    far.send(_OLD + 1, 1000)
    assert underpass.counters().shortcut_bytes_total - before == 1000
    return near, far


def test_unread_bytes_go_with_their_connection(bed: Bed, plane: MakePlane) -> None:
    """Claim: the first bytes after a reconnection are the new server's; it pairs and is carried."""
    underpass = plane()
    near, _ = _couple_with_unread(bed, underpass)
    listener = listen(bed.worker("server"), (SERVER4, OTHER_PORT))
    near.connect_again((SERVER4, OTHER_PORT))
    second = listener.accept()
    second.send(_NEW + 1, 1000)
    near.receive(_NEW + 1, 1000)
    before = underpass.counters().shortcut_bytes_total
    exchange(near, second, _NEW, _ROUNDS)
    counters = underpass.counters()
    assert counters.shortcut_bytes_total - before > _ROUNDS * ROUND
    assert counters.pairs_total == 2


@pytest.mark.parametrize("reset", ["arrives", "is lost"])
def test_the_old_server_reaches_nobody(bed: Bed, plane: MakePlane, reset: str) -> None:
    """Claim: what the old server sends on never reaches the socket, which has a new connection.

    When the RST is lost, the old server's socket still takes bytes and believes in its client.
    """
    underpass = plane()
    near, first = _couple_with_unread(bed, underpass)
    if reset == "is lost":
        drop = f"-p tcp --sport {near.names()[0][1]} --tcp-flags RST RST -j DROP"
        bed.within("client", "iptables", "-A", "OUTPUT", *drop.split())
    listener = listen(bed.worker("server"), (SERVER4, OTHER_PORT))
    near.connect_again((SERVER4, OTHER_PORT))
    second = listener.accept()
    for _ in range(_ROUNDS):
        refused = pytest.raises((ConnectionResetError, BrokenPipeError))
        with refused if reset == "arrives" else contextlib.nullcontext():
            first.send(_OLD + 1, 1000)
        exchange(near, second, _NEW, 1)
    assert underpass.counters().pairs_total == 2


def test_a_disconnected_socket_listens(bed: Bed, plane: MakePlane) -> None:
    """Claim: a client's socket that becomes a listener accepts connections, and they pair."""
    underpass = plane()
    mine = (CLIENT4, PORT)
    near, _ = _couple_with_unread(bed, underpass, mine)
    near.listen_again()
    server = bed.worker("server")
    for number in range(3):
        caller = connect(server, mine)
        exchange(caller, near.accept(), _NEW + 2 * number)
    counters = underpass.counters()
    assert counters.pairs_total == 4
