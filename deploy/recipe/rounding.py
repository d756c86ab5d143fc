"""What int8 is calibrated on: recorded calls of a model's own trajectories."""

from __future__ import annotations

import logging
from typing import Any

from deploy.recipe.prompts import calibration_prompts, default_source
from exporters.settings import ExportSettings
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.trajectory import Call
from slimdiff.settings import CalibrationSettings, PlanSettings, Sampling

log = logging.getLogger("slimdiff")
_CALLS_OF_IMAGE = 8
"""Recorded of one image's: `ExportSettings.int8_calls` says so."""


def prompts_for_int8(model: str, source: str | None, sampling: Sampling, settings: ExportSettings) -> list[str]:
    """As many prompts as `settings.int8_calls` need images.

    Args:
        source: of prompts; the default one of the model if not given.
    """
    images = -(-settings.int8_calls // min(_CALLS_OF_IMAGE, sampling.steps))
    return calibration_prompts(source or default_source(model), images)


def record_for_int8(pipeline: Any, prompts: list[str], sampling: Sampling, settings: ExportSettings) -> list[Call]:
    """Calls of the denoiser, of all times, on images of prompts; pictures, where it needs some, are grey."""
    log.info("recording calls for int8: %d images of %d steps", len(prompts), sampling.steps)
    inputs, one = [], sampling.model_copy(update={"batch": 1})
    for prompt in prompts:
        rows, one = neutral_inputs(pipeline, 1, one, prompt)
        inputs += rows
    watched = CalibrationSettings(samples=len(inputs), sampling=one)
    return Calls(pipeline, inputs, watched, PlanSettings(fitting_calls=settings.int8_calls)).fitting
