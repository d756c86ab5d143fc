"""Telling models that are distilled for few steps (LCM, Turbo, Lightning, Hyper) by what they bring along."""

from __future__ import annotations

import logging
import re
from typing import Any

from slimdiff.loading.naming import places_of
from slimdiff.settings import Sampling

log = logging.getLogger("slimdiff")
_NAMES = re.compile(r"(?<![a-z])(lcm|turbo|lightning|hyper|schnell|dmd2?|sdxs)(?![a-z])", re.IGNORECASE)
_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


def sign_of_distillation(pipeline: Any, name: str) -> str | None:
    """What says that a pipeline is distilled for few steps: its denoiser, its scheduler or its name; None if nothing.

    The names alone of Turbo and Lightning models show it: no file says what they were trained for.
    """
    if getattr(getattr(pipeline, "unet", None), "config", {}).get("time_cond_proj_dim"):
        return "its UNet takes the guidance as an input (time_cond_proj_dim)"
    scheduler = type(getattr(pipeline, "scheduler", None)).__name__
    if scheduler in _SCHEDULERS:
        return f"its scheduler is {scheduler}"
    named = next((found for place in places_of(name) if (found := _NAMES.search(place.name))), None)
    return f"its name says {named[0]}" if named else None


def warn_of_steps(pipeline: Any, name: str, sampling: Sampling) -> None:
    """Warn where a model that looks distilled is about to be calibrated at default steps and guidance."""
    defaults = sampling.model_dump(include={"steps", "guidance"} - sampling.model_fields_set)
    if defaults and (sign := sign_of_distillation(pipeline, name)):
        log.warning(
            "%s looks distilled for few steps (%s), and is calibrated with %s, the default: say the steps and the "
            "guidance that it is used with (such as --steps 4 --guidance 1, in a recipe calibration.sampling)",
            name,
            sign,
            " and ".join(f"{key} {value:g}" for key, value in defaults.items()),
        )
