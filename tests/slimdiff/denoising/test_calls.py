"""Recorded calls: each kind made once, when first asked for, and refused where it cannot be had."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS

from slimdiff import CalibrationSettings, InputError, PlanSettings
from slimdiff.denoising import calls as calls_module
from slimdiff.denoising.calls import Calls, evenly
from slimdiff.denoising.trajectory import Call


def test_calls_are_recorded_when_first_asked_for_and_once(pipeline, calibration, monkeypatch):
    asked, original = [], calls_module.record_calls

    def record(*args, **options):
        asked.append(options)
        return original(*args, **options)

    monkeypatch.setattr(calls_module, "record_calls", record)
    calls = Calls(pipeline, PROMPTS, calibration, PlanSettings(sensitivity_calls=3, fitting_calls=4))
    assert not asked and calls.gives("fitting") and not calls.has("fitting")
    assert len(calls.sensitivity) == 3 and calls.sensitivity is calls.sensitivity
    assert len(asked) == 1 and calls.has("sensitivity") and not calls.has("fitting")
    assert len(calls.fitting) <= 4 and len(asked) == 2


def apart(some, others):
    """Whether no sample of some calls has the latents, or the text, of a sample of the others."""

    def rows(calls, name):  # the second half is the branch with text
        return [row for call in calls for row in call.arguments[name].chunk(2)[1]]

    names = ("sample", "encoder_hidden_states")
    return not any(torch.equal(a, b) for name in names for a in rows(some, name) for b in rows(others, name))


def test_sensitivities_and_errors_are_measured_on_what_calibration_has_not_seen(pipeline, calibration):
    calls = Calls(pipeline, PROMPTS, calibration.model_copy(update={"samples": 2}))
    assert len(calls.held) == len(calls.sensitivity)
    assert apart(calls.held, calls.fitting) and apart(calls.sensitivity, calls.fitting)


def test_sensitivities_and_errors_are_measured_on_prompts_of_their_own_where_there_are_enough(pipeline, calibration):
    sampling = calibration.sampling.model_copy(update={"batch": 1})
    calls = Calls(pipeline, PROMPTS, calibration.model_copy(update={"samples": 2, "sampling": sampling}))
    assert apart(calls.held, calls.sensitivity)


def test_without_more_prompts_sensitivities_are_measured_on_the_calibrations(pipeline, calibration):
    calls = Calls(pipeline, PROMPTS, calibration.model_copy(update={"samples": len(PROMPTS)}))
    assert not apart(calls.sensitivity, calls.fitting)


def test_what_cannot_be_had_is_named(pipeline):
    ready = Calls.of([Call(0, 1, {})])
    assert ready.sensitivity[0].timestep == 1 and ready.has("sensitivity") and not ready.gives("held")
    with pytest.raises(InputError, match=r"max_error is measured on recorded denoiser calls: give some .*of\(held="):
        ready.held  # noqa: B018
    with pytest.raises(InputError, match="fitted and errors compensated on .* give at least one non-empty prompt"):
        Calls(pipeline, [], CalibrationSettings()).fitting  # noqa: B018


@pytest.mark.parametrize(("times", "most"), [(20, 20), (20, 10), (28, 4), (7, 3), (8, 16), (8, 12)])
def test_branches_that_are_called_one_by_one_are_both_among_few_calls(times, most):
    calls = [Call(2 * t + b, 1000 - t, {"branch": torch.tensor(b)}) for t in range(times) for b in (0, 1)]
    chosen = evenly(calls, most)
    conditional = sum(int(call.arguments["branch"]) for call in chosen)
    assert len(chosen) == most and abs(2 * conditional - most) <= 1
    steps = [call.step for call in chosen]
    assert steps == sorted(set(steps)) and steps[0] < 2 and steps[-1] >= 2 * times * (1 - 1 / most) - 2


def test_calls_of_one_branch_each_time_are_spreadevenly():
    calls = [Call(t, 1000 - t, {}) for t in range(20)]
    assert [call.step for call in evenly(calls, 5)] == [0, 4, 8, 12, 16]
    assert evenly(calls, 64) == calls
