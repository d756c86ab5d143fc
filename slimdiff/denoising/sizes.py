"""Which sizes of images and videos a pipeline makes as they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slimdiff.errors import InputError

_RESIZING = ("UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel")
"""UNets that bring what they scale up to the size of what it is added to, so any size goes through them."""

LATENT_UPSCALER = "StableDiffusionLatentUpscalePipeline"
"""Whose latents have twice the sides of those of the picture that it encodes."""


def autoencoder_of(pipeline: Any) -> Any:
    """What makes a pipeline's images of latents; None of one that denoises images themselves."""
    parts = (getattr(pipeline, name, None) for name in ("vae", "vqvae", "movq"))
    return next((part for part in parts if part is not None), None)


def pixels_per_latent(pipeline: Any) -> int:
    """Pixels per latent along a side; 1 of a pipeline that denoises images themselves."""
    blocks = getattr(getattr(autoencoder_of(pipeline), "config", None), "block_out_channels", None)
    return getattr(pipeline, "vae_scale_factor", 2 ** (len(blocks) - 1) if blocks else 1)


def enlarges(pipeline: Any) -> int:
    """How many times larger a side of the images is than that of the picture they are made from: an upscaler's."""
    kind = type(pipeline).__name__
    if kind == LATENT_UPSCALER:
        return 2
    in_pixels = hasattr(pipeline, "low_res_scheduler") or kind == "LDMSuperResolutionPipeline"
    return pixels_per_latent(pipeline) if in_pixels else 1


def check_size(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a height, width or number of frames that the pipeline would round, or fail on halfway.

    Args:
        arguments: of the pipeline's call; `height` and `width` in pixels.

    Raises:
        InputError: naming the nearest right ones.
    """
    kind, step = type(pipeline).__name__, _step(pipeline)
    for name in ("height", "width", "num_frames"):
        size = arguments.get(name)
        if size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{name} is a whole number of at least 1, not {size!r}")
        if name != "num_frames" and size % step:
            below = size // step * step
            near = f"{below} or {below + step}" if below else str(step)
            raise InputError(f"{name} {size} is no size of {kind}, whose sizes are multiples of {step}: give {near}")
    frames, every, most = arguments.get("num_frames") or 1, _frame_step(pipeline), _most_frames(pipeline)
    if (frames - 1) % every:
        below = (frames - 1) // every * every + 1
        raise InputError(
            f"num_frames {frames} is no length of {kind}, whose videos have a multiple of {every} and one more: "
            f"give {below} or {below + every}"
        )
    if most is not None and frames > most:
        raise InputError(f"num_frames {frames} is more than {kind} makes at once: give at most {most}")


def _step(pipeline: Any) -> int:
    """What heights and widths must be multiples of, pixels."""
    names = ("vae_spatial_compression_ratio", "vae_scale_factor_spatial", "vae_scale_factor")
    scale = next((n for name in names if isinstance(n := getattr(pipeline, name, None), int)), 1)
    # A T2I-Adapter rounds where a UNet does not.
    scale = math.lcm(scale, getattr(getattr(pipeline, "adapter", None), "total_downscale_factor", 1))
    denoiser, config = _denoiser(pipeline)
    if hasattr(pipeline, "_pack_latents") and not hasattr(pipeline, "transformer_spatial_patch_size"):
        return 2 * scale  # Flux: two by two latents are one token, whatever its transformer's patch
    patch = config.get("patch_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    if isinstance(patch, int):
        return patch * scale
    blocks = config.get("down_block_types")
    if not blocks or any(base.__name__ in _RESIZING for base in type(denoiser).__mro__):
        return scale
    return scale * 2 ** (len(blocks) - 1)


def _frame_step(pipeline: Any) -> int:
    names = ("vae_temporal_compression_ratio", "vae_scale_factor_temporal")
    return next((n for name in names if isinstance(n := getattr(pipeline, name, None), int)), 1)


def _most_frames(pipeline: Any) -> int | None:
    return _denoiser(pipeline)[1].get("motion_max_seq_length")


def _denoiser(pipeline: Any) -> tuple[Any, Mapping[str, Any]]:
    """The unet or transformer, perhaps in another runtime, and its configuration."""
    named = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
    denoiser = next((one for one in named if one is not None), None)  # a compiled module has no truth value
    config = getattr(denoiser, "config", None)
    return denoiser, config if isinstance(config, Mapping) else {}
