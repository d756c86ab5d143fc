"""The one orchestration: every step when first asked for and once, for any number of budgets."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS

from slimdiff import Budget, Compressor, InputError, PlanSettings, compress, show_progress
from slimdiff.compression import with_denoiser
from slimdiff.progress import bar
from slimdiff.settings import TRANSFORMER_GROUPS

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
    assert work.held_error.of(slim) > 0 and type(with_denoiser(work.pipeline, slim).unet) is type(slim)


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


def test_one_switch_silences_every_bar(pipeline, calibration, capsys):
    groups = (*TRANSFORMER_GROUPS, "resnet")
    planning = PlanSettings(align=4, sensitivity_calls=1, fitting_calls=2, groups=groups)

    def bars() -> str:
        compress(pipeline, PROMPTS[:2], Budget("5%"), calibration=calibration, planning=planning)
        return capsys.readouterr().err

    try:
        show_progress(True)
        shown = bars()
    finally:
        show_progress(False)
    for name in ("calibrate", "factorise", "record calls", "sensitivity", "dense outputs", "slim", "compensate"):
        assert f"{name}: 100%" in shown
    for name in ("norms", "channels", "convolutions"):
        assert f"fit {name}: 100%" in shown
    assert not bars()


def test_a_bar_inside_a_bar_goes_and_one_process_shows_bars(monkeypatch, capsys):
    try:
        show_progress(True)
        for _ in bar(range(2), "outer"):
            list(bar(range(2), "inner"))
        last = capsys.readouterr().err.rstrip("\n").rpartition("\r")[2]
        assert "outer: 100%" in last
        monkeypatch.setenv("RANK", "1")
        assert list(bar([1, 2], "counting")) == [1, 2] and not capsys.readouterr().err
    finally:
        show_progress(False)
