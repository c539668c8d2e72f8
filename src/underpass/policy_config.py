"""The table [policy] of the configuration, to rules. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from underpass import policy
from underpass.policy import Mode, Policy, Rule
from underpass.positions import Path

_Name = Annotated[str, Meta(min_length=1, max_length=253)]
_Values = str | Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]
_Labels = dict[_Name, _Values]
_SPAN = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class Wrong(Exception):
    """A value that cannot be used: where, and why."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(cause)
        self.path, self.cause = path, cause


_Action = Literal["allow", "deny"]
_Mode = Literal["default-on", "opt-out", "opt-in"]
#: Field -> the words that it may be.
CHOICES: dict[str, tuple[str, ...]] = {"action": get_args(_Action), "mode": get_args(_Mode)}


class RuleTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[[policy.rule]]``."""

    action: _Action
    name: Annotated[str, Meta(max_length=100)] = ""
    namespaces: tuple[_Name, ...] = ()
    namespace_labels: _Labels = {}  # msgspec copies it
    pod_labels: _Labels = {}
    annotations: _Labels = {}
    ports: tuple[int | str, ...] = ()
    cidrs: tuple[_Name, ...] = ()
    cgroups: tuple[Annotated[str, Meta(min_length=1, max_length=511)], ...] = ()


class PolicyTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[policy]``."""

    mode: _Mode = "default-on"
    namespace_marks: bool = True
    rule: Annotated[tuple[RuleTable, ...], Meta(max_length=policy.MOST_RULES)] = ()


def policy_of(table: PolicyTable) -> Policy:
    """The policy that a table describes.

    Raises:
        Wrong: a value is none that could be meant.
    """
    rules = tuple(_rule(number, rule) for number, rule in enumerate(table.rule))
    ports = {p for rule in rules for first, last in rule.ports for p in range(first, last + 1)}
    prefixes = {text for rule in rules for text in rule.cidrs}
    for what, count, most in (
        ("ports", len(ports), policy.MOST_PORTS),
        ("prefixes", len(prefixes), policy.MOST_CIDRS),
    ):
        if count > most:
            cause = f"the rules name {count} {what}, {most} is the most"
            raise Wrong(("policy", "rule"), cause)
    return Policy(Mode(table.mode), rules, table.namespace_marks)


def _rule(number: int, table: RuleTable) -> Rule:
    at: Path = ("policy", "rule", number)
    for place, name in enumerate(table.namespaces):
        if not _NAMESPACE.fullmatch(name):
            raise Wrong((*at, "namespaces", place), f"{name!r} is no name of a namespace")
    for field in ("namespaces", "ports", "cidrs", "cgroups"):
        values = getattr(table, field)
        if len(set(values)) < len(values):
            raise Wrong((*at, field), "it names something twice")
    return Rule(
        allow=table.action == "allow",
        name=table.name,
        namespaces=table.namespaces,
        namespace_labels=_labels(table.namespace_labels),
        pod_labels=_labels(table.pod_labels),
        annotations=_labels(table.annotations),
        ports=tuple(_ports(p, (*at, "ports", n)) for n, p in enumerate(table.ports)),
        cidrs=tuple(_cidr(c, (*at, "cidrs", n)) for n, c in enumerate(table.cidrs)),
        cgroups=tuple(_cgroup(c, (*at, "cgroups", n)) for n, c in enumerate(table.cgroups)),
    )


def _labels(table: _Labels) -> dict[str, tuple[str, ...]]:
    return {key: (value,) if isinstance(value, str) else value for key, value in table.items()}


def _ports(value: int | str, at: Path) -> tuple[int, int]:
    first = last = value if isinstance(value, int) else 0
    if isinstance(value, str):
        span = _SPAN.fullmatch(value)
        if not span:
            raise Wrong(at, f'{value!r} is no port: write 443, or "8000-8010"')
        first, last = int(span[1]), int(span[2])
    if not 1 <= first <= last <= 65535:
        raise Wrong(at, f"{value} is no port from 1 to 65535, nor a span of them")
    return first, last


def _cidr(text: str, at: Path) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Wrong(at, f"{text!r} is no prefix: write 10.0.0.0/8 or fd00::/8") from None
    if "%" in text or (
        isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped
    ):
        raise Wrong(at, f"{text!r}: write the IPv4 prefix, and no zone")
    address = text.partition("/")[0]
    if ipaddress.ip_address(address) != network.network_address:
        raise Wrong(at, f"{text!r} has bits beyond its length; {network} is meant?")
    return str(network)


def _cgroup(text: str, at: Path) -> str:
    path = text.strip("/")
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/") if path):
        raise Wrong(at, f"{text!r} is no path below the cgroup-v2 root")
    return path
