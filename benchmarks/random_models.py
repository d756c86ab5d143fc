"""Whole pipelines of public configurations with random weights.

Enough for time, memory and sizes; images from them are noise, and say nothing of quality.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.full_size import MODELS, Model
from slimdiff import embedded
from slimdiff.planning.costs import count_parameters

VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
TINY_VAE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def random_unet(model: Model, latents: int | None = None) -> UNet2DConditionModel:
    """A UNet of a public configuration; the same weights every time.

    Args:
        model: its configuration.
        latents: height and width of the latents; the model's own if not given.

    Raises:
        RuntimeError: if the configuration does not make the public model's number of parameters.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**model.config, sample_size=latents or model.latents).eval()
    if count_parameters(unet) != model.parameters:
        raise RuntimeError(f"{count_parameters(unet):,} parameters, not {model.parameters:,}")
    return unet


def random_pipeline(name: str, latents: int | None = None) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline with all its parts, float32: UNet, VAE and CLIP text encoders of full size.

    The tokenizer is the embedded model's, of 177 words; the text encoders' vocabulary has its usual size all the same.

    Args:
        name: of `MODELS`: `sd15`, `sdxl` or `tiny`.
        latents: height and width of the latents; 64 (an image of 512 pixels) at full size if not given.
    """
    model, tiny = MODELS[name], name == "tiny"
    unet = random_unet(model, latents)
    length = 77 if not tiny else 40
    tokenizer = CLIPTokenizer.from_pretrained(embedded.path() / "tokenizer", model_max_length=length)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    usual = {"max_position_embeddings": length, "vocab_size": 49408 if not tiny else len(tokenizer), **ids}
    shape: dict[str, Any] = TINY_VAE if tiny else VAE
    levels = len(shape["block_out_channels"])
    vae = AutoencoderKL(
        **shape,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=(latents or model.latents) * 2 ** (levels - 1),
        force_upcast=name == "sdxl",
    ).eval()
    first = CLIPTextModel(CLIPTextConfig(**(TINY_TEXT if tiny else VIT_L), **usual)).eval()
    parts = {"vae": vae, "text_encoder": first, "tokenizer": tokenizer, "unet": unet}
    if model.conditions:
        config = CLIPTextConfig(**BIG_G, **usual, hidden_act="gelu", projection_dim=1280)
        second = CLIPTextModelWithProjection(config).eval()
        scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
        parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer, "scheduler": scheduler}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    parts["scheduler"] = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
