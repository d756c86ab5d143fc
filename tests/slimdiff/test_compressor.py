"""The one orchestration: every step when first asked for and once, for any number of budgets."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS

from slimdiff import Budget, Compressor, InputError, PlanSettings, show_progress
from slimdiff.progress import bar

PLANNING = PlanSettings(align=4, sensitivity_calls=2, fitting_calls=4)


@pytest.fixture
def work(pipeline, calibration, compression):
    work = Compressor(pipeline, PROMPTS, calibration, PLANNING)
    work.statistics = compression.statistics
    return work


def test_a_plan_alone_records_nothing_and_its_slim_model_what_it_is_fitted_on(work):
    assert "planner" not in vars(work)
    plans = [work.plan(Budget(text)) for text in ("4%", "8%")]
    assert plans[0].parameters["slim"] > plans[1].parameters["slim"]
    assert not any(work.calls.has(name) for name in ("sensitivity", "fitting", "held"))  # the statistics hold it
    slim = work.slim(plans[1])
    assert work.calls.has("fitting") and not work.calls.has("held")
    assert work.held_error.of(slim) > 0 and type(work.pipeline_with(slim).unet) is type(slim)


def test_a_plan_from_elsewhere_is_slimmed_as_ours_is(work, pipeline, calibration):
    plan = work.plan(Budget("6%"))
    other = Compressor(pipeline, PROMPTS, calibration, PLANNING)
    other.statistics = work.statistics
    ours, theirs = work.slim(plan).state_dict(), other.slim(plan).state_dict()
    assert "planner" not in vars(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_impossible_is_refused_before_anything_is_made(pipeline, calibration, compression):
    work = Compressor(pipeline, PROMPTS, calibration, PLANNING)
    with pytest.raises(InputError, match="MACs, but at most"):
        work.check([Budget("5%"), Budget(macs="95%")], call=lambda: work.calls.sensitivity[0])
    work.check([Budget(speedup=9.0), Budget(max_error=1e-9)])
    resnets = Compressor(pipeline, PROMPTS, calibration, PlanSettings(groups=("query_key",)))
    resnets.check([])  # a plan that is there may slim other groups
    with pytest.raises(InputError, match="name both or neither"):
        resnets.check([Budget("5%")])
    with pytest.raises(InputError, match="slim already"):
        Compressor(compression.pipeline, PROMPTS).check([])
    assert "statistics" not in vars(work) and "planner" not in vars(work)


def test_bars_hang_on_one_switch(capsys):
    try:
        show_progress(True)
        assert list(bar([1, 2], "counting", "thing")) == [1, 2] and "counting" in capsys.readouterr().err
        assert list(bar([1, 2])) == [1, 2] and not capsys.readouterr().err
    finally:
        show_progress(False)
    assert list(bar([1, 2], "counting")) == [1, 2] and not capsys.readouterr().err
