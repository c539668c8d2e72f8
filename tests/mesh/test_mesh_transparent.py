"""Istio's TPROXY mode: nothing is rewritten on the way in, the app sees its client's address."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.bed import inside, run
from tests.mesh import legs
from tests.mesh.conftest import Running, running
from tests.mesh.legs import Pair, curl, load, steady, url, wrong
from underpass.bench import envoy
from underpass.bench.envoy import Kind
from underpass.bench.mesh import Leg, Mesh, Part
from underpass.torture.content import content
from underpass.torture.plans import MIB

MARK, TABLE = 1337, 133
_TO_PROXY = f"--tproxy-mark {MARK}/0xffffffff --on-port {envoy.INBOUND}"
_OWN = f"-p tcp -m mark --mark {MARK}"
_TO_SELF = "! -d 127.0.0.1/32 -p tcp -o lo -m owner --{}-owner 1337 -j MARK --set-mark 1338"
_MANGLE = f"""*mangle
-N ISTIO_DIVERT
-N ISTIO_TPROXY
-N ISTIO_INBOUND
-A ISTIO_DIVERT -j MARK --set-mark {MARK}
-A ISTIO_DIVERT -j ACCEPT
-A ISTIO_TPROXY ! -d 127.0.0.1/32 -p tcp -j TPROXY {_TO_PROXY}
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A PREROUTING {_OWN} -j CONNMARK --save-mark
-A OUTPUT -p tcp -o lo -m mark --mark {MARK} -j RETURN
-A OUTPUT {_TO_SELF.format("uid")}
-A OUTPUT {_TO_SELF.format("gid")}
-A OUTPUT -p tcp -m connmark --mark {MARK} -j CONNMARK --restore-mark
-A ISTIO_INBOUND {_OWN} -j RETURN
-A ISTIO_INBOUND -p tcp -s {envoy.PASSTHROUGH}/32 -i lo -j RETURN
-A ISTIO_INBOUND -p tcp -i lo -m mark ! --mark 1338 -j RETURN
-A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
-A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY
COMMIT
"""
"""What istio-init writes in this mode, instead of nat's chain for what comes in."""


def _transparent_config(mesh: Mesh) -> Path:
    """The server's Envoy: a transparent listener, and to its app from the client's own address."""
    config = json.loads((mesh.home / "server.json").read_text())
    resources = config["static_resources"]
    [inbound] = [each for each in resources["listeners"] if each["name"] == "inbound"]
    inbound["transparent"] = True
    kind = "type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc"
    source = {"name": "original_src", "typed_config": {"@type": kind, "mark": MARK}}
    inbound["listener_filters"].insert(1, source)
    for cluster in resources["clusters"]:
        way, port = cluster["name"].split("-")
        if way == "in":
            address = {"address": "127.0.0.1", "port_value": int(port)}
            endpoint = {"endpoint": {"address": {"socket_address": address}}}
            for key in ("lb_policy", "upstream_bind_config"):
                cluster.pop(key, None)
            cluster["type"] = "STATIC"
            ends = [{"lb_endpoints": [endpoint]}]
            cluster["load_assignment"] = {"cluster_name": cluster["name"], "endpoints": ends}
    path = mesh.home / "transparent.json"
    path.write_text(json.dumps(config))
    return path


def _make_transparent(mesh: Mesh) -> None:
    """Turn the server's pod from REDIRECT to TPROXY and start its Envoy anew."""
    netns = mesh.server.netns
    child = mesh._envoys.pop()
    child.kill()
    child.wait()
    rules = mesh.home / "mangle.rules"
    rules.write_text(_MANGLE)
    for command in (
        "iptables -t nat -D PREROUTING -p tcp -j ISTIO_INBOUND",
        f"iptables-restore --noflush {rules}",
        f"ip rule add fwmark {MARK} lookup {TABLE}",
        f"ip route add local default dev lo table {TABLE}",
    ):
        run(*inside(netns), *command.split())
    argv = [
        "setpriv", f"--reuid={envoy.UID}", f"--regid={envoy.UID}", "--clear-groups",
        "--inh-caps=+net_admin", "--ambient-caps=+net_admin",
        str(mesh._binary()), "--config-path", str(_transparent_config(mesh)),
        "--concurrency", "1", "--disable-hot-restart", "--log-level", "error",
    ]  # fmt: skip
    mesh._envoys.append(mesh.serve(Part.SERVER_ENVOY, argv, envoy.OUTBOUND, envoy.INBOUND))


def _leg_of(pair: Pair, mesh: Mesh, kind: Kind) -> Leg | None:
    """Which leg a pair is: nothing is rewritten, so two go to the app's own port."""
    ends = pair["client"]["netns"], pair["server"]["netns"], pair["server"]["port"]
    found = {
        (mesh.client.netns, mesh.client.netns, envoy.OUTBOUND): Leg.APP_ENVOY,
        (mesh.client.netns, mesh.server.netns, kind.value): Leg.ENVOY_ENVOY,
        (mesh.server.netns, mesh.server.netns, kind.value): Leg.ENVOY_APP,
    }.get(ends)
    if found is Leg.ENVOY_APP:
        assert pair["client"]["address"] == mesh.client.address, pair
    return found


@pytest.fixture(scope="module")
def transparent(clean_machine: None) -> Iterator[Running]:  # noqa: ARG001 - it needs root, too
    """A mesh whose server's pod is in TPROXY mode."""
    with running() as mesh:
        _make_transparent(mesh.mesh)
        yield mesh


@pytest.mark.parametrize("kind", [Kind.TCP, Kind.MTLS], ids=lambda kind: kind.name.lower())
def test_three_legs_take_the_shortcut_in_tproxy_mode(
    transparent: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Claim: in steady state every message of every leg goes by the shortcut; bodies are right.

    Envoy speaks to its app under the client's own address.
    """
    mesh, body = transparent.mesh, bytes(content(kind.value, 0, MIB))
    tmp_path.chmod(0o755)
    (tmp_path / "sent").write_bytes(body)
    where = url(mesh, kind, f"put/{kind.name}")
    curl(mesh, kind, "-T", str(tmp_path / "sent"), where)
    curl(mesh, kind, "-o", str(tmp_path / "got"), where)
    for copy in (tmp_path / "got", mesh.home / "put" / kind.name):
        assert hashlib.sha256(copy.read_bytes()).digest() == hashlib.sha256(body).digest()
    monkeypatch.setattr(legs, "leg_of", _leg_of)
    with load(transparent, kind):
        assert wrong(*steady(transparent, kind), transparent, kind) == []
