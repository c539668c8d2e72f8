"""The torture's plan: drawn from the seed alone, and fit to be played."""

from __future__ import annotations

import itertools

import pytest

from underpass.torture import schedule
from underpass.torture.content import LONGEST
from underpass.torture.plans import FOREVER, Batch
from underpass.torture.schedule import LANES, LOCAL_PORTS, TORTURED, Act, Kind

SEEDS = (0, 1, 20_250_101)
_BATCH_LANES = [lane for lane in LANES if lane.kind is not Kind.CHURN]
_CHURN_LANES = [lane for lane in LANES if lane.kind is Kind.CHURN]


def _batches(seed: int) -> list[Batch]:
    return [schedule.batch(seed, lane, number) for lane in _BATCH_LANES for number in range(15)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_draws_the_same_plan(seed: int) -> None:
    """Claim: batches, short connections, disturbances and their digest depend on the seed only."""
    assert _batches(seed) == _batches(seed)
    runs = [[schedule.churn(seed, lane, n) for lane in _CHURN_LANES] for n in (5, 5)]
    assert runs[0] == runs[1]
    first, second = (list(itertools.islice(schedule.disturbances(seed), 300)) for _ in range(2))
    assert first == second
    assert schedule.digest(seed) == schedule.digest(seed)


def test_other_seeds_draw_other_plans() -> None:
    """Claim: no two of the seeds share a digest or a batch."""
    assert len({schedule.digest(seed) for seed in SEEDS}) == len(SEEDS)
    assert len({repr(_batches(seed)) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_one_end_sends_the_other_awaits(seed: int) -> None:
    """Claim: every plan is even: bytes sent are bytes received, unless an end shall break it."""
    for batch in _batches(seed):
        for plan in batch.plans:
            steps = (*plan.client, *plan.server)
            assert all(step.write <= LONGEST for step in steps), plan
            if any(step.reset or step.until_error or step.receive == FOREVER for step in steps):
                continue
            for by, to in ((plan.client, plan.server), (plan.server, plan.client)):
                assert sum(s.send for s in by) == sum(s.receive for s in to), plan


@pytest.mark.parametrize("seed", SEEDS)
def test_ports_and_streams_do_not_collide(seed: int) -> None:
    """Claim: contents differ between lanes, and no bound port is one that the kernel gives."""
    numbers = [batch.number for batch in _batches(seed)]
    assert len(set(numbers)) == len(numbers)
    for batch in _batches(seed):
        assert batch.first_port > LOCAL_PORTS[1]
        assert batch.first_port + len(batch.plans) <= 65536
    runs = [schedule.churn(seed, lane, number) for lane in _CHURN_LANES for number in range(200)]
    spans = sorted((run.first, run.first + run.count) for run in runs)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert all(not run.source_port or run.source_port > LOCAL_PORTS[1] for run in runs)


def test_equal_addresses_in_several_namespaces() -> None:
    """Claim: at least three pods hold the very same loopback conversations."""
    same = [lane for lane in LANES if lane.client == lane.server and lane.kind is Kind.SHAPES]
    assert len({lane.client for lane in same}) >= 3
    assert len({(lane.port, lane.routes) for lane in same}) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_every_act_comes_soon(seed: int) -> None:
    """Claim: each kind of disturbance, each lane's death and each setting is in the plan."""
    acts = list(itertools.islice(schedule.disturbances(seed), 800))
    assert {one.act for one in acts[: len(Act)]} == set(Act)
    assert {one.lane for one in acts if one.act is Act.KILL} == set(range(len(LANES)))
    assert {one.settings for one in acts if one.act is Act.CYCLE} == set(range(len(TORTURED)))
