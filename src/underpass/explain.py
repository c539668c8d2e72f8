"""Why traffic between two addresses does or does not take the shortcut. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from dataclasses import dataclass

from underpass.errors import Usage
from underpass.model import Pair, Reason, Socket

#: What a socket's own reason means before it has any.
_SILENT = (Reason.SHORTCUT, Reason.NO_MESSAGE, Reason.UNPAIRED)


@dataclass(frozen=True)
class Target:
    """An address, and a port if one was named."""

    address: str
    port: int | None

    def matches(self, address: str, port: int) -> bool:
        """Is this the address (and port, if one was named)?"""
        return self.address == address and self.port in (None, port)

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return host if self.port is None else f"{host}:{self.port}"


@dataclass(frozen=True)
class Finding:
    """One connection, or the outlook for one: ``path`` is ``shortcut``, ``tcp`` or ``none``."""

    subject: str
    path: str
    reason: str
    sentence: str
    next_step: str


def parse(text: str) -> Target:
    """``ADDRESS``, ``ADDRESS:PORT`` or ``[IPV6]:PORT``.

    Raises:
        Usage: it is none of these.
    """
    host, port = text, ""
    if text.startswith("["):
        host, end, port = text[1:].partition("]")
        if not end or port[:1] not in ("", ":"):
            host = text  # no address either
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        host, port = text.split(":")
    try:
        address = ipaddress.ip_address(host)
        if isinstance(address, ipaddress.IPv6Address):  # sockets are listed without the scope
            address = address.ipv4_mapped or ipaddress.IPv6Address(address.packed)
        if port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
            raise ValueError("a port is a number from 1 to 65535")
        number = int(port) if port else None
    except ValueError as error:
        step = "write ADDRESS, ADDRESS:PORT or [IPV6]:PORT"
        raise Usage("understand", repr(text), str(error), step) from None
    return Target(str(address), number)


def explain(
    client: Target, server: Target, state: str, pairs: list[Pair], sockets: list[Socket]
) -> list[Finding]:
    """Findings for every open connection from ``client`` to ``server``; else the outlook.

    Args:
        client: the connecting side, as its own socket sees it.
        server: where it connects to: the server's own address or a service address.
        state: ``absent``, ``active``, ``paused`` or ``draining``.
        pairs: open pairs.
        sockets: every TCP socket of the node's network namespaces.
    """
    accepting = {(s.endpoint.netns, s.endpoint.port) for s in sockets if s.listening}
    ours = [
        s
        for s in sockets
        if not s.listening
        and (s.endpoint.netns, s.endpoint.port) not in accepting
        and client.matches(s.endpoint.address, s.endpoint.port)
        and server.matches(s.remote_address, s.remote_port)
    ]
    facing = defaultdict(list)
    for sock in sockets:
        if not sock.listening:
            facing[sock.remote_address, sock.remote_port].append(sock)
    known = {(p.client.netns, p.client.address, p.client.port): p for p in pairs}
    findings = []
    for sock in ours:
        subject = f"{sock.endpoint} -> {Target(sock.remote_address, sock.remote_port)}"
        pair = known.get((sock.endpoint.netns, sock.endpoint.address, sock.endpoint.port))
        if pair and sock.in_map:
            findings += _of_pair(subject, pair)
        else:
            findings.append(_unpaired(subject, sock, state, facing))
    return findings or [_outlook(client, server, state, sockets)]


def _of_pair(subject: str, pair: Pair) -> list[Finding]:
    findings = []
    for title, direction in (
        ("client to server", pair.client_to_server),
        ("server to client", pair.server_to_client),
    ):
        reason = next(r for r in Reason if r.word == direction.reason)
        went = (
            f"{direction.shortcut_messages} messages by the shortcut, "
            f"{direction.tcp_messages} by TCP"
        )
        sentence = f"{title}: {reason.meaning} ({went})."
        findings.append(Finding(subject, direction.path, reason.word, sentence, _step(reason)))
    return findings


def _step(reason: Reason) -> str:
    steps = {
        Reason.PAUSED: "run `underpass resume`",
        Reason.DRAINING: "run `underpass down` to finish, or `underpass up` to go on",
        Reason.NODE_MEMORY: "see net.ipv4.tcp_mem",
        Reason.NODE_BUDGET: "raise node_budget_bytes",
    }
    return steps.get(reason, "nothing to do")


_REFUSED_STEPS = {
    Reason.OBSERVED: "reconnect once `underpass guard list` says admitted",
    Reason.GUARDED: "see `underpass guard list`; `underpass guard allow` overrules it",
}


def _unpaired(
    subject: str, sock: Socket, state: str, facing: dict[tuple[str, int], list[Socket]]
) -> Finding:
    """Why it is in no pair; ``facing`` are the connected sockets by their remote end."""

    def tcp(reason: str, sentence: str, step: str) -> Finding:
        return Finding(subject, "tcp", reason, sentence, step)

    if state == "absent":
        return tcp("absent", "underpass is not up, everything takes TCP.", "run `underpass up`")
    if not sock.covered:
        sentence = "The client's process is outside the cgroup that underpass is attached to."
        return tcp(
            "outside-cgroup",
            sentence,
            "run `underpass down`, then `underpass up --cgroup PATH` for one that holds it",
        )
    if sock.reason not in _SILENT:
        word, meaning = sock.reason.word, sock.reason.meaning
        sentence = f"It is not in the map: {meaning}."
        return tcp(word, sentence, _REFUSED_STEPS.get(sock.reason, "reconnect to try again"))
    others = [
        s
        for s in facing.get((sock.endpoint.address, sock.endpoint.port), ())
        if s.endpoint.port != sock.endpoint.port
    ]
    if not others:
        sentence = (
            "No socket of this node is its other end: the server is on another node "
            "(or the client's address is rewritten on the way and the pair was not proven)."
        )
        return tcp(Reason.NOT_LOCAL.word, sentence, "nothing to do: it is plain TCP, untouched")
    if not any(s.covered for s in others):
        sentence = "The server's process is outside the cgroup that underpass is attached to."
        return tcp(
            "outside-cgroup",
            sentence,
            "run `underpass down`, then `underpass up --cgroup PATH` for one that holds it",
        )
    sentence = "Both ends are here, but the connection was opened before underpass was up."
    return tcp("opened-before-up", sentence, "reconnect: restart the client or its pool")


def _outlook(client: Target, server: Target, state: str, sockets: list[Socket]) -> Finding:
    subject = f"{client} -> {server}"

    def none(reason: str, sentence: str, step: str) -> Finding:
        return Finding(subject, "none", reason, f"No such connection is open. {sentence}", step)

    if state == "absent":
        return none("absent", "underpass is not up, all would take TCP.", "run `underpass up`")
    listeners = [
        s
        for s in sockets
        if s.listening
        and s.endpoint.address in (server.address, "0.0.0.0", "::")
        and server.port in (None, s.endpoint.port)
    ]
    if not listeners:
        sentence = (
            f"No socket of this node listens on {server}: a new one would be off-node TCP, "
            "unless it is a service address that is rewritten on the way."
        )
        return none(Reason.NOT_LOCAL.word, sentence, "check the address and port")
    if not any(s.covered for s in listeners):
        sentence = "The listener's process is outside the cgroup that underpass is attached to."
        return none(
            "outside-cgroup",
            sentence,
            "run `underpass down`, then `underpass up --cgroup PATH` for one that holds it",
        )
    if state != "active":
        return none(state, f"underpass is {state}: it would take TCP.", "run `underpass resume`")
    sentence = "A listener of this node is ready: a new connection would take the shortcut."
    if not any(s.armed for s in listeners):
        sentence += (
            " The listener stood before and could not be armed: one that it answers with a "
            "SYN cookie, as under a flood, would take TCP until its program is restarted."
        )
    return none("ready", sentence, "connect, then ask again")
