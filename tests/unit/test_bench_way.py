"""The paths of the benchmark: what is one, its rules and addresses, and reading its counters."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest

from underpass.bench import way
from underpass.bench.way import MOST_RULES, Way, rules_text
from underpass.errors import UnderpassError, Usage

#: What the programs print, captured.
IPTABLES = """Chain FORWARD (policy ACCEPT 0 packets, 0 bytes)
    pkts      bytes target     prot opt in     out     source               destination         
    4711   360000 UNDERPASS-FORWARD  0    --  *  *   0.0.0.0/0            0.0.0.0/0           
    4242   350000 ACCEPT     0    --  *      *       0.0.0.0/0            0.0.0.0/0            ctstate DNAT
"""  # noqa: E501, W291 - iptables' own
OPENFLOW = "NXST_AGGREGATE reply (xid=0x4): packet_count=21205 byte_count=2112345 flow_count=1\n"
LINKS = """[{"ifname":"va","stats64":{"rx":{"bytes":9,"packets":40},"tx":{"packets":1}}},
{"ifname":"vb","stats64":{"rx":{"bytes":9,"packets":2},"tx":{"packets":1}}}]"""
SNMP6 = """Ip6InReceives                   \t225
Ip6InHdrErrors                  \t7
Ip6OutRequests                  \t300
"""


@pytest.mark.parametrize("words", ["bridge", "ipv6", "ovs"])
def test_a_path_by_its_name(words: str) -> None:
    """Each name is a path without rules."""
    assert Way.parse(words) == Way(words, 0)


@pytest.mark.parametrize("count", [1, 300, MOST_RULES])
def test_rules_by_their_number(count: int) -> None:
    """Iptables takes how many, up to the most."""
    assert Way.parse(f"iptables:{count}") == Way("iptables", count)


@pytest.mark.parametrize("words", ["", "iptables", "iptables:x", "iptables:-1", "ovs:1", "tun"])
def test_an_unknown_path_is_a_usage_error(words: str) -> None:
    """Whatever else is said is refused in one line that says what can be."""
    with pytest.raises(Usage, match="say bridge, ipv6, iptables:N or ovs") as refused:
        Way.parse(words)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("count", [0, MOST_RULES + 1, 999_999_999])
def test_rules_without_number_or_measure_are_a_usage_error(count: int) -> None:
    """The line tells the bounds."""
    with pytest.raises(Usage, match="rules are 1 to 20000; say for example iptables:1000"):
        Way.parse(f"iptables:{count}")


def test_every_path_has_a_name_of_its_own() -> None:
    """Reports tell paths apart by these words, and what their counters count."""
    ways = [Way(), Way("ipv6"), Way("iptables", 5), Way("iptables", 6), Way("ovs")]
    assert len({str(each) for each in ways}) == len(ways)
    assert len({each.counter for each in ways}) == len(ways) - 1
    assert str(Way("iptables", 5)) == "veth + bridge + service address + 5 iptables rules"


@pytest.mark.parametrize("count", [1, 300, MOST_RULES])
def test_iptables_rules_are_as_many_as_asked(count: int) -> None:
    """N rules for packets, N services for connections, each for an address nobody here has."""
    lines = rules_text(count).splitlines()
    assert (lines.count("COMMIT"), lines.count("*nat"), lines.count("*filter")) == (2, 1, 1)
    packets = [line for line in lines if line.startswith("-A UNDERPASS-FORWARD")]
    services = [line for line in lines if line.startswith("-A UNDERPASS-SERVICES -d 10.97.")]
    assert len(packets) == len(set(packets)) == count
    assert len(services) == len(set(services)) == count
    used = {
        way.GATEWAY,
        way.CLIENT_ADDRESS,
        way.SERVER_ADDRESS,
        way.CLIENT_SERVICE,
        way.SERVER_SERVICE,
    }
    for line in packets:
        found = re.search(r"-d (\S+)/32 ", line)
        assert found
        assert str(ipaddress.ip_address(found[1])) not in used


def test_the_service_addresses_come_last_and_are_counted_behind_all_rules() -> None:
    """Our services are found after all others; what counts stands behind the jump to the rules."""
    lines = rules_text(3).splitlines()
    nat = lines[: lines.index("COMMIT")]
    assert nat[-2:] == [
        "-A UNDERPASS-SERVICES -d 10.96.0.1/32 -p tcp -j DNAT --to-destination 10.99.0.1",
        "-A UNDERPASS-SERVICES -d 10.96.0.2/32 -p tcp -j DNAT --to-destination 10.99.0.2",
    ]
    jump = lines.index("-A FORWARD -j UNDERPASS-FORWARD")
    assert lines[jump + 1] == "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT"


def test_addresses_that_programs_use() -> None:
    """Plain ones, IPv6 in brackets before a port, and service addresses behind rules."""
    home = Path()
    plain, six, service = (w.reach(home) for w in (Way(), Way("ipv6"), Way("iptables", 1)))
    assert (plain.server, plain.at(80), plain.listen(80)) == (
        *("10.99.0.2", "10.99.0.2:80", "0.0.0.0:80"),
    )
    assert (six.server, six.at(80), six.listen(80)) == ("fd99::2", "[fd99::2]:80", "[::]:80")
    assert (service.client, service.at(80)) == ("10.96.0.1", "10.96.0.2:80")
    assert Way("iptables", 1).addresses() == ("10.99.0.1/32", "10.99.0.2/32")
    assert Way("ipv6").addresses() == ("fd99::1/64", "fd99::2/64")


def test_counters_are_read() -> None:
    """Each counter's own text gives its packets."""
    assert way.forwarded(IPTABLES) == 4242
    assert way.flowed(OPENFLOW) == 21205
    assert way.switched(LINKS) == 42
    assert way.of_ipv6(SNMP6) == 525


@pytest.mark.parametrize("read", [way.forwarded, way.flowed, way.switched, way.of_ipv6])
@pytest.mark.parametrize("text", ["", "oops", "[1]"])
def test_a_counter_without_a_number_is_an_error(read: type[int], text: str) -> None:
    """No number is never a zero: it is an error that quotes what was read."""
    with pytest.raises(UnderpassError, match="it printed"):
        read(text)


@pytest.mark.parametrize("words", ["ipv6", "iptables:5"])
def test_the_naive_bypass_is_refused_where_it_finds_no_peer(words: str) -> None:
    """IPv6 and NAT are beyond it; elsewhere it may run."""
    kind = words.partition(":")[0]
    with pytest.raises(Usage, match=f"use --naive with --path {kind}: it .*; leave out"):
        Way.parse(words).refuse_naive()
    Way().refuse_naive()
    Way("ovs").refuse_naive()


def test_the_calibration_is_refused_by_ipv6() -> None:
    """Its probe opens IPv4 connections."""
    with pytest.raises(Usage, match=r"calibrate by --path ipv6: .*; say --path bridge"):
        Way("ipv6").refuse_probe()
    Way("iptables", 5).refuse_probe()
