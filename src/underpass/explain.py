"""Why traffic between two addresses does or does not take the shortcut. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from underpass import policy
from underpass.errors import Usage
from underpass.model import REFUSALS, Pair, Program, Reason, Socket, many
from underpass.pod import Pod
from underpass.policy import Policy

#: Reasons that only say that the other end has one.
_SECOND_HAND = (Reason.PEER_GONE, Reason.PEER_REFUSED)
#: Reasons that one of the two programs has given, and verdicts that give none.
_OF_PROGRAMS = (Reason.OBSERVED.word, Reason.GUARDED.word, Reason.MARKED.word)
_WELCOME = ("admitted", "allowed")
_POLICY_STEP = "see `underpass policy show`"
_AGAIN = "run `underpass adopt`, or reconnect"
#: Reasons that hold whatever a policy says.
_BEFORE_POLICY = ("absent", "outside-cgroup", Reason.NOT_LOCAL.word)
_OUTSIDE_STEP = "run `underpass down`, then `underpass up --cgroup PATH` for one that holds it"

_Cause = tuple[str, str, str]  # reason, sentence, next step


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
    """One connection, or the outlook for one: ``path`` is ``shortcut``, ``tcp`` or ``none``.

    ``programs`` are those for whose sake it takes TCP.
    """

    subject: str
    path: str
    reason: str
    sentence: str
    next_step: str
    programs: tuple[Program, ...] = ()


def check(client: Target, server: Target) -> None:
    """Can there be a connection between the two?

    Raises:
        Usage: they are of different families.
    """
    if (":" in client.address) != (":" in server.address):
        cause, step = "one is IPv4, the other IPv6", "name two addresses of one family"
        raise Usage("explain", f"{client} -> {server}", cause, step)


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


@dataclass(frozen=True)
class View:
    """What there is to explain from.

    Attributes:
        state: ``absent``, ``active``, ``paused`` or ``draining``.
        pairs: open pairs.
        sockets: every TCP socket of the node's network namespaces.
        programs: what the guard knows, by their keys.
        rules: the policy in force, if it is known.
        policed: a policy is in force, whether or not its rules are known.
        pods: by the network namespaces that they have to themselves, as endpoints name them.
    """

    state: str
    pairs: list[Pair]
    sockets: list[Socket]
    programs: Mapping[int, Program]
    rules: Policy | None = None
    pods: Mapping[str, Pod] = field(default_factory=dict)
    policed: bool = False


def merged(listings: list[list[Socket]]) -> list[Socket]:
    """The sockets that the generations list, each with what the one that took it in knows of it.

    Args:
        listings: of each generation, the one in charge first.
    """
    places = [{_place(s): s for s in listing} for listing in listings[1:]]
    found = []
    for sock in listings[0] if listings else []:
        others = [place[_place(sock)] for place in places if _place(sock) in place]
        knows = max((sock, *others), key=_knowledge)
        if sock.listening or (knows.cookie and sock.cookie and knows.cookie != sock.cookie):
            knows = sock  # a listener is the present one's; another cookie is another socket
        found.append(
            replace(
                sock,
                role=knows.role,
                reason=knows.reason,
                cookie=knows.cookie,
                peer=knows.peer,
                program=knows.program,
            )
        )
    return found


def _place(sock: Socket) -> tuple[object, ...]:
    return sock.endpoint, sock.remote_address, sock.remote_port, sock.listening


def _knowledge(sock: Socket) -> tuple[bool, ...]:
    return sock.role != 0, sock.reason is not Reason.SHORTCUT, sock.program != 0


class _Ends:
    """Finds the socket at the other end of a connection."""

    def __init__(self, sockets: list[Socket]) -> None:
        connected = [s for s in sockets if not s.listening]
        self._of_cookie = {s.cookie: s for s in connected if s.cookie}
        self._of_peer = {s.peer: s for s in connected if s.peer}
        self._facing = defaultdict(list)
        for sock in connected:
            self._facing[sock.remote_address, sock.remote_port].append(sock)

    def of(self, sock: Socket) -> list[Socket]:
        """One if it is known for sure, else all that may be it."""
        peer = self._of_cookie.get(sock.peer) or (sock.cookie and self._of_peer.get(sock.cookie))
        if peer:
            return [peer]
        facing = self._facing[sock.endpoint.address, sock.endpoint.port]
        return [s for s in facing if s.endpoint.port != sock.endpoint.port]

    def is_at(self, sock: Socket, place: Target) -> bool:
        """Is its other end, behind a service's address, surely there?"""
        others = self.of(sock)
        at = others[0].endpoint if len(others) == 1 else None
        return at is not None and place.matches(at.address, at.port)


