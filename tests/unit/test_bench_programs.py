"""Reading what the real programs print. The texts are their own, captured."""

from __future__ import annotations

from pathlib import Path

import pytest

from underpass.bench import probe, qperf
from underpass.bench.compare import Mode, Reading, Volume
from underpass.bench.programs import SMALL, Measure, Workload, missing
from underpass.bench.way import Reach
from underpass.bench.workloads import WORKLOADS, choose
from underpass.errors import UnderpassError, Usage

QPERF_LATENCY = """tcp_lat:
    latency   =  6.22 us
    msg_size  =     4 KiB (4,096)
    time      =     1 sec
"""
QPERF_MEGABITS = """tcp_bw:
    bw        =  120 Mb/sec
    msg_size  =   16 bytes
    time      =    1 sec
"""
QPERF_GIGABITS = """tcp_bw:
    bw        =  15.5 Gb/sec
    msg_size  =     4 KiB (4,096)
    time      =     1 sec
"""
QPERF_REFUSED = """tcp_lat:
127.0.0.1: failed to connect
"""
REDIS = """"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms"
"GET","69686.41","0.435","0.072","0.319"
"""
WRK = """Running 1s test @ http://10.99.0.2:18080/small
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   189.47us  332.88us   6.63ms   98.58%
    Req/Sec   121.27k     7.13k  128.16k    80.00%
  120411 requests in 1.00s, 18.83MB read
Requests/sec: 120266.44
Transfer/sec:     18.81MB
"""
PGBENCH = """pgbench (15.20 (Debian 15.20-0+deb12u1))
transaction type: <builtin: select only>
scaling factor: 1
query mode: simple
number of clients: 8
number of threads: 1
maximum number of tries: 1
duration: 1 s
number of transactions actually processed: 40831
number of failed transactions: 0 (0.000%)
latency average = 0.193 ms
initial connection time = 16.915 ms
tps = 41379.317334 (without initial connection time)
"""
IPERF = """{"end": {"sum_sent": {"bytes": 2031616000, "bits_per_second": 16251449118.130249},
"sum_received": {"start": 0, "end": 1.000522, "seconds": 1.000522, "bytes": 2028273288,
"bits_per_second": 16217720653.818708, "sender": true}}}
"""


def measures(name: str, directory: Path) -> list[Measure]:
    return WORKLOADS[name].measures(Reach(directory), 1)


def test_qperf_latency_is_one_way_microseconds() -> None:
    """A latency of 6.22 us means that as many messages passed as fit one after another."""
    reading = qperf.parse(QPERF_LATENCY, 4096, 1)
    assert reading.figure == pytest.approx(6.22)
    assert reading.volume.unit == "messages"
    assert reading.volume.amount == pytest.approx(1 / 6.22e-6)


@pytest.mark.parametrize(
    ("text", "size", "megabits"), [(QPERF_MEGABITS, 16, 120), (QPERF_GIGABITS, 4096, 15500)]
)
def test_qperf_throughput_is_in_megabits(text: str, size: int, megabits: float) -> None:
    """Whatever unit qperf chose, the figure is Mb/s and the volume bytes."""
    reading = qperf.parse(text, size, 2)
    assert reading.figure == pytest.approx(megabits)
    assert reading.volume.amount == pytest.approx(megabits * 1e6 / 8 * 2)
    assert reading.messages == pytest.approx(reading.volume.amount / size)


@pytest.mark.parametrize("text", [QPERF_REFUSED, ""])
def test_qperf_without_a_figure_is_an_error(text: str) -> None:
    """No figure is never a zero: it is an error that quotes what qperf said."""
    with pytest.raises(UnderpassError, match="it printed"):
        qperf.parse(text, 1, 1)


def test_qperf_is_run_as_the_reference_runs_it(tmp_path: Path) -> None:
    """Sizes 1 B to 16 KiB by a factor of 4, tcp_lat and tcp_bw, and the reference's own flags."""
    rows = measures("qperf", tmp_path)
    assert [int(m.label) for m in rows] == [1, 4, 16, 64, 256, 1024, 4096, 16384] * 2
    assert [m.test for m in rows] == ["tcp_lat"] * 8 + ["tcp_bw"] * 8
    argv = rows[3].argv(Mode.SHORTCUT)
    assert argv[:3] == ["qperf", "-t", "1"]
    assert argv[-5:] == ["-ub", "-oo", "msg_size:64:64:*4", "-vu", "tcp_lat"]


def test_the_two_modes_never_share_a_server(tmp_path: Path) -> None:
    """Default and shortcut clients go to different ports; only the off-node stand-in is one."""
    for name in WORKLOADS:
        for measure in measures(name, tmp_path):
            same = measure.argv(Mode.DEFAULT) == measure.argv(Mode.SHORTCUT)
            assert same == measure.off_node


def test_only_streams_of_small_messages_escape_the_floor(tmp_path: Path) -> None:
    """Every row has a floor but streams below 1 KiB, which are ruled, and off-node rows."""
    for name in WORKLOADS:
        for measure in measures(name, tmp_path):
            small = measure.test == "tcp_bw" and int(measure.label) < SMALL
            assert measure.ruled == small
            assert (measure.floor == 0) == (small or measure.off_node)


