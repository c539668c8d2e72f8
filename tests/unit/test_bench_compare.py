"""The benchmark's judgement: order, medians, ratios, and what it refuses to believe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from underpass.bench.compare import (
    Mode,
    Moved,
    Outcome,
    Reading,
    Row,
    Sample,
    Spread,
    Volume,
    failures,
    schedule,
)

LATENCY = Row("one-core", "tcp_lat", "64", "us", less_is_better=True, floor=0.99)
STREAM = Row("one-core", "tcp_bw", "4096", "Mb/s", less_is_better=False, floor=0.5)
OFF_NODE = Row("free", "churn", "off-node", "connections/s", False, 0.0, off_node=True)
SHORT = Row("free", "churn", "local", "connections/s", False, 0.99, short=True)
SMALL = Row("two-cores", "tcp_bw", "1", "Mb/s", less_is_better=False, floor=0.0, ruled=True)


def sample(mode: Mode, figure: float = 10.0, number: int = 0, moved: Moved | None = None) -> Sample:
    reading = Reading(figure, Volume("messages", 1000), messages=1000)
    return Sample(mode, number, reading, moved or Moved())


def of_row(row: Row, *samples: Sample) -> list[Outcome]:
    return [Outcome(row, samples)]


def test_every_other_round_is_reversed() -> None:
    """A drift of the machine falls on both modes alike: the order is ABBA."""
    order = [mode for _, mode in schedule((Mode.DEFAULT, Mode.SHORTCUT), 4)]
    d, s = Mode.DEFAULT, Mode.SHORTCUT
    assert order == [d, s, s, d, d, s, s, d]


def test_ratio_is_of_medians_with_the_spread_of_the_rounds() -> None:
    """The ratio is shortcut over default, of the medians; its spread is round by round."""
    default = [sample(Mode.DEFAULT, f, n) for n, f in enumerate((10.0, 20.0, 10.0))]
    shortcut = [sample(Mode.SHORTCUT, f, n) for n, f in enumerate((5.0, 5.0, 6.0))]
    outcome = Outcome(LATENCY, (*default, *shortcut))
    assert outcome.ratio == Spread(0.5, 0.25, 0.6)
    assert outcome.spread(Mode.DEFAULT) == Spread(10.0, 10.0, 20.0)
    assert outcome.spread(Mode.UNIX) is None


def test_the_price_in_cpu_is_told_where_bytes_are_known() -> None:
    """CPU seconds per gigabyte, for every mode whose runs all know their bytes and their CPU."""
    reading = Reading(8000.0, Volume("bytes", 5e8))
    runs = [Sample(Mode.DEFAULT, n, reading, Moved(), cpu) for n, cpu in enumerate((0.5, 1.0))]
    unknown = [Sample(Mode.SHORTCUT, n, reading, Moved(), cpu) for n, cpu in ((0, 0.5), (1, None))]
    outcome = Outcome(STREAM, (*runs, *unknown, sample(Mode.UNIX)))
    assert outcome.also(Mode.DEFAULT) == {"cpu_seconds_per_gigabyte": Spread(1.5, 1.0, 2.0)}
    assert outcome.also(Mode.SHORTCUT) == outcome.also(Mode.UNIX) == {}


def test_an_honest_comparison_is_believed() -> None:
    """Default runs that moved no counter and shortcut runs that moved theirs raise nothing."""
    moved = Moved(pairs=2, shortcut_messages=999, shortcut_bytes=999 * 64)
    good = of_row(LATENCY, sample(Mode.DEFAULT), sample(Mode.SHORTCUT, moved=moved))
    assert failures(good) == []


@pytest.mark.parametrize("moved", [Moved(shortcut_messages=1), Moved(pairs=1)])
def test_a_default_run_on_the_shortcut_is_named(moved: Moved) -> None:
    """One message or pair of a default run on the shortcut fails it, and the row is named."""
    (line,) = failures(of_row(LATENCY, sample(Mode.DEFAULT, number=2, moved=moved)))
    assert "one-core tcp_lat 64, round 3: a default run used the shortcut" in line


def test_a_shortcut_run_that_took_tcp_is_named_with_its_reasons() -> None:
    """A shortcut run below the row's floor fails, and says by which reasons it went by TCP."""
    moved = Moved(2, 400, 0, {"tcp-unread": 600, "paused": 0})
    (line,) = failures(of_row(LATENCY, sample(Mode.SHORTCUT, moved=moved)))
    assert "carried 40.0% of the messages, 99% needed" in line
    assert "tcp-unread 600" in line
    assert "paused" not in line


def test_a_stream_is_judged_by_its_bytes() -> None:
    """A stream passes with more than half of its bytes, whatever its number of messages."""
    reading = Reading(8000.0, Volume("bytes", 1e9))
    enough = Sample(Mode.SHORTCUT, 0, reading, Moved(2, 1, 600_000_000))
    little = Sample(Mode.SHORTCUT, 1, reading, Moved(2, 10**9, 400_000_000))
    (line,) = failures(of_row(STREAM, enough, little))
    assert "round 2" in line