def explain(client: Target, server: Target, view: View) -> list[Finding]:
    """Findings for every open connection from ``client`` to ``server``; else the outlook.

    Args:
        client: the connecting side, as its own socket sees it.
        server: where it connects to: the server's own address or a service address.
        view: what the kernel and the guard tell.
    """
    accepting = {(s.endpoint.netns, s.endpoint.port) for s in view.sockets if s.listening}
    ends = _Ends(view.sockets)
    ours = [
        s
        for s in view.sockets
        if not s.listening
        and (s.endpoint.netns, s.endpoint.port) not in accepting
        and client.matches(s.endpoint.address, s.endpoint.port)
        and (server.matches(s.remote_address, s.remote_port) or ends.is_at(s, server))
    ]
    pairs = defaultdict(list)
    for open_pair in view.pairs:
        pairs[open_pair.client].append(open_pair)
    findings = []
    for sock in ours:
        others = ends.of(sock)
        subject = _subject(sock, others)
        pair = _pair_of(pairs[sock.endpoint], others)
        if pair and sock.in_map:
            found = _of_pair(subject, pair)
        else:
            found = [_unpaired(subject, sock, view.state, others)]
        found = [_with_programs(f, sock, others, view.programs) for f in found]
        findings += [_with_rule(f, sock, others, view) for f in found]
    return findings or [_outlook(client, server, view)]


def _subject(sock: Socket, others: list[Socket]) -> str:
    """A connection, with the pods at its ends."""
    near = sock.endpoint.pod
    far = others[0].endpoint.pod if len(others) == 1 else None
    client = f"{sock.endpoint} ({near})" if near else str(sock.endpoint)
    server = str(Target(sock.remote_address, sock.remote_port))
    return f"{client} -> {server} ({far})" if far else f"{client} -> {server}"


def _pair_of(from_here: list[Pair], others: list[Socket]) -> Pair | None:
    """Of the pairs from one address and port, which may go to many, that with this other end."""
    found = [pair for pair in from_here if any(pair.server == s.endpoint for s in others)]
    found = found or from_here
    return found[0] if found else None


def _of_pair(subject: str, pair: Pair) -> list[Finding]:
    findings = []
    for title, direction in (
        ("client to server", pair.client_to_server),
        ("server to client", pair.server_to_client),
    ):
        reason = next(r for r in Reason if r.word == direction.reason)
        went = (
            f"{many(direction.shortcut_messages, 'message')} by the shortcut, "
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
        Reason.CGROUP_MEMORY: "raise the memory limit of the reader's cgroup",
        Reason.NODE_BUDGET: "raise node_budget_bytes",
        Reason.POLICY: _POLICY_STEP,
    }
    return steps.get(reason, "nothing to do")


def _unpaired(subject: str, sock: Socket, state: str, others: list[Socket]) -> Finding:
    """Why it is in no pair; ``others`` may be its other end."""
    cause = (
        _outside(sock, state, others)
        or _refused(sock, others)
        or _left(sock, others)
        or _never_in(sock, others)
    )
    return Finding(subject, "tcp", *cause)


def _outside(sock: Socket, state: str, others: list[Socket]) -> _Cause | None:
    if state == "absent":
        return "absent", "underpass is not up, everything takes TCP.", "run `underpass up`"
    if sock.covered and (not others or any(s.covered for s in others)):
        return None
    end = "server" if sock.covered else "client"
    sentence = f"The {end}'s process is outside the cgroup that underpass is attached to."
    return "outside-cgroup", sentence, _OUTSIDE_STEP


def _refused(sock: Socket, others: list[Socket]) -> _Cause | None:
    """What one of the two ends says of itself."""
    own, other = _refusal(sock), _refusal(others[0]) if len(others) == 1 else None
    if own and (own not in _SECOND_HAND or not other):
        return own.word, f"It is not in the map: {own.meaning}.", _again(own)
    if other:
        return other.word, f"The server's end is not in the map: {other.meaning}.", _again(other)
    return None


