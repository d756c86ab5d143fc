"""Recorded calls: each kind made once, when first asked for, and refused where it cannot be had."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS

from slimdiff import CalibrationSettings, InputError, PlanSettings
from slimdiff.denoising import calls as calls_module
from slimdiff.denoising.calls import Calls
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
