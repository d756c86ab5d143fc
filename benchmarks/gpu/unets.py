"""The UNets that are timed, with the ranks they may take, what they cost, and what they are called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.full_size import LATENTS, MODELS, Model, random_calls
from benchmarks.ranks import sliceable
from slimdiff.planning.costs import count_macs, count_parameters
from slimdiff.planning.knapsack import Layer
from slimdiff.slimming.skeleton import skeleton

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NARROWEST = 16
"""Dimensions per head, at least: narrower heads do not fuse."""


def model_of(name: str, batch: int = 1) -> Model:
    """A public configuration, with the latents of its own images and calls of this batch."""
    return replace(MODELS[name], latents=LATENTS.get(name, MODELS[name].latents), batch=batch)


def find_layers(unet: nn.Module) -> list[Layer]:
    """The layers that may be cut. Each keeps a quarter at least, and heads that fuse."""
    layers = []
    for layer in sliceable(unet):
        least = max(layer.dense_rank // 4, NARROWEST if layer.sites[0].heads > 1 else 1)
        layers.append(replace(layer, candidates=[rank for rank in layer.candidates if rank >= least]))
    return layers


def build(model: Model, ranks: Mapping[str, int], device: str, dtype: torch.dtype) -> nn.Module:
    """A UNet of these ranks (by module path) with random weights, made on the device."""
    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(**model.config)
    if ranks:
        unet = skeleton(unet, ranks)
    nn.Module.to(unet, dtype)  # diffusers' own warns of parts that must stay in float32, and there are none
    unet.eval().requires_grad_(False)
    if device == "meta":
        return unet
    unet.to_empty(device=device)
    randomise(unet)
    return unet.to(memory_format=torch.channels_last) if device == "cuda" else unet  # type: ignore[call-overload]


def randomise(module: nn.Module) -> None:
    """Give every weight a value at which activations keep their size."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))  # of norms


def make_inputs(model: Model, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one call, of the model's batch."""
    inputs = random_calls(model, 1)[0].to(device, dtype)
    if device == "cuda":
        inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    return inputs


def count(model: Model, ranks: Mapping[str, int]) -> dict[str, int]:
    """Parameters, and floating-point operations of one call at batch 1 (a multiply-accumulate is two)."""
    unet = build(model, ranks, "meta", torch.float32)
    call = random_calls(replace(model, batch=1), 1)[0]
    return {"parameters": count_parameters(unet), "flops": 2 * count_macs(unet, call)}