def test_a_small_stream_may_be_held_on_tcp_but_not_escape() -> None:
    """Where the budget holds a stream on TCP each message must still have had its reason."""
    held = Moved(2, 10, 10, {"tcp-unread": 985})
    assert failures(of_row(SMALL, sample(Mode.SHORTCUT, moved=held))) == []
    escaped = Moved(2, 10, 10, {"tcp-unread": 300})
    (line,) = failures(of_row(SMALL, sample(Mode.SHORTCUT, moved=escaped)))
    assert "saw 31.0% of the messages" in line


def test_a_naive_run_must_have_been_naive() -> None:
    """A naive run counts if the bypass redirected it and underpass had no part in it."""
    fine = sample(Mode.NAIVE, moved=Moved(naive_messages=600))
    idle = sample(Mode.NAIVE, number=1)
    ours = sample(Mode.NAIVE, number=2, moved=Moved(shortcut_messages=1, naive_messages=600))
    assert fine.carried == 0.6
    lines = failures(of_row(LATENCY, fine, idle, ours))
    assert len(lines) == 2
    assert "round 2: nothing of a naive run was redirected" in lines[0]
    assert "round 3: a naive run used the shortcut" in lines[1]
    assert failures(of_row(OFF_NODE, sample(Mode.NAIVE))) == []


@pytest.mark.parametrize("mode", [Mode.DEFAULT, Mode.SHORTCUT])
def test_the_naive_bypass_must_keep_to_its_runs(mode: Mode) -> None:
    """Another run of which the naive bypass redirected anything is not believed."""
    clean = Moved(2, 1000, 1000) if mode is Mode.SHORTCUT else Moved()
    moved = replace(clean, naive_messages=1)
    (line,) = failures(of_row(LATENCY, sample(mode, moved=moved)))
    assert f"the naive bypass redirected 1 messages of a {mode.value} run" in line


def test_pairs_of_an_earlier_run_count() -> None:
    """A proxy keeps its connections: a run without a new pair is proven by its messages."""
    kept = sample(Mode.SHORTCUT, moved=Moved(pairs=0, shortcut_messages=1000))
    assert failures(of_row(LATENCY, kept)) == []


@pytest.mark.parametrize("moved", [Moved(), Moved(pairs=2, tcp_messages={"tcp-unread": 1000})])
@pytest.mark.parametrize("row", [LATENCY, STREAM, SMALL])
def test_a_shortcut_run_without_any_shortcut_never_passes(row: Row, moved: Moved) -> None:
    """However low a row's floor is, a shortcut run with nothing on the shortcut fails."""
    (line,) = failures(of_row(row, sample(Mode.SHORTCUT, moved=moved)))
    assert "nothing of a shortcut run took the shortcut" in line


def test_an_off_node_run_must_have_been_turned_down() -> None:
    """Off-node connections that paired, or that the data plane never saw, are not believed."""
    fine = sample(Mode.SHORTCUT, moved=Moved(not_local=1000))
    paired = sample(Mode.SHORTCUT, number=1, moved=Moved(pairs=1, not_local=999))
    unseen = sample(Mode.SHORTCUT, number=2, moved=Moved(not_local=10))
    lines = failures(of_row(OFF_NODE, fine, paired, unseen))
    assert len(lines) == 2
    assert "1 off-node connections were paired" in lines[0]
    assert "turned down 10 of 1000" in lines[1]


@pytest.mark.parametrize(
    ("volume", "packets", "least"),
    [
        (Volume("messages", 1000), 500, 500),
        (Volume("bytes", 1000 * 65536), 500, 500),
        (Volume("bytes", 1), 1, 1),
    ],
)
def test_a_default_run_must_have_taken_the_path(volume: Volume, packets: int, least: int) -> None:
    """Half a packet for each message, or for each 64 KiB; one less, and it went some other way."""
    for seen, wrong in ((packets, 0), (packets - 1, 1)):
        run = Sample(Mode.DEFAULT, 0, Reading(1.0, volume), Moved(path_packets=seen))
        said = failures(of_row(LATENCY, run))
        assert len(said) == wrong
        assert (
            not said or f"{seen} packets of a default run took the path, {least} needed" in said[0]
        )


def test_a_shortcut_run_need_not_take_the_path() -> None:
    """The path's packets are what the shortcut saves."""
    moved = Moved(pairs=2, shortcut_messages=1000, path_packets=0)
    assert failures(of_row(LATENCY, sample(Mode.SHORTCUT, moved=moved))) == []


@pytest.mark.parametrize(
    ("row", "carried", "tcp", "believed"),
    [
        (SHORT, 900, {"unpaired": 100}, True),
        (SHORT, 500, {"unpaired": 500}, True),
        (SHORT, 480, {"unpaired": 520}, False),
        (SHORT, 900, {"tcp-unread": 100}, False),
        (LATENCY, 900, {"unpaired": 100}, False),
    ],
)
def test_the_first_message_of_a_short_connection_may_be_early(
    row: Row, carried: int, tcp: dict[str, int], believed: bool
) -> None:
    """On a slow path a request leaves before its server's end is found; its answer must not."""
    moved = Moved(500, carried, 0, tcp)
    assert (failures(of_row(row, sample(Mode.SHORTCUT, moved=moved))) == []) is believed
