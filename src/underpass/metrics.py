"""What Prometheus is told: from the data plane's maps when it asks, and from the agent's tally.

Every name is a family of its own below; docs/OPERATIONS.md lists them.
"""

from __future__ import annotations

import contextlib
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from underpass import __version__, abi, dataplane, libbpf, records
from underpass.errors import NotLoaded, UnderpassError
from underpass.generation import Dataplane
from underpass.model import REFUSALS, TCP_REASONS, Counters
from underpass.pods import Source

_STATES = ("absent", "active", "paused", "draining")
_VERDICTS = ("watched", "admitted", "kept-out", "allowed", "denied")
_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
#: Maps that can fill up: key size, and entries at most as in `bpf/`; `sockets` goes by capacity.
_MAPS = {"handshakes": (8, 65536), "syns": (4, 16384), "orders": (8, 262144)}
_NOTHING = Counters(0, 0, 0, {r.word: 0 for r in TCP_REASONS}, {r.word: 0 for r in REFUSALS})

Known = tuple[int, list[Source]]
"""How many pods are known, and how those do who tell of them."""


@dataclass
class Tally:
    """What the agent has done, for its metrics.

    Attributes:
        adopted: open connections that it took in.
        staying: connections that the last pass left on TCP, by reason.
        passes: of adoption.
        restored: how often it brought back what somebody took down.
        reloads: of the configuration, by outcome.
        ready: the wanted generation has been brought into force.
        why_not: if not: the last error.
        turned_at: when the loop last went round (CLOCK_MONOTONIC, seconds).
        errors: by job.
    """

    adopted: int = 0
    staying: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    restored: int = 0
    reloads: dict[str, int] = field(default_factory=lambda: {"done": 0, "refused": 0})
    ready: bool = False
    why_not: str = "it is being brought up"
    turned_at: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)


class Metrics:
    """The text of a scrape.

    Args:
        pins: the generation to tell of, and those that it replaced.
        tally: what the agent has done.
        pods: how many pods are known, and how those do who tell of them; None: nobody was asked.
    """

    def __init__(self, pins: Path, tally: Tally, pods: Callable[[], Known | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Collector(pins, tally, pods))
        ProcessCollector(registry=self.registry)

    def text(self) -> tuple[bytes, str]:
        """In Prometheus' text format, with its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, pins: Path, tally: Tally, pods: Callable[[], Known | None]) -> None:
        self._pins, self._tally, self._pods = pins, tally, pods

    def describe(self) -> list[Metric]:
        """Asked when it is registered: else the maps would be read for it."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield _gauge("build_info", "This agent.", {(__version__, str(abi.ABI), _kernel()): 1},
                     "version", "abi", "kernel")  # fmt: skip
        found = list(_agent(self._tally))
        if known := self._pods():
            found += _known(*known)
        try:
            with dataplane.opened(self._pins) as planes:
                found += _plane(planes)
        except NotLoaded:
            found += _absent()
        except (UnderpassError, OSError):
            self._tally.errors["scrape"] = self._tally.errors.get("scrape", 0) + 1
        yield from found


def _counter(name: str, words: str, values: dict[Any, float], *labels: str) -> Metric:
    return _filled(CounterMetricFamily(f"underpass_{name}", words, labels=labels), values)


def _gauge(name: str, words: str, values: dict[Any, float], *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(f"underpass_{name}", words, labels=labels), values)


def _filled(family: Any, values: dict[Any, float]) -> Metric:
    for at, value in values.items():
        family.add_metric(at if isinstance(at, tuple) else (at,), value)
    metric: Metric = family
    return metric


def _one(value: float) -> dict[Any, float]:
    return {(): value}


def _kernel() -> str:
    return platform.release()


def _agent(tally: Tally) -> Iterator[Metric]:
    yield _counter("adopted_connections", "Open connections that were taken in.",
                   _one(tally.adopted))  # fmt: skip
    yield _counter("adoption_passes", "Passes of adoption.", _one(tally.passes))
    yield _gauge("adoption_staying_connections",
                 "Open connections that the last pass of adoption left on TCP, by reason.",
                 dict(tally.staying), "reason")  # fmt: skip
    jobs = dict.fromkeys(("reach", "check", "adopt", "reload", "scrape"), 0.0)
    yield _counter("agent_errors", "What failed in the agent, by job.",
                   jobs | {k: float(v) for k, v in list(tally.errors.items())}, "job")  # fmt: skip
    yield _counter("agent_restored_generations",
                   "How often the agent brought back what somebody had taken down.",
                   _one(tally.restored))  # fmt: skip
    yield _counter("agent_reloads", "Times that the configuration was read again, by outcome.",
                   dict(tally.reloads), "outcome")  # fmt: skip
    yield _gauge("agent_ready", "1 if the wanted data plane has been brought into force.",
                 _one(tally.ready))  # fmt: skip