@pytest.mark.parametrize(
    ("name", "index", "text", "expected"),
    [
        ("redis", 0, REDIS, Reading(69686.41, Volume("messages", 120_000))),
        ("nginx", 0, WRK, Reading(120266.44, Volume("messages", 240_822))),
        ("nginx", 1, WRK, Reading(120266.44, Volume("bytes", 120_411 * 65536))),
        ("nginx-proxy", 0, WRK, Reading(120266.44, Volume("messages", 481_644))),
        ("postgres", 0, PGBENCH, Reading(41379.317334, Volume("messages", 81_662))),
        ("postgres", 1, PGBENCH, Reading(41379.317334, Volume("bytes", 40_831 * 65536))),
        ("iperf3", 0, IPERF, Reading(16217.720653818708, Volume("bytes", 2028273288))),
    ],
)
def test_what_a_program_printed(
    name: str, index: int, text: str, expected: Reading, tmp_path: Path
) -> None:
    """The figure, and how many messages or bytes must have passed for it."""
    reading = measures(name, tmp_path)[index].parse(text)
    assert reading.figure == pytest.approx(expected.figure)
    assert reading.volume == expected.volume


WRK_MANY = WRK + "p50_us 811\np99_us 2034\np99.9_us 7120\n"


@pytest.mark.parametrize(
    ("size", "volume"),
    [(1024, Volume("messages", 240_822)), (16384, Volume("bytes", 120_411 * 16384))],
)
def test_many_connections_tell_what_the_slowest_wait(
    size: int, volume: Volume, tmp_path: Path
) -> None:
    """The rate, the latency's percentiles, and the bytes whatever the run is judged by."""
    reading = choose("parallel", size=size).measures(Reach(tmp_path), 1)[4].parse(WRK_MANY)
    assert reading.figure == pytest.approx(120266.44)
    assert reading.volume == volume
    assert reading.also == {"p50_us": 811, "p99_us": 2034, "p99.9_us": 7120}
    assert reading.payload == 120_411 * size


@pytest.mark.parametrize(
    "line",
    ["  Socket errors: connect 0, read 3, write 0, timeout 0", "  Non-2xx or 3xx responses: 7"],
)
def test_many_connections_with_errors_are_not_measured(line: str, tmp_path: Path) -> None:
    """A run in which requests failed is an error that says how many, not a figure."""
    with pytest.raises(UnderpassError, match=line.strip().split(",")[0]):
        measures("parallel", tmp_path)[0].parse(f"{WRK_MANY}{line}\n")


def test_connections_are_from_1_to_256(tmp_path: Path) -> None:
    """1, 4, 16, 64 and 256 connections, each a row."""
    rows = measures("parallel", tmp_path)
    counts = [m.argv(Mode.DEFAULT)[m.argv(Mode.DEFAULT).index("-c") + 1] for m in rows]
    assert counts == ["1", "4", "16", "64", "256"]
    assert [m.label for m in rows] == ["1 connection", *(f"{n} connections" for n in counts[1:])]


def test_idle_pairs_cost_slabs_and_buffers(tmp_path: Path) -> None:
    """The figure is a pair's part of what the kernel took; each pair says a byte each way."""
    (measure,) = choose("idle", pairs=500).measures(Reach(tmp_path), 1)
    reading = measure.parse('{"pairs": 500, "slab_bytes": 5000000, "tcp_bytes": 40960}')
    assert reading.figure == pytest.approx(10081.92)
    assert reading.volume == Volume("messages", 1000)
    assert reading.also == {"slab_bytes_per_pair": 10_000, "tcp_bytes_per_pair": 81.92}
    assert measure.label == "500 idle pairs"
    assert measure.less_is_better


def test_a_setting_belongs_to_its_workload() -> None:
    """A size for a workload that has none is a usage error that names the one that has."""
    assert choose("parallel", size=4096).settings == {"size": 4096}
    assert choose("redis", size=None) is WORKLOADS["redis"]
    with pytest.raises(Usage, match="--size 5: workload redis has no size; say --workload para"):
        choose("redis", size=5)


def test_a_mixed_run_has_two_rows(tmp_path: Path) -> None:
    """Requests beside a stream, and the stream: two figures of one output, judged by the stream."""
    both = f"{WRK_MANY}===\n{IPERF}"
    requests, stream = (measure.parse(both) for measure in measures("mixed", tmp_path))
    assert requests.figure == pytest.approx(120266.44)
    assert requests.also["p99_us"] == 2034
    assert stream.figure == pytest.approx(16217.720653818708)
    assert requests.volume == stream.volume == Volume("bytes", 2028273288)


@pytest.mark.parametrize(
    "name", ["redis", "nginx", "postgres", "iperf3", "parallel", "mixed", "idle", "mesh"]
)
def test_a_program_that_failed_is_an_error(name: str, tmp_path: Path) -> None:
    """Output without a figure is one line that quotes it, never a traceback."""
    with pytest.raises(UnderpassError, match="it printed: oops"):
        measures(name, tmp_path)[0].parse("oops")


def test_a_missing_program_names_its_package() -> None:
    """The error says what is missing and what to install."""
    none = Workload("none", {"no-such-program": "its-package"}, WORKLOADS["redis"].serve, _none)
    with pytest.raises(UnderpassError, match="no-such-program is not here; install its-package"):
        missing(none)


def _none(_: Reach, __: int) -> list[Measure]:
    return []


def test_afunix_prints_one_number() -> None:
    """The AF_UNIX program's number is the figure; anything else is an error."""
    assert probe.parse("4.4124\n", "tcp_lat", 200).figure == 4.4124
    assert probe.parse("8000\n", "tcp_bw", 500).volume == Volume("bytes", 500e6)
    with pytest.raises(UnderpassError, match="probe"):
        probe.parse("", "tcp_lat", 200)
