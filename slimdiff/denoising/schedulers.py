"""The scheduler that images are made with, where it is not the checkpoint's own: a class of diffusers, by its name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from slimdiff.errors import InputError

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


def check_strength(pipeline: Any, inputs: Mapping[str, Any], steps: int) -> None:
    """Refuse an image to start from at so little noise that no step of a UNet's pipeline is left.

    Args:
        inputs: of the pipeline's call.
        steps: of the scheduler.

    Raises:
        InputError: saying what would leave some.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    if "strength" not in takes or not hasattr(pipeline, "unet") or inputs.get("denoising_start") is not None:
        return
    strength = inputs.get("strength", takes["strength"].default)
    if isinstance(strength, int | float) and int(steps * strength) < 1:
        raise InputError(
            f"{type(pipeline).__name__} starts from an image at strength {strength}, and of {steps} steps that leaves "
            "none: give more steps, or another strength (--argument strength=0.8)"
        )
