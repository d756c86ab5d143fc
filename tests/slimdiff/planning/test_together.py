"""A schedule and ranks for one speedup of the picture: as fast as the tables say, and the best of what was measured."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from conftest import PROMPTS

from slimdiff import CalibrationSettings, InputError, PlanSettings, Sampling
from slimdiff.compression import Compressor
from slimdiff.planning.costs import mac_costs
from slimdiff.planning.pictures import PictureTimes, StepCosts
from slimdiff.planning.schedules import Images, measure_changes
from slimdiff.planning.together import Choosing, Pair
from slimdiff.settings import Forms, ResnetSettings

SAMPLING = Sampling(steps=4, batch=2, guidance=3.0, seed=1)
SPEEDUP = 1.4
PLANNING = PlanSettings(
    align=4,
    sensitivity_calls=2,
    groups=("feed_forward", "resnet"),
    forms=Forms(compensate="none"),
    resnets=ResnetSettings(solve="none"),
)
REST = 0.3
"""What is beside the steps, as a share of a guided whole step."""


@pytest.fixture(scope="module")
def choosing(pipeline) -> Choosing:
    """Times are made of multiply-adds: a guided whole step takes 1 ms."""
    work = Compressor(
        pipeline,
        PROMPTS,
        CalibrationSettings(samples=2, sampling=SAMPLING, tokens_per_dimension=None),
        PLANNING,
    )
    images = Images(work.pipeline, PROMPTS[:2], SAMPLING)
    planner = work.planner
    sample = mac_costs(planner.denoiser, planner.costs.sites, images.call)

    def call(branches: int):
        scale = branches / (2 * sample.dense)
        layers = {path: {rank: cost * scale for rank, cost in curve.items()} for path, curve in sample.layers.items()}
        return type(sample)("latency_ms", branches / 2, layers)

    counted = measure_changes(images, ["up_blocks.1"])
    kinds = {kind: cost / 2 for kind, cost in counted[0].costs.kinds.items()}
    times = PictureTimes({"up_blocks.1": StepCosts(kinds, REST)}, {True: call(2), False: call(1)})
    counted[0].times = times.steps["up_blocks.1"]
    return Choosing(planner, images, counted, times, SPEEDUP)


@pytest.fixture(scope="module")
def best(choosing) -> Pair:
    return choosing.best()


def test_the_pair_is_as_fast_as_asked_and_changes_least_of_those_measured(choosing, best):
    assert best.full_ms == pytest.approx(4 + REST)
    for pair in choosing.pairs:
        table = choosing.table(pair)
        assert (
            pair.slim_ms == pytest.approx(table.of(pair.plan.ranks()))
            and pair.slim_ms <= best.full_ms / SPEEDUP * 1.0001
        )
    measured = [pair.measured for pair in choosing.pairs if pair.measured is not None]
    assert best.measured == min(measured) and len(best.among) == len(choosing.pairs) > 1
    with choosing.planner.as_planned(best.plan) as unet:
        assert choosing.images.change(best.schedule, unet) == pytest.approx(best.measured, rel=1e-3)
    assert choosing.images.change(best.schedule) == pytest.approx(best.scheduled, rel=1e-6)
    # What was not measured was expected to change more.
    assert all(pair.predicted >= best.measured for pair in choosing.pairs if pair.measured is None)


def test_splits_go_from_ranks_alone_to_the_schedule(choosing, best):
    first, last = choosing.pairs[0], choosing.pairs[-1]
    assert first.schedule.is_full() and first.scheduled == 0 and first.noise_error > last.noise_error
    assert last.scheduled > first.scheduled


def test_what_nothing_makes_so_fast_is_refused(choosing):
    with pytest.raises(InputError, match=r"make an image 100 times as fast: at most [0-9.]+ times") as refused:
        replace(choosing, speedup=100.0).best()
    most = float(re.search(r"at most ([0-9.]+) times", str(refused.value))[1])
    nearly = replace(choosing, speedup=0.97 * most).best()
    assert most > SPEEDUP and nearly.slim_ms <= nearly.full_ms / (0.97 * most) * 1.0001
