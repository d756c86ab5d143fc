"""How much of an image is made anew: of image to image and inpainting, whose strength leaves out the first steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import ceil
from typing import Any

from slimdiff.errors import InputError


def check_strength(pipeline: Any, steps: int, arguments: Mapping[str, Any]) -> None:
    """Refuse a strength that the pipeline does not take, or at which not one of its steps is left.

    Args:
        steps: of the scheduler.
        arguments: of the pipeline's call; its own default counts where they name no strength.

    Raises:
        InputError: naming steps and a strength that would do.
    """
    kind, takes = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    if "strength" not in takes:
        if "strength" in arguments:
            raise InputError(f"{kind} takes no strength, which says how much of an image is changed: leave it out")
        return
    strength = arguments.get("strength", takes["strength"].default)
    if not isinstance(strength, int | float) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise InputError(f"strength is a number from 0 to 1, not {strength!r}")
    # Pipelines of transformers take the share of a step for a whole one.
    if "denoising_start" in arguments or getattr(pipeline, "unet", None) is None or int(steps * strength) >= 1:
        return
    if strength == 0:
        raise InputError(f"{kind} changes nothing of an image at strength 0: give more")
    least = next(n for n in range(max(1, ceil(1 / strength) - 1), ceil(1 / strength) + 2) if int(n * strength) >= 1)
    said = "" if "strength" in arguments else ", its default,"
    share = ceil(1000 / steps) / 1000
    raise InputError(
        f"{kind} at strength {strength:g}{said} leaves not one of {steps} steps: take {least} steps or more, or a "
        f"strength of at least {share:g}"
    )
