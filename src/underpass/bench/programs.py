"""The real programs: how each is served, asked and read. Configuration files are written here."""

from __future__ import annotations

import json
import os
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from underpass.bench import qperf
from underpass.bench.bed import Bed
from underpass.bench.compare import Mode, Placement, Reading, Row, Volume
from underpass.bench.processes import Group
from underpass.bench.way import Reach, host, which
from underpass.errors import UnderpassError

#: A shortcut run of requests must have passed nearly every message by the shortcut, a stream
#: more than half its bytes: above the budget TCP holds the sender, by design. Streams of messages
#: below this size live at the message budget, so their share is shown and not judged.
SMALL = 1024
REQUESTS_FLOOR, STREAM_FLOOR = 0.99, 0.5

_BODY = 64 << 10
_OFF_NODE = 18100
IPERF_PORT = 15201
_MODES = {Mode.DEFAULT: 0, Mode.SHORTCUT: 1, Mode.NAIVE: 2}


class Place(Protocol):
    """What a workload may ask of the runner, which knows namespaces, cgroups and cores."""

    bed: Bed
    placement: Placement

    @property
    def reach(self) -> Reach:
        """How the two ends reach each other."""

    def directory(self, name: str) -> Path:
        """A directory of the benchmark's own, made if it is not there."""

    def serve(self, mode: Mode, argv: list[str], port: int, client_side: bool = False) -> None:
        """Start a server; return when it listens."""

    def once(self, argv: list[str]) -> str:
        """Run a set-up program and return what it printed."""

    def group(self, mode: Mode) -> Group:
        """The cgroup of a mode."""


@dataclass(frozen=True)
class Measure:
    """One row: what to run at the client and how to read it."""

    test: str
    label: str
    unit: str
    less_is_better: bool
    floor: float
    argv: Callable[[Mode], list[str]]
    parse: Callable[[str], Reading]

    ruled: bool = False
    off_node: bool = False
    short: bool = False
    crossing: float = 1.0

    def row(self, placement: str) -> Row:
        """The row of the comparison that this measures, at one placement."""
        return Row(
            placement,
            self.test,
            self.label,
            self.unit,
            self.less_is_better,
            self.floor,
            self.ruled,
            self.off_node,
            self.short,
            self.crossing,
        )


@dataclass(frozen=True)
class Workload:
    """A comparison: programs it needs (with their packages), its servers, its rows.

    Attributes:
        settings: what else was chosen for it, for the report.
        rest: seconds for which the kernel's counters must stand still before a run; a proxy may yet
            pass on what a client of the run before left on its way.
        behind_nat: its connections are rewritten, so that the naive bypass would not find them.
        beside: versions of what it needs beside programs; raises UnderpassError if it is not here.
    """

    name: str
    needs: dict[str, str]
    serve: Callable[[Place, Mode], None]
    measures: Callable[[Reach, int], list[Measure]]
    unix: bool = False
    settings: dict[str, int] = field(default_factory=dict)
    rest: float = 0.0
    behind_nat: bool = False
    beside: Callable[[], dict[str, str]] = dict


def missing(workload: Workload) -> None:
    """Check that all it needs is here.

    Raises:
        UnderpassError: one is not; names its package.
    """
    workload.beside()
    for program, package in workload.needs.items():
        if not find(program):
            raise UnderpassError(
                "run workload", workload.name, f"{program} is not here", f"install {package}"
            )


def find(program: str) -> str | None:
    """Where a program is; PostgreSQL's server programs are outside PATH on Debian."""
    postgres = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return which(program) or (str(postgres[-1]) if postgres else None)


def port_of(base: int, mode: Mode) -> int:
    """The port of a mode's own server."""
    return base + _MODES.get(mode, 0)


def number(pattern: str, text: str, program: str) -> float:
    """The number that ``pattern`` holds in what ``program`` printed.

    Raises:
        UnderpassError: it is not there; quotes the text.
    """
    found = re.search(pattern, text, re.MULTILINE)
    if not found:
        said = " ".join(text.split())[:120] or "nothing"
        raise UnderpassError("read", f"the output of {program}", f"it printed: {said}", "see why")
    return float(found[1])


