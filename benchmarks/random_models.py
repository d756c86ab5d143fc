"""Whole pipelines of public configurations with random weights, and ranks for slim UNets without calibration.

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
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.full_size import MODELS, Model
from slimdiff import Budget, embedded
from slimdiff.groups import find_sites
from slimdiff.planning.costs import CostTable, count_parameters, parameter_costs
from slimdiff.planning.feasibility import most_removable, removed_within
from slimdiff.planning.knapsack import Layer, choose, distances, find_layers
from slimdiff.planning.planner import chosen_sites
from slimdiff.settings import PlanSettings

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


def sliceable(denoiser: nn.Module) -> list[Layer]:
    """The layers that are slimmed by default, with the ranks they may take."""
    planning = PlanSettings()
    return find_layers(chosen_sites(find_sites(denoiser)[0], planning), planning.align)


def uniform_ranks(denoiser: nn.Module, budget: str) -> dict[str, int]:
    """Ranks by module path: the same share goes from every transformer block, as a budget of parameters says."""
    layers = sliceable(denoiser)
    table = parameter_costs(denoiser, [site for layer in layers for site in layer.sites])
    removed = removed_within(Budget(budget), table, layers)
    savings = [table.savings(layer.path, layer.candidates) for layer in layers]
    picked = choose(savings, distances(layers, savings, [1.0] * len(layers), removed), removed)
    return {layer.path: layer.candidates[index] for layer, index in zip(layers, picked, strict=True)}


def ranks_for_speedup(denoiser: nn.Module, table: CostTable, speedup: float) -> dict[str, int]:
    """Ranks by module path that a table of latencies promises a speedup for.

    Random weights have no errors to weigh: a layer's is taken to be the square of the share that it loses, times its
    parameters. Where the table promises less at the smallest ranks, nine tenths of that are sought.
    """
    layers = sliceable(denoiser)
    parameters = parameter_costs(denoiser, [site for layer in layers for site in layer.sites])
    removed = min(Budget(speedup=speedup).removed(table.dense), 0.9 * most_removable(table, layers))
    savings = [table.savings(layer.path, layer.candidates) for layer in layers]
    errors = []
    for layer in layers:
        saved = parameters.savings(layer.path, layer.candidates)
        errors.append(saved**2 / float(parameters.savings(layer.path, [0])[0]))
    picked = choose(savings, errors, removed)
    return {layer.path: layer.candidates[index] for layer, index in zip(layers, picked, strict=True)}
