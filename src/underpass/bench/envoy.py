"""What a sidecar is told: Istio's iptables rules and Envoy's configuration. Pure: text and data.

Every application port has a kind of its own, as ports have in Istio by their names: Envoy's two
listeners tell them by the original destination.
"""

from __future__ import annotations

import enum
from typing import Any

OUTBOUND, INBOUND = 15001, 15006
#: The user that a sidecar runs as; what it sends itself is not sent to it again.
UID = 1337
#: Where the inbound Envoy speaks to its application from.
PASSTHROUGH = "127.0.0.6"
#: Of the certificates, which name who may speak to whom.
IDENTITY = "spiffe://cluster.local/ns/default/sa/{}"

_TYPE = "type.googleapis.com/envoy."
_FILTERS = ("envoy.filters.http.fault", "envoy.filters.http.cors", "envoy.filters.http.router")
_FILTER_TYPES = {
    "envoy.filters.http.fault": "extensions.filters.http.fault.v3.HTTPFault",
    "envoy.filters.http.cors": "extensions.filters.http.cors.v3.Cors",
    "envoy.filters.http.router": "extensions.filters.http.router.v3.Router",
}


class Kind(enum.Enum):
    """What Envoy makes of a port's connections: its value is the application's port."""

    TCP = 8080
    HTTP = 8081
    HTTP2 = 8082
    MTLS = 8083

    @property
    def words(self) -> str:
        """For people."""
        return {
            Kind.TCP: "raw TCP",
            Kind.HTTP: "HTTP/1.1",
            Kind.HTTP2: "HTTP/2",
            Kind.MTLS: "HTTP/1.1 + mTLS",
        }[self]


def rules() -> str:
    """Input for iptables-restore: what istio-init writes, without its exceptions for DNS."""
    sidecar = f"-m owner --{{}}-owner {UID}"
    owned = []
    for kind in ("uid", "gid"):
        own, other = sidecar.format(kind), sidecar.format(kind).replace("--", "! --")
        hairpin = "! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 15008"
        owned += [
            f"-A ISTIO_OUTPUT {hairpin} {own} -j ISTIO_IN_REDIRECT",
            f"-A ISTIO_OUTPUT -o lo {other} -j RETURN",
            f"-A ISTIO_OUTPUT {own} -j RETURN",
        ]
    return "\n".join(
        [
            "*nat",
            *(f"-N ISTIO_{name}" for name in ("INBOUND", "IN_REDIRECT", "OUTPUT", "REDIRECT")),
            "-A PREROUTING -p tcp -j ISTIO_INBOUND",
            "-A OUTPUT -j ISTIO_OUTPUT",
            *(
                f"-A ISTIO_INBOUND -p tcp -m tcp --dport {port} -j RETURN"
                for port in (15008, 15090, 15021, 15020)
            ),
            "-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT",
            f"-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {INBOUND}",
            f"-A ISTIO_OUTPUT -s {PASSTHROUGH}/32 -o lo -j RETURN",
            *owned,
            "-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN",
            "-A ISTIO_OUTPUT -j ISTIO_REDIRECT",
            f"-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {OUTBOUND}",
            "COMMIT",
            "",
        ]
    )


def config(identity: str, peer: str, certificates: str) -> dict[str, Any]:
    """The configuration of the sidecar of ``identity``, which speaks to ``peer`` alone by mTLS.

    Args:
        identity: the last part of :data:`IDENTITY`.
        peer: the same of the other side.
        certificates: directory with ``ca.pem``, ``IDENTITY.pem`` and ``IDENTITY.key``.
    """
    tls = _tls_context(identity, peer, certificates)
    return {
        "node": {"id": identity, "cluster": identity},
        "static_resources": {
            "listeners": [_outbound(), _inbound(tls)],
            "clusters": [_cluster(kind, way, tls) for kind in Kind for way in ("out", "in")],
        },
    }


def _outbound() -> dict[str, Any]:
    return _listener("outbound", OUTBOUND, [_chain(kind, "out") for kind in Kind], ["original_dst"])


def _inbound(tls: dict[str, Any]) -> dict[str, Any]:
    chains = []
    for kind in Kind:
        chain = _chain(kind, "in")
        if kind is Kind.MTLS:
            chain["filter_chain_match"]["transport_protocol"] = "tls"
            chain["transport_socket"] = _transport(
                "DownstreamTlsContext",
                {"common_tls_context": tls, "require_client_certificate": True},
            )
        chains.append(chain)
    # Istio's permissive inbound listener looks at the first bytes to tell TLS from what is not.
    return _listener("inbound", INBOUND, chains, ["original_dst", "tls_inspector"])


def _listener(
    name: str, port: int, chains: list[dict[str, Any]], filters: list[str]
) -> dict[str, Any]:
    return {
        "name": name,
        "traffic_direction": name.upper(),
        "address": _address("0.0.0.0", port),
        "listener_filters": [
            {
                "name": f"envoy.filters.listener.{each}",
                "typed_config": _typed(f"extensions.filters.listener.{each}.v3.{_camel(each)}"),
            }
            for each in filters
        ],
        "filter_chains": chains,
    }


def _chain(kind: Kind, way: str) -> dict[str, Any]:
    name = f"{way}-{kind.value}"
    if kind is Kind.TCP:
        network = {
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": _typed(
                "extensions.filters.network.tcp_proxy.v3.TcpProxy", stat_prefix=name, cluster=name
            ),
        }
    else:
        network = {
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": _http(kind, name),
        }
    return {
        "name": name,
        "filter_chain_match": {"destination_port": kind.value},
        "filters": [network],
    }


def _http(kind: Kind, cluster: str) -> dict[str, Any]:
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}
    return _typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=cluster,
        codec_type="HTTP2" if kind is Kind.HTTP2 else "HTTP1",
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        http_filters=[
            {"name": name, "typed_config": _typed(_FILTER_TYPES[name])} for name in _FILTERS
        ],
    )


def _cluster(kind: Kind, way: str, tls: dict[str, Any]) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": f"{way}-{kind.value}",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
    }
    if way == "in":
        cluster["upstream_bind_config"] = {
            "source_address": {"address": PASSTHROUGH, "port_value": 0}
        }
    elif kind is Kind.MTLS:
        cluster["transport_socket"] = _transport("UpstreamTlsContext", {"common_tls_context": tls})
    if kind is Kind.HTTP2:
        name = "extensions.upstreams.http.v3.HttpProtocolOptions"
        cluster["typed_extension_protocol_options"] = {
            f"envoy.{name}": _typed(name, explicit_http_config={"http2_protocol_options": {}})
        }
    return cluster


def _transport(context: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": _typed(f"extensions.transport_sockets.tls.v3.{context}", **settings),
    }


def _tls_context(identity: str, peer: str, certificates: str) -> dict[str, Any]:
    def file(name: str) -> dict[str, str]:
        return {"filename": f"{certificates}/{name}"}

    return {
        "tls_certificates": [
            {
                "certificate_chain": file(f"{identity}.pem"),
                "private_key": file(f"{identity}.key"),
            }
        ],
        "validation_context": {
            "trusted_ca": file("ca.pem"),
            "match_typed_subject_alt_names": [
                {"san_type": "URI", "matcher": {"exact": IDENTITY.format(peer)}}
            ],
        },
    }


def _address(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def _typed(name: str, **settings: Any) -> dict[str, Any]:
    return {"@type": f"{_TYPE}{name}", **settings}


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))
