"""From the records that iterators write to the model. Pure."""

from __future__ import annotations

from underpass import abi
from underpass.model import (
    REASONS,
    REFUSALS,
    TCP_REASONS,
    Counters,
    Direction,
    Endpoint,
    Pair,
    Reason,
    Socket,
)


def counters(total: abi.Counters) -> Counters:
    """Totals, by the words of their reasons."""
    return Counters(
        pairs_total=total.connections[Reason.SHORTCUT],
        shortcut_messages_total=total.messages[Reason.SHORTCUT],
        shortcut_bytes_total=total.shortcut_bytes,
        tcp_messages_total={r.word: total.messages[r] for r in TCP_REASONS},
        refused_total={r.word: total.connections[r] for r in REFUSALS},
    )


def matched(endpoints: list[abi.Record]) -> list[tuple[abi.Record, abi.Record]]:
    """(client, server) of every pair with both ends in the map; the server knows its client."""
    clients = {r.cookie: r for r in endpoints if r.role == abi.CLIENT}
    return [(clients[r.peer], r) for r in endpoints if r.role == abi.SERVER and r.peer in clients]


def pair(client: abi.Record, server: abi.Record, names: dict[int, str]) -> Pair:
    """Two records that :func:`matched` put together."""
    return Pair(
        client=endpoint(client, names),
        server=endpoint(server, names),
        client_to_server=_direction(client),
        server_to_client=_direction(server),
        unread=client.unread + server.unread,
    )


def endpoint(record: abi.Record, names: dict[int, str]) -> Endpoint:
    """The socket itself; ``names`` gives the names of namespaces by inode."""
    netns = names.get(record.netns) or f"net:[{record.netns}]"
    return Endpoint(abi.address(record.local_ip), record.local_port, netns)


def _reason(record: abi.Record) -> Reason:
    known = record.reason < len(REASONS)
    return REASONS[record.reason] if known else Reason.NO_STATE


def _direction(record: abi.Record) -> Direction:
    reason = _reason(record)
    return Direction(
        path="shortcut" if reason is Reason.SHORTCUT else "tcp",
        reason=reason.word,
        shortcut_bytes=record.shortcut_bytes,
        shortcut_messages=record.shortcut_messages,
        tcp_messages=record.tcp_messages,
    )


def socket_of(record: abi.Record, names: dict[int, str], held: set[int]) -> Socket:
    """A socket for `explain`; ``held`` are the cookies in the map."""
    return Socket(
        endpoint=endpoint(record, names),
        remote_address=abi.address(record.remote_ip),
        remote_port=record.remote_port,
        listening=record.state == abi.TCP_LISTEN,
        in_map=record.cookie in held and record.cookie != 0,
        covered=bool(record.covered),
        armed=bool(record.armed),
        role=record.role,
        reason=_reason(record),
        cookie=record.cookie,
        peer=record.peer,
        program=record.program,
    )