# -- qperf ---------------------------------------------------------------------------------


def _qperf_measures(reach: Reach, seconds: int) -> list[Measure]:
    return [_qperf(reach, test, size, seconds) for test in qperf.TESTS for size in qperf.SIZES]


def _qperf(reach: Reach, test: str, size: int, seconds: int) -> Measure:
    latency = test == "tcp_lat"
    ruled = not latency and size < SMALL
    return Measure(
        test=test,
        label=str(size),
        unit="us" if latency else "Mb/s",
        less_is_better=latency,
        floor=REQUESTS_FLOOR if latency else 0.0 if ruled else STREAM_FLOOR,
        argv=lambda mode: qperf.client(reach.server, port_of(19770, mode), test, size, seconds),
        parse=lambda text: qperf.parse(text, size, seconds),
        ruled=ruled,
    )


QPERF = Workload(
    "qperf",
    {"qperf": "qperf"},
    lambda place, mode: place.serve(mode, qperf.server(port_of(19770, mode)), port_of(19770, mode)),
    _qperf_measures,
    unix=True,
)


# -- redis ---------------------------------------------------------------------------------


def _redis_serve(place: Place, mode: Mode) -> None:
    port = port_of(16379, mode)
    options = {"port": str(port), "save": "", "appendonly": "no", "protected-mode": "no"}
    options["dir"] = str(place.directory(f"redis-{mode.value}"))
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    place.serve(mode, ["redis-server", *flags], port)


def _redis_measures(reach: Reach, seconds: int) -> list[Measure]:
    return [_redis(reach, command, deep, seconds) for deep in (1, 16) for command in ("GET", "SET")]


def _redis(reach: Reach, command: str, deep: int, seconds: int) -> Measure:
    count = (60_000 if deep == 1 else 800_000) * seconds
    head = ["redis-benchmark", "-h", reach.server, "-q", "--csv", "-P", str(deep)]

    def parse(text: str) -> Reading:
        rate = number(rf'^"{command}","([\d.]+)"', text, "redis-benchmark")
        return Reading(rate, Volume("messages", 2 * count / deep))

    return Measure(
        "redis", f"{command} -P {deep}" if deep > 1 else command, "requests/s", False,
        REQUESTS_FLOOR,
        lambda mode: [*head, "-p", str(port_of(16379, mode)), "-n", str(count), "-t", command],
        parse,
    )  # fmt: skip


# -- nginx ---------------------------------------------------------------------------------

WRK = {"nginx": "nginx-light or nginx", "wrk": "wrk"}

_NGINX = """daemon off;
user root;
worker_processes 1;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  keepalive_requests 1000000000;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  {body}
}}
"""
_SITE = """server {{ listen {at}; root {home};
    location = /small {{ return 200 "under the stack\\n"; }} }}"""
_PROXY = """upstream other {{ server {address}:{port}; keepalive 64;
    keepalive_requests 1000000000; }}
  server {{ listen {at}; location / {{ proxy_pass http://other; proxy_http_version 1.1;
    proxy_set_header Connection ""; proxy_buffers 16 16k; }} }}"""


@dataclass(frozen=True)
class Site:
    """One nginx: its directory's name, what its configuration serves, and at which end it is.

    Attributes:
        size: of what it serves as ``/file``.
    """

    name: str
    body: str
    port: int
    client_side: bool = False
    size: int = _BODY


def nginx_config(home: Path, body: str) -> str:
    """An nginx in the foreground that keeps everything below ``home`` and serves ``body``."""
    return _NGINX.format(home=home, body=body)


def nginx_start(place: Place, mode: Mode, site: Site) -> None:
    """Serve a site; ``HOME`` in its configuration is its directory."""
    home = place.directory(f"{site.name}-{mode.value}")
    (home / "file").write_bytes(bytes(site.size))
    config = home / "nginx.conf"
    config.write_text(nginx_config(home, site.body.replace("HOME", str(home))))
    program = find("nginx") or "nginx"
    argv = [program, "-p", str(home), "-c", str(config)]
    place.serve(mode, argv, site.port, client_side=site.client_side)