def _known(pods: int, sources: list[Source]) -> Iterator[Metric]:
    yield _gauge("pods", "Pods of this node that are known.", _one(pods))
    yield _gauge("pod_source_synced", "1 if it has told of the pods at least once.",
                 {source.name: source.synced for source in sources}, "source")  # fmt: skip
    yield _gauge("pod_source_age_seconds", "Since it was last in touch.",
                 {source.name: source.age for source in sources}, "source")  # fmt: skip
    yield _counter("pod_source_errors", "How often it failed.",
                   {source.name: source.errors for source in sources}, "source")  # fmt: skip


def _absent() -> Iterator[Metric]:
    yield _state("absent")
    yield from _traffic(_NOTHING)
    yield _gauge("open_pairs", "Pairs that are open now.", _one(0))


def _plane(planes: list[Dataplane]) -> Iterator[Metric]:
    plane = planes[0]
    yield _state(plane.state)
    yield _gauge("generation", "Number of the generation in charge.", _one(plane.number))
    yield _gauge("generations", "Generations that are loaded, those being replaced included.",
                 _one(len(planes)))  # fmt: skip
    yield _gauge("generation_info", "The generation in charge.",
                 {(plane.version, str(plane.cgroup)): 1}, "version", "cgroup")  # fmt: skip
    yield from _traffic(dataplane.counters(planes))
    each = [one.endpoints() for one in planes]
    yield _gauge("open_pairs", "Pairs that are open now.",
                 _one(sum(len(records.matched(ends)) for ends in each)))  # fmt: skip
    yield _gauge("policy_in_force", "1 if a policy is.", _one(bool(plane.policy)))
    yield _gauge("capacity_pairs", "Pairs that fit at once.", _one(plane.capacity))
    yield from _maps(plane, len(each[0]))
    yield from _guard(plane)
    yield from _runs(planes)


def _state(now: str) -> Metric:
    return _gauge("generation_state", "1 for the state that the data plane is in.",
                  {state: state == now for state in _STATES}, "state")  # fmt: skip


def _traffic(total: Counters) -> Iterator[Metric]:
    yield _counter("shortcut_bytes", "Bytes that took the shortcut.",
                   _one(total.shortcut_bytes_total))  # fmt: skip
    messages: dict[Any, float] = {("shortcut", "shortcut"): total.shortcut_messages_total}
    messages |= {("tcp", reason): n for reason, n in total.tcp_messages_total.items()}
    yield _counter("messages", "Messages of pairs by their path, and why.",
                   messages, "path", "reason")  # fmt: skip
    yield _counter("connections_refused", "Sockets that became no pair, by reason.",
                   dict(total.refused_total), "reason")  # fmt: skip
    yield _counter("pairs", "Pairs that were made.", _one(total.pairs_total))


def _maps(plane: Dataplane, endpoints: int) -> Iterator[Metric]:
    held = {name: len(libbpf.keys(plane.fd(name), size)) for name, (size, _) in _MAPS.items()}
    yield _gauge("map_entries", "Entries of a map of the generation in charge.",
                 {"sockets": endpoints, **held}, "map")  # fmt: skip
    room = {name: most for name, (_, most) in _MAPS.items()}
    yield _gauge("map_entries_limit", "Entries that fit into the map.",
                 {"sockets": 2 * plane.capacity, **room}, "map")  # fmt: skip


def _guard(plane: Dataplane) -> Iterator[Metric]:
    verdicts = Counter(program.verdict for program in plane.programs())
    yield _gauge("guard_programs", "Programs that the guard knows, by its verdict.",
                 {verdict: verdicts[verdict] for verdict in _VERDICTS}, "verdict")  # fmt: skip


def _runs(planes: list[Dataplane]) -> Iterator[Metric]:
    """What the kernel counts of programs, while it does."""
    counted = False
    with contextlib.suppress(OSError):
        counted = _STATS.read_text().strip() == "1"
    yield _gauge("program_statistics_enabled", "The value of the sysctl kernel.bpf_stats_enabled.",
                 _one(counted))  # fmt: skip
    seconds: dict[Any, float] = {}
    runs: dict[Any, float] = {}
    for plane in planes if counted else ():
        for name in plane.loaded:
            spent, count = libbpf.program_runs(plane.fd(name))
            at = (name, str(plane.number))
            seconds[at], runs[at] = spent / 1e9, count
    labels = ("program", "generation")
    yield _counter("program_run_seconds", "Time in a program, while statistics are enabled.",
                   seconds, *labels)  # fmt: skip
    yield _counter("program_runs", "Runs of a program, while statistics are enabled.",
                   runs, *labels)  # fmt: skip
