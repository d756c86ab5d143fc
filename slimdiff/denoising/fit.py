"""Whether the parts of a pipeline go together: a checkpoint may be put together of parts that do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slimdiff.errors import InputError

_UNETS = ("UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel")
_ON_LATENTS = (
    *_UNETS,
    "DiTTransformer2DModel",
    "HunyuanDiT2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
)
_OF_CLIP = ("StableDiffusion", "AnimateDiff", "TextToVideo", "VideoToVideo")
"""Beginnings of the names of pipelines whose denoiser takes the hidden states of CLIP's text encoders as they are."""
_TIME_IDS = (5, 6)
"""Of SDXL: its refiner has a score in the place of two of them."""


def check_fit(pipeline: Any) -> None:
    """Refuse a pipeline whose VAE, text encoders and denoiser have other widths than each other; absent parts pass.

    Raises:
        InputError: naming the parts, and what each has.
    """
    if fault := next(_faults(pipeline), None):
        raise InputError(
            f"the parts of this {type(pipeline).__name__} do not go together: {fault}; name a model whose parts were "
            "trained together"
        )


def _faults(pipeline: Any) -> Iterator[str]:
    name = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    denoiser: Any = getattr(pipeline, name, None)
    vae: Any = getattr(pipeline, "vae", None)
    kind, config = type(denoiser).__name__.removeprefix("Slim"), getattr(denoiser, "config", {})
    if kind in _ON_LATENTS and type(vae).__name__ == "AutoencoderKL":
        latents, takes = vae.config.latent_channels, config["in_channels"]
        gives = config.get("out_channels") or takes
        known = (latents,) if takes == gives else (latents, latents + 1, 2 * latents)  # with a variance, of one or all
        if takes < latents or gives not in known:
            yield f"the vae has {latents} latent channels, and the {name} takes {takes} and gives {gives}"
    encoders = [getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2")]
    texts = [encoder for encoder in encoders if encoder is not None]
    whole = "prior" not in pipeline.components and all(type(e).__name__.startswith("CLIPTextModel") for e in texts)
    if kind not in _UNETS or not texts or not whole or not type(pipeline).__name__.startswith(_OF_CLIP):
        return
    widths, takes = [encoder.config.hidden_size for encoder in texts], config["cross_attention_dim"]
    if isinstance(takes, int) and not config.get("encoder_hid_dim") and sum(widths) != takes:
        said = " and ".join(f"of {width}" for width in widths)
        yield f"the text encoders give embeddings {said}, and the unet takes {takes} (cross_attention_dim)"
    if config.get("addition_embed_type") == "text_time" and encoders[1] is not None:
        pooled, each = encoders[1].config.projection_dim, config["addition_time_embed_dim"]
        takes = config["projection_class_embeddings_input_dim"]
        if takes not in [pooled + each * ids for ids in _TIME_IDS]:
            sizes = f"{each} for each of {' or '.join(map(str, _TIME_IDS))} sizes"
            yield (
                f"the text_encoder_2 gives an embedding of {pooled}, beside {sizes}, and the unet takes {takes} "
                "(projection_class_embeddings_input_dim)"
            )