def _nginx_serve(place: Place, mode: Mode) -> None:
    port = port_of(18080, mode)
    nginx_start(
        place, mode, Site("site", _SITE.format(at=place.reach.listen(port), home="HOME"), port)
    )


def _nginx_proxy_serve(place: Place, mode: Mode) -> None:
    """Client -> proxy -> upstream; the upstream beside the client, so both legs cross."""
    port, listen = port_of(18090, mode), port_of(18080, mode)
    upstream = _SITE.format(at=place.reach.listen(port), home="HOME")
    nginx_start(place, mode, Site("upstream", upstream, port, client_side=True))
    proxy = _PROXY.format(
        address=host(place.reach.client), port=port, at=place.reach.listen(listen)
    )
    nginx_start(place, mode, Site("proxy", proxy, listen))


def _nginx_measures(legs: int) -> Callable[[Reach, int], list[Measure]]:
    name = "nginx" if legs == 1 else "nginx-proxy"

    def small(text: str) -> Reading:
        rate = number(r"^Requests/sec:\s+([\d.]+)", text, "wrk")
        count = number(r"^\s+(\d+) requests in", text, "wrk")
        return Reading(rate, Volume("messages", 2 * legs * count))

    def file(text: str) -> Reading:
        rate = number(r"^Requests/sec:\s+([\d.]+)", text, "wrk")
        count = number(r"^\s+(\d+) requests in", text, "wrk")
        return Reading(rate, Volume("bytes", legs * count * _BODY))

    def measures(reach: Reach, seconds: int) -> list[Measure]:
        head = ["wrk", "-t", "1", "-c", "32", "-d", f"{seconds}s"]

        def ask(path: str) -> Callable[[Mode], list[str]]:
            return lambda mode: [*head, f"http://{reach.at(port_of(18080, mode))}{path}"]

        unit = "requests/s"
        return [
            Measure(name, "small", unit, False, REQUESTS_FLOOR, ask("/small"), small),
            Measure(name, "64 KiB", unit, False, STREAM_FLOOR, ask("/file"), file),
        ]

    return measures


def _churn_serve(place: Place, mode: Mode) -> None:
    """The local server of a mode, and once the off-node stand-in: outside the cgroup."""
    _nginx_serve(place, mode)
    if mode is Mode.DEFAULT:
        body = _SITE.format(at=place.reach.listen(_OFF_NODE), home="HOME")
        site = Site("off-node", body, _OFF_NODE)
        nginx_start(place, mode, site)


def _churn_measures(reach: Reach, seconds: int) -> list[Measure]:
    """Connect, request, close: every request on a connection of its own."""
    head = ["wrk", "-t", "1", "-c", "8", "-d", f"{seconds}s", "-H", "Connection: close"]

    def parse(per_connection: float) -> Callable[[str], Reading]:
        def read(text: str) -> Reading:
            rate = number(r"^Requests/sec:\s+([\d.]+)", text, "wrk")
            count = number(r"^\s+(\d+) requests in", text, "wrk")
            return Reading(rate, Volume("messages", per_connection * count))

        return read

    def local(mode: Mode) -> list[str]:
        return [*head, f"http://{reach.at(port_of(18080, mode))}/small"]

    def off_node(_: Mode) -> list[str]:
        return [*head, f"http://{reach.at(_OFF_NODE)}/small"]

    unit = "connections/s"
    return [
        Measure("churn", "local", unit, False, REQUESTS_FLOOR, local, parse(2), short=True),
        Measure("churn", "off-node", unit, False, 0.0, off_node, parse(1), off_node=True),
    ]


# -- PostgreSQL ----------------------------------------------------------------------------

_SERVER_OPTIONS = {"fsync": "off", "shared_buffers": "64MB", "listen_addresses": "*"}


def _as_other_user() -> tuple[list[str], int, int]:
    """PostgreSQL refuses root: the words that change user, and whom they change to."""
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        return ["setpriv", *ids], user.pw_uid, user.pw_gid
    raise UnderpassError("start", "postgres", "no user but root", "install postgresql")


