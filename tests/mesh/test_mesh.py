"""Real Envoy sidecars behind Istio's own iptables rules: all three legs take the shortcut."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.kernel.bed import inside, run
from tests.kernel.commands import underpass
from tests.mesh.conftest import Running
from tests.mesh.legs import BY_TCP, curl, h2load, load, steady, succeeded, url, wrong
from underpass.bench import envoy
from underpass.bench.envoy import Kind
from underpass.bench.mesh import Leg, Part
from underpass.errors import UnderpassError
from underpass.model import Counters
from underpass.torture.content import content
from underpass.torture.plans import MIB

KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
REQUESTS, LONG_REQUESTS = 3_000, 200_000


def _by_tcp(before: Counters, after: Counters) -> dict[str, int]:
    """How many messages went by TCP meanwhile, by reason."""
    grown = (
        (why, n - before.tcp_messages_total[why]) for why, n in after.tcp_messages_total.items()
    )
    return {why: n for why, n in grown if n}


@KINDS
def test_three_legs_take_the_shortcut(whole: Running, kind: Kind) -> None:
    """Claim: in steady state messages of every leg go by the shortcut, both ways."""
    with load(whole, kind):
        before, after = steady(whole, kind)
        counted = whole.plane.counters()
        again = steady(whole, kind)
        counted_again = whole.plane.counters()
    assert wrong(before, after, whole, kind) == []
    assert wrong(*again, whole, kind) == []
    carried = counted_again.shortcut_messages_total - counted.shortcut_messages_total
    by_tcp = sum(counted_again.tcp_messages_total.values()) - sum(
        counted.tcp_messages_total.values()
    )
    assert by_tcp <= BY_TCP * carried > 0, counted_again.tcp_messages_total
    if "reader-busy" not in _by_tcp(counted, counted_again):
        assert by_tcp == 0, counted_again.tcp_messages_total


@KINDS
def test_a_paused_mesh_is_told(whole: Running, kind: Kind) -> None:
    """Twin: the same judgement names every leg when `underpass pause` holds all on TCP."""
    with load(whole, kind):
        steady(whole, kind)
        underpass(whole.bed.pins, "pause").ok()
        try:
            told = wrong(*steady(whole, kind), whole, kind)
        finally:
            underpass(whole.bed.pins, "resume").ok()
    for leg in Leg:
        assert [line for line in told if line.startswith(f"{leg}: ") and "paused" in line], told


@KINDS
def test_bodies_are_right(whole: Running, scratch: Path, kind: Kind) -> None:
    """Claim: 1 MiB up and 1 MiB down arrive whole and right, three times under the stack each."""
    mesh, name = whole.mesh, f"body-{kind.name}"
    body = bytes(content(kind.value, 0, MIB))
    (scratch / "sent").write_bytes(body)
    first = whole.plane.counters()
    curl(mesh, kind, "-T", str(scratch / "sent"), url(mesh, kind, f"put/{name}"))
    stored = mesh.home / "put" / name
    assert hashlib.sha256(stored.read_bytes()).digest() == hashlib.sha256(body).digest()
    middle = whole.plane.counters()
    curl(mesh, kind, "-o", str(scratch / "got"), url(mesh, kind, f"put/{name}"))
    assert hashlib.sha256((scratch / "got").read_bytes()).digest() == hashlib.sha256(body).digest()
    for before, after in ((first, middle), (middle, whole.plane.counters())):
        carried = after.shortcut_bytes_total - before.shortcut_bytes_total
        why = _by_tcp(before, after)
        # a reader without processor for long, or a proof that it has not read when more follows
        least = (2 if {"reader-busy", "reproof"} & why.keys() else 3) * MIB
        assert carried >= least, f"{carried} bytes of three legs with {MIB} each; by TCP: {why}"


@pytest.mark.timeout(700)
@KINDS
def test_no_request_fails(whole: Running, long_run: bool, kind: Kind) -> None:
    """Claim: of many requests none fails, and no leg sends more than its first ones by TCP."""
    requests = LONG_REQUESTS if long_run else REQUESTS
    before = whole.plane.counters()
    said = whole.mesh.run(Part.CLIENT, h2load(kind, url(whole.mesh, kind), requests), 600)
    after = whole.plane.counters()
    assert succeeded(said) == (requests, 0)
    pairs = after.pairs_total - before.pairs_total
    by_tcp = sum(after.tcp_messages_total.values()) - sum(before.tcp_messages_total.values())
    assert pairs > 0
    proofs = after.tcp_messages_total["reproof"] - before.tcp_messages_total["reproof"]
    # a busy machine finds more than one of them unread, and those behind a proof, too
    most = requests // 10 if "reader-busy" in _by_tcp(before, after) else 4 * pairs + 3 * proofs
    assert by_tcp <= most, (pairs, _by_tcp(before, after))
    if kind is not Kind.HTTP2:  # which joins messages of several requests
        carried = after.shortcut_messages_total - before.shortcut_messages_total
        assert carried + by_tcp >= 2 * len(Leg) * requests


def test_istio_s_rules_lead_the_way(whole: Running) -> None:
    """Claim: requests meet the rules that lead to either Envoy and from the second to its app."""
    met = {
        whole.mesh.client.netns: "-j REDIRECT --to-ports 15001",
        whole.mesh.server.netns: "-j REDIRECT --to-ports 15006",
    }

    def packets() -> list[int]:
        passed = "-A ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN"
        return [
            *(hits(namespace, rule) for namespace, rule in met.items()),
            hits(whole.mesh.server.netns, passed),
        ]

    before = packets()
    words = ["-H", "Connection: close", url(whole.mesh, Kind.TCP)]
    assert "under the stack" in curl(whole.mesh, Kind.TCP, *words)
    assert all(after > old for after, old in zip(packets(), before, strict=True))


def hits(namespace: str, rule: str) -> int:
    """Packets (of nat's tables: connections) that met the one rule with these words."""
    (line,) = (x for x in run(*inside(namespace), "iptables-save", "-c").splitlines() if rule in x)
    return int(line.partition(":")[0].removeprefix("["))


def test_mutual_tls_is_demanded(whole: Running) -> None:
    """Twin: who goes round the client's Envoy, and so has no certificate, is not answered."""
    where = url(whole.mesh, Kind.MTLS)
    as_sidecar = ["setpriv", f"--reuid={envoy.UID}", f"--regid={envoy.UID}", "--clear-groups"]
    for scheme in (where, where.replace("http:", "https:")):
        words = [*as_sidecar, "curl", "-sSk", "--max-time", "10", scheme]
        with pytest.raises(UnderpassError, match="curl: "):
            whole.mesh.run(Part.CLIENT, words, 20)
    assert "under the stack" in curl(whole.mesh, Kind.MTLS, where)
