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


def test_held_calls_are_not_the_calibrations(pipeline, calibration):
    calls = Calls(pipeline, PROMPTS, calibration.model_copy(update={"samples": 2}))
    assert len(calls.held) == len(calls.sensitivity)
    for ours, theirs in zip(calls.held, calls.sensitivity, strict=True):
        assert not torch.allclose(ours.arguments["sample"], theirs.arguments["sample"])
        assert not torch.allclose(ours.arguments["encoder_hidden_states"], theirs.arguments["encoder_hidden_states"])


def test_what_cannot_be_had_is_named(pipeline):
    ready = Calls.of([Call(0, 1, {})])
    assert ready.sensitivity[0].timestep == 1 and ready.has("sensitivity") and not ready.gives("held")
    with pytest.raises(InputError, match=r"max_error is measured on recorded denoiser calls: give some .*of\(held="):
        ready.held  # noqa: B018
    with pytest.raises(InputError, match="fitted and errors compensated on .* give at least one non-empty prompt"):
        Calls(pipeline, [], CalibrationSettings()).fitting  # noqa: B018