def _postgres_serve(place: Place, mode: Mode) -> None:
    port = port_of(15432, mode)
    change, uid, gid = _as_other_user()
    home = place.directory(f"postgres-{mode.value}")
    os.chown(home, uid, gid)
    data = home / "data"
    if not data.exists():
        flags = ["--auth=trust", "--username=bench", "--no-sync", "--encoding=UTF8"]
        place.once([*change, find("initdb") or "initdb", "-D", str(data), *flags])
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all trust\n")  # who reaches it is in our namespace
    options = {**_SERVER_OPTIONS, "port": str(port), "unix_socket_directories": str(home)}
    flags = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    place.serve(mode, [*change, find("postgres") or "postgres", "-D", str(data), *flags], port)
    where = ["-h", str(home), "-p", str(port), "-U", "bench"]
    place.once(["pgbench", *where, "-i", "-q", "-s", "1", "postgres"])


def _postgres_measures(reach: Reach, seconds: int) -> list[Measure]:
    row = reach.home / "row.sql"
    row.write_text(f"SELECT repeat('x', {_BODY});\n")

    def ask(options: list[str]) -> Callable[[Mode], list[str]]:
        head = ["pgbench", "-n", "-T", str(seconds), "-c", "8", "-U", "bench"]
        where = ["-h", reach.server]
        return lambda mode: [
            *head, *where, "-p", str(port_of(15432, mode)), *options, "postgres",
        ]  # fmt: skip

    def parse(per_transaction: Volume) -> Callable[[str], Reading]:
        def read(text: str) -> Reading:
            rate = number(r"^tps = ([\d.]+)", text, "pgbench")
            count = number(r"actually processed: (\d+)", text, "pgbench")
            return Reading(rate, Volume(per_transaction.unit, per_transaction.amount * count))

        return read

    select = parse(Volume("messages", 2))
    big = parse(Volume("bytes", _BODY))
    unit = "transactions/s"
    return [
        Measure("postgres", "SELECT", unit, False, REQUESTS_FLOOR, ask(["-S"]), select),
        Measure("postgres", "64 KiB row", unit, False, STREAM_FLOOR, ask(["-f", str(row)]), big),
    ]


# -- iperf3 --------------------------------------------------------------------------------


def iperf_parse(text: str) -> Reading:
    """What iperf3 received, by its JSON.

    Raises:
        UnderpassError: it printed something else.
    """
    try:
        total = json.loads(text)["end"]["sum_received"]
        return Reading(total["bits_per_second"] / 1e6, Volume("bytes", total["bytes"]))
    except (ValueError, KeyError, TypeError):
        cause = f"it printed: {' '.join(text.split())[:120]}"
        raise UnderpassError("read", "the output of iperf3", cause, "see why") from None


def _iperf_measures(reach: Reach, seconds: int) -> list[Measure]:
    def ask(flags: list[str]) -> Callable[[Mode], list[str]]:
        head = ["iperf3", "-c", reach.server, "-t", str(seconds), "-J", *flags]
        return lambda mode: [*head, "-p", str(port_of(IPERF_PORT, mode))]

    return [
        Measure("iperf3", "to server", "Mb/s", False, STREAM_FLOOR, ask([]), iperf_parse),
        Measure("iperf3", "to client", "Mb/s", False, STREAM_FLOOR, ask(["-R"]), iperf_parse),
    ]


def iperf_serve(place: Place, mode: Mode) -> None:
    """One stream at a time, at the mode's port."""
    port = port_of(IPERF_PORT, mode)
    place.serve(mode, ["iperf3", "-s", "-p", str(port)], port)


_POSTGRES = dict.fromkeys(("initdb", "postgres", "pgbench"), "postgresql")
_REDIS = {"redis-server": "redis-server", "redis-benchmark": "redis-tools"}
PROGRAMS = (
    QPERF,
    Workload("redis", _REDIS, _redis_serve, _redis_measures),
    Workload("nginx", WRK, _nginx_serve, _nginx_measures(1)),
    Workload("nginx-proxy", WRK, _nginx_proxy_serve, _nginx_measures(2)),
    Workload("churn", WRK, _churn_serve, _churn_measures),
    Workload("postgres", _POSTGRES, _postgres_serve, _postgres_measures),
    Workload("iperf3", {"iperf3": "iperf3"}, iperf_serve, _iperf_measures),
)