def _again(reason: Reason) -> str:
    if reason is Reason.SMALL_STREAM:
        return "nothing to do; `underpass adopt` takes it back if it streams no more"
    if reason is Reason.POLICY:
        return f"{_POLICY_STEP}; once it is allowed, {_AGAIN}"
    return _AGAIN


def _refusal(sock: Socket) -> Reason | None:
    """Why it is not in the map, as far as it says; while it is there, its reason is a message's."""
    tells = sock.reason in REFUSALS or sock.reason is Reason.PEER_GONE
    return sock.reason if tells and not sock.in_map else None


def _left(sock: Socket, others: list[Socket]) -> _Cause | None:
    """It was in the map, and nobody says why it is in no pair now."""
    if not sock.role:
        return None
    if not others:
        return Reason.PEER_GONE.word, "It was proven; its other end has closed.", "nothing to do"
    sentence = (
        "It was proven, and left the map as its generation drained: by a `down` that did not "
        "finish, or to make room in an upgrade."
    )
    return "drained", sentence, _AGAIN


def _never_in(sock: Socket, others: list[Socket]) -> _Cause:
    if not others:
        sentence = (
            "No socket of this node is its other end: the server is on another node "
            "(or the client's address is rewritten on the way and the pair was not proven)."
        )
        return Reason.NOT_LOCAL.word, sentence, "nothing to do: it is plain TCP, untouched"
    if sock.program:
        sentence = (
            "Both ends are here, but the pair was not proven: its handshake was like another's, "
            "or was answered with a SYN cookie, or carried data, or an upgrade came in between."
        )
        return "not-proven", sentence, _AGAIN
    sentence = (
        "Both ends are here, but the connection was opened before underpass was up, "
        "or by a generation that has been replaced."
    )
    step = "run `underpass adopt`, which says why if it cannot; or restart the client or its pool"
    return "opened-before-up", sentence, step


def _with_programs(
    finding: Finding, sock: Socket, others: list[Socket], programs: Mapping[int, Program]
) -> Finding:
    """Names the programs that keep it on TCP; if they no longer do, how it is by now."""
    if finding.reason not in _OF_PROGRAMS:
        return finding
    ends = [("client", sock), *(("server", other) for other in others[:1])]
    known = [(end, programs[s.program]) for end, s in ends if s.program in programs]
    guilty = [(end, p) for end, p in known if p.verdict not in _WELCOME]
    named = "; ".join(_name(*one) for one in guilty or known)
    if not named:
        return finding
    named = named[0].upper() + named[1:] if guilty else f"By now {named}"
    step = _AGAIN
    for _, program in guilty:
        if program.verdict == "watched":
            step = "run `underpass adopt`, or reconnect, once `underpass guard list` says admitted"
            continue
        step = f"see `underpass guard list`; `underpass guard allow {program.id}` overrules it"
        break
    found = tuple(program for _, program in guilty)
    return replace(finding, sentence=f"{finding.sentence} {named}.", next_step=step, programs=found)


def _with_rule(finding: Finding, sock: Socket, others: list[Socket], view: View) -> Finding:
    """Names the end that the policy keeps on TCP now, and by which rule, whatever came before."""
    told = finding.reason == Reason.POLICY.word
    if not told and (sock.in_map or not others or finding.reason in _BEFORE_POLICY):
        return finding
    ends = [("client", sock, sock.remote_port)]
    ends += [("server", other, other.endpoint.port) for other in others[:1]]
    for name, end, port in ends:
        at = policy.End((), end.endpoint.address, end.remote_address, port)
        denial = _denial(view, name, view.pods.get(end.endpoint.netns), at)
        if not denial:
            continue
        if told:
            return replace(finding, sentence=f"{finding.sentence} {denial}.")
        later = "" if finding.next_step.startswith("nothing") else finding.next_step
        step = f"{_POLICY_STEP}; once it is allowed, {later}" if later else _POLICY_STEP
        sentence = f"{finding.sentence} By now the policy keeps it on TCP, too. {denial}."
        return replace(finding, sentence=sentence, next_step=step)
    return finding


def _denial(view: View, name: str, pod: Pod | None, at: policy.End) -> str | None:
    """How the policy in force keeps an end on TCP; empty: it does not; None: that is not known."""
    rules = view.rules
    if rules is None:
        return None if view.policed else ""
    if pod and not policy.usable(rules, pod):
        return f"The {name}'s pod {pod} waits until the labels of its namespace are known"
    rule = policy.first_match(rules, pod, pod.cgroup if pod else "", at)
    allowed = rule.allow if rule else rules.default_allow
    if not pod and len(policy.outcomes(rules, at, in_pod=bool(view.pods))) > 1:
        return None
    if allowed:
        return ""
    why = policy.describe(rule) if rule else f"mode {rules.mode.value}"
    if pod and rule and rule.mark:
        why = pod.mark_in_words(rules.namespace_marks)
    return f"The {name}'s {f'pod {pod}' if pod else 'end'} is denied by: {why}"


