"""Choosing schedules: the frontier is exact, and what is measured is what the images show."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from conftest import PROMPTS

from slimdiff import InputError, Sampling
from slimdiff.planning.schedules import Changes, Images, choose_schedule, frontier, measure_changes
from slimdiff.schedule import Schedule, make_schedule


def changes(steps: int, seed: int) -> Changes:
    chance = random.Random(seed)
    reused = [{n: n * chance.random() for n in range(1, min(3, steps - step))} for step in range(steps)]
    unguided = [chance.random() if chance.random() < 0.9 else math.inf for _ in range(steps)]
    return Changes("up_blocks.1", chance.choice([0.25, 0.5, 0.7]), 2, unguided, reused)


def by_trying_all(given: Changes) -> dict[float, float]:
    """The least change at each cost, of every schedule that there is."""
    steps = len(given.unguided)
    best: dict[float, float] = {}
    for kinds in itertools.product(itertools.product((True, False), repeat=2), repeat=steps):
        whole = [step for step, (_, whole) in enumerate(kinds) if whole]
        guided = [step for step, (guided, _) in enumerate(kinds) if guided]
        try:
            schedule = Schedule(levels=2, steps=steps, depth="up_blocks.1", guided=guided, whole=whole)
        except ValueError:
            continue
        runs = [after - first - 1 for first, after in zip(whole, [*whole[1:], steps], strict=True)]
        if any(run and run not in given.reused[first] for first, run in zip(whole, runs, strict=True)):
            continue
        change = sum(given.reused[first][run] for first, run in zip(whole, runs, strict=True) if run)
        change += sum(given.unguided[step] for step in range(steps) if step not in guided)
        cost = round(schedule.cost(given.shallow), 6)
        best[cost] = min(change, best.get(cost, math.inf))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_frontier_is_the_best_of_all_schedules(steps, seed):
    given = changes(steps, seed)
    found, best = frontier(given), by_trying_all(given)
    for budget in {one.cost for one in found} | set(best):
        expected = min(change for cost, change in best.items() if cost <= budget + 1e-6)
        own = min((one.change for one in found if one.cost <= budget + 1e-6), default=math.inf)
        assert own == pytest.approx(expected) or (own, expected) == (math.inf, math.inf)
    assert all(a.cost < b.cost and a.change > b.change for a, b in itertools.pairwise(found))
    assert found[-1].cost == 1 and found[-1].change == 0 and found[-1].kinds == [(True, True)] * steps


@pytest.fixture(scope="module")
def images(pipeline) -> Images:
    return Images(pipeline, PROMPTS[:2], Sampling(steps=4, batch=2, guidance=3.0, seed=1))


def test_the_full_schedule_changes_nothing_and_every_other_something(images):
    assert images.steps == 4 and images.branches == 2
    assert images.change(make_schedule(3, 4)) == 0
    late = images.schedule([(True, True)] * 3 + [(True, False)], "up_blocks.2")
    assert 0 < images.change(late) < images.change(make_schedule(3, 4, deep_every=4))
    # The record of the steps before is as good as running them.
    images.recorded, kept = [[t.clone() for t in batch] for batch in images.recorded], images.recorded
    for tensor in images.recorded[0][2:]:
        tensor.fill_(math.nan)
    assert images.change(late) > 0 and not math.isnan(images.change(late))
    images.recorded = kept


def test_a_schedule_is_chosen_for_a_speedup_or_an_error(images):
    measured = measure_changes(images, ["up_blocks.1"])
    assert len(measured) == 1 and all(0 < value < math.inf for value in measured[0].unguided)
    assert [sorted(of_step) for of_step in measured[0].reused] == [[1, 2, 3], [1, 2], [1], []]
    fast = choose_schedule(images, measured, speedup=1.5)
    assert fast.cost(measured[0].shallow) <= 1 / 1.5 + 1e-6
    error = fast.made_by["latent_error"]
    assert error == pytest.approx(images.change(fast)) and error > 0
    near = choose_schedule(images, measured, max_error=error)
    assert near.made_by["latent_error"] <= error
    assert choose_schedule(images, measured, max_error=1e-30).is_full()
    with pytest.raises(InputError, match="no schedule of this model is 9 times as fast: the fastest is"):
        choose_schedule(images, measured, speedup=9)
    with pytest.raises(InputError, match="give one of them"):
        choose_schedule(images, measured)


def test_a_depth_that_the_unet_does_not_have_is_refused(images):
    with pytest.raises(InputError, match="depth is up_blocks.7, and a UNet of"):
        images.change(images.schedule([(True, True), (True, False)], "up_blocks.7"))
