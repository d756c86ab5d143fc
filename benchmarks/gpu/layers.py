"""Milliseconds of a UNet's layers by rank, measured on the device: what the latency-budgeted UNet is cut by."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.full_size import Model
from benchmarks.gpu.timing import Run, median, timed, without_starts
from benchmarks.gpu.unets import build, make_inputs, randomise
from slimdiff.groups import GROUPS
from slimdiff.planning.costs import CostTable
from slimdiff.planning.knapsack import Layer

RANKS = 6
"""Ranks that a layer is measured at, beside half the dense one."""


@dataclass(frozen=True)
class Shape:
    """All of a layer that its time depends on: layers of one shape are measured once."""

    dense_rank: int
    heads: int
    inputs: tuple[tuple[int, ...], ...]


def half(layer: Layer) -> int:
    """The rank that is nearest to half the dense one."""
    return min(layer.candidates, key=lambda rank: abs(rank - layer.dense_rank / 2))


def thin(layer: Layer) -> Layer:
    """The layer with the candidates that are measured, spread evenly from the least to the dense one."""
    picks = np.linspace(0, len(layer.candidates) - 1, RANKS).round().astype(int)
    return replace(layer, candidates=sorted({half(layer), *(layer.candidates[i] for i in picks)}))


@torch.no_grad()
def measure_layers(
    model: Model, layers: Sequence[Layer], device: str, dtype: torch.dtype, rounds: int
) -> tuple[CostTable, dict[str, float]]:
    """Time each layer alone at its candidate ranks, and the whole model dense and at half its ranks.

    Returns:
        the table, scaled so that the layers' differences add up to the whole model's; and `dense_ms` and `half_ms` of
        the whole models, with that scale as `anchor`.
    """
    halves = {layer.path: half(layer) for layer in layers}
    wholes = {name: build(model, ranks, device, dtype) for name, ranks in (("dense", {}), ("half", halves))}
    inputs = make_inputs(model, device, dtype)
    shapes = _shapes(wholes["dense"], inputs, layers)
    runs: dict[Any, Run] = {
        name: without_starts(partial(unet, **inputs, return_dict=False), device) for name, unet in wholes.items()
    }
    for shape, layer in {shapes[layer.path]: layer for layer in layers}.items():
        tensors = [torch.randn(size, device=device, dtype=dtype) for size in shape.inputs]
        for rank in layer.candidates:
            module = _resized(wholes["dense"].get_submodule(layer.path), layer, rank)
            runs[shape, rank] = without_starts(partial(module, *tensors), device)
    times = {key: median(seconds) * 1e3 for key, seconds in timed(runs, device, rounds).items()}
    curves: dict[str, dict[int, float]] = {}
    for layer in layers:  # noise may say that a larger rank is faster
        rising = accumulate((times[shapes[layer.path], rank] for rank in layer.candidates), max)
        curves[layer.path] = dict(zip(layer.candidates, rising, strict=True))
    alone = CostTable("latency_ms", times["dense"], curves)
    expected, whole = times["dense"] - alone.of(halves), times["dense"] - times["half"]
    anchor = whole / expected if expected > 0 and 0.25 < whole / expected < 4 else 1.0
    scaled = {path: {rank: ms * anchor for rank, ms in curve.items()} for path, curve in curves.items()}
    figures = {"dense_ms": times["dense"], "half_ms": times["half"], "anchor": anchor}
    return replace(alone, layers=scaled), figures


def _shapes(unet: nn.Module, inputs: dict[str, Any], layers: Sequence[Layer]) -> dict[str, Shape]:
    """By module path."""
    shapes: dict[str, Shape] = {}

    def see(layer: Layer, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states")]
        sizes = tuple(tuple(value.shape) for value in values if isinstance(value, Tensor))
        shapes[layer.path] = Shape(layer.dense_rank, layer.sites[0].heads, sizes)

    with ExitStack() as hooks:
        for layer in layers:
            module = unet.get_submodule(layer.path)
            hooks.enter_context(module.register_forward_pre_hook(partial(see, layer), with_kwargs=True))
        unet(**inputs, return_dict=False)
    return shapes


def _resized(module: nn.Module, layer: Layer, rank: int) -> nn.Module:
    """A copy of a layer at another rank, with random weights."""
    module = copy.deepcopy(module)
    if rank < layer.dense_rank:
        for site in layer.sites:
            GROUPS[site.group].resize(module, site, rank)
    randomise(module)
    return module.requires_grad_(False)