def _name(end: str, program: Program) -> str:
    why = program.reason
    if program.verdict == "watched":
        why = f"has run {program.observed_seconds:.0f} s"
    verdict = f"{program.verdict} ({why})" if why else program.verdict
    return f"the {end}'s program {program.name}, id {program.id}, is {verdict}"


def _outlook(client: Target, server: Target, view: View) -> Finding:
    none = partial(_none, f"{client} -> {server}")
    if view.state == "absent":
        return none("absent", "underpass is not up, all would take TCP.", "run `underpass up`")
    listeners = [
        s
        for s in view.sockets
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
        return none("outside-cgroup", sentence, _OUTSIDE_STEP)
    if view.state != "active":
        step = _step(Reason.PAUSED if view.state == "paused" else Reason.DRAINING)
        return none(view.state, f"underpass is {view.state}: it would take TCP.", step)
    here = _at(server.address, view)
    listeners = [s for s in listeners if s.endpoint.netns in here] or listeners
    return _new_one(client, server, listeners, view)


def _none(subject: str, reason: str, sentence: str, step: str) -> Finding:
    return Finding(subject, "none", reason, f"No such connection is open. {sentence}", step)


def _new_one(client: Target, server: Target, listeners: list[Socket], view: View) -> Finding:
    """What a new connection to ``listeners`` would take, by policy and guard."""
    none = partial(_none, f"{client} -> {server}")
    denials = _forecast(client, server, listeners, view)
    for denial in filter(None, denials.values()):
        sentence = f"A new one would take TCP, the policy keeps it there. {denial}."
        return none(Reason.POLICY.word, sentence, _POLICY_STEP)
    keys = {s.program for s in listeners}
    program = view.programs.get(*keys) if len(keys) == 1 else None
    if program and program.verdict not in _WELCOME:
        watched = program.verdict == "watched"
        reason = Reason.OBSERVED if watched else Reason.GUARDED
        sentence = f"A new one would take TCP: {_name('server', program)}."
        step = f"see `underpass guard list`; `underpass guard allow {program.id}` overrules it"
        step = "connect once `underpass guard list` says admitted" if watched else step
        return replace(none(reason.word, sentence, step), programs=(program,))
    whose = "the client's program is" if program else "the programs at both ends are"
    sentence = (
        "A listener of this node is ready: a new connection from this node would take the "
        f"shortcut, if {whose} admitted."
    )
    if program:
        named = _name("server", program)
        sentence += f" {named[0].upper()}{named[1:]}."
    if unknown := [name for name, denial in denials.items() if denial is None]:
        ends = " and ".join(f"the {name}'s end" for name in unknown)
        why = "which pod or cgroup that is in" if view.rules else "what its rules are"
        sentence += f" The policy was not asked for {ends}: it is not known {why}."
    if not any(s.armed for s in listeners):
        sentence += (
            " The listener stood before and could not be armed: one that it answers with a "
            "SYN cookie, as under a flood, would take TCP until its program is restarted."
        )
    return none("ready", sentence, "connect, then ask again")


def _at(address: str, view: View) -> set[str]:
    """The network namespaces that a socket shows to have this address."""
    return {s.endpoint.netns for s in view.sockets if s.endpoint.address == address}


def _forecast(
    client: Target, server: Target, listeners: list[Socket], view: View
) -> dict[str, str | None]:
    """What the policy would say of the two ends of a new connection; see :func:`_denial`."""
    ends = {
        "client": (_at(client.address, view), client.address, server.address),
        "server": ({s.endpoint.netns for s in listeners}, server.address, client.address),
    }
    found: dict[str, str | None] = {}
    for name, (places, local, remote) in ends.items():
        pod = view.pods.get(*places) if len(places) == 1 else None
        denials = {
            _denial(view, name, pod, policy.End((), local, remote, port))
            for port in {s.endpoint.port for s in listeners}
        }
        found[name] = denials.pop() if len(denials) == 1 else None
    return found
