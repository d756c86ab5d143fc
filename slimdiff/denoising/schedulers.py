"""The scheduler that images are made with, where it is not the checkpoint's own: a class of diffusers, by its name."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from slimdiff.errors import InputError
from slimdiff.settings import Sampling

SHORT = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "dpmpp_single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Names that people use for diffusers' classes."""
_DECIDING = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""Settings that say what a model was trained for: with others, its images are wrong."""


def make_scheduler(own: Any, name: str) -> Any:
    """The scheduler of that name with the settings of a pipeline's own.

    Args:
        name: a class of diffusers, or one of `SHORT`.

    Raises:
        InputError: if there is none, the own one cannot be exchanged for it, or it would drop a setting that the model
            was trained with.
    """
    kinds = list(getattr(own, "compatibles", []))
    usual = inspect.signature(type(own).__init__).parameters
    if "beta_schedule" in usual:  # the same noise, though LCM's scheduler does not name the others
        kinds += [kind for name in SHORT.values() if (kind := getattr(diffusers, name))]
    compatible = {kind.__name__: kind for kind in kinds}
    wanted = SHORT.get(name.lower(), name)
    kind = compatible.get(wanted)
    if kind is None:
        known = inspect.isclass(getattr(diffusers, wanted, None)) and wanted.endswith("Scheduler")
        what = f"{type(own).__name__} cannot be exchanged for {wanted}" if known else f"there is no scheduler {name!r}"
        short = [short for short, full in SHORT.items() if full in compatible]
        raise InputError(f"{what}: give {', '.join([*short, 'or a name such as ' + min(compatible, default='none')])}")
    takes = inspect.signature(kind.__init__).parameters
    for key in _DECIDING:
        value = own.config.get(key)
        if key not in takes and key in usual and value != usual[key].default:
            raise InputError(
                f"{wanted} has no {key}, and the model was trained with {key}={value}: take another scheduler"
            )
    # Where its own scheduler knows no clipping, the model's latents are not to be clipped.
    unclipped = {"clip_sample": False} if "clip_sample" in takes and "clip_sample" not in own.config else {}
    return kind.from_config(own.config, **unclipped)


def with_scheduler(pipeline: DiffusionPipeline, sampling: Sampling) -> DiffusionPipeline:
    """The pipeline with the scheduler that the sampling names, if it names one.

    Raises:
        InputError: if it takes no other scheduler, or not that one.
    """
    if sampling.scheduler is None:
        return pipeline
    own = getattr(pipeline, "scheduler", None)
    if own is None:
        raise InputError(f"{type(pipeline).__name__} has no scheduler to exchange: leave out the scheduler")
    other = copy.copy(pipeline)
    other.scheduler = make_scheduler(own, sampling.scheduler)
    return other


def calls_of(pipeline: Any, steps: int) -> int:
    """How often a pipeline calls its denoiser in that many steps: some samplers do so several times a step."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    try:
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)
    except Exception:  # they raise anything for a number that they do not take, and ask for more than it
        return steps
