"""What int8 costs: a layer alone in int8, in torch as its graph has it, and the change of the noise prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graphs.int8_layers import Int8Layer
from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.replay import Replay
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError
from slimdiff.planning.sensitivity import in_turn
from slimdiff.progress import bar

log = logging.getLogger("slimdiff")

ALONE_CALLS = 4
"""Recorded calls that a layer alone is measured on, at most, spread over those that there are."""


@torch.no_grad()
def macs_of(unet: nn.Module, paths: Sequence[str], call: Call) -> tuple[dict[str, int], int]:
    """Multiply-adds of linears and convolutions in one call, and the bytes of what goes into them and comes out."""
    found, size = dict.fromkeys(paths, 0), 0

    def count(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal size
        weight = module.get_parameter("weight")
        found[path] += output.numel() * weight[0].numel()
        size += (args[0].numel() + output.numel()) * output.element_size()

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(unet.get_submodule(path).register_forward_hook(partial(count, path)))
        predict(unet, call)
    return found, size


@torch.no_grad()
def errors_alone(
    unet: nn.Module,
    layers: Mapping[str, Int8Layer],
    calls: Sequence[Call],
    settled: Callable[[Mapping[str, float], Mapping[str, float]], bool] | None = None,
) -> dict[str, float]:
    """What each layer costs when it alone is in int8: the relative mean squared change of the noise prediction.

    A pass computes what lies behind its layer alone (`Replay`). How long all of them take is logged when that is known.

    Args:
        settled: whether what was known a call ago does as well as what is known now. No more calls are then taken; if
            not given, `ALONE_CALLS` are.
    """
    some = in_turn([calls[i * len(calls) // min(len(calls), ALONE_CALLS)] for i in range(min(len(calls), ALONE_CALLS))])
    energy, changed = 0.0, dict.fromkeys(layers, 0.0)
    known: dict[str, float] = {}
    with bar(total=len(some) * len(layers), name="int8, a layer alone", unit="pass") as shown:
        for call in some:
            replay = Replay(unet, call, list(layers))
            if not known:
                seconds = replay.seconds * sum(map(replay.share, layers))
                log.info(
                    "int8: what %d layers cost alone: about %.0f s a call, of %d calls at most",
                    *(len(layers), seconds, len(some)),
                )
            energy += float(replay.output.double().square().sum())
            for path, layer in layers.items():
                with in_int8(unet.get_submodule(path), layer):
                    changed[path] += float((replay.predict(path) - replay.output).double().square().sum())
                shown.update()
            if not 0 < energy < float("inf"):
                raise InputError("the UNet predicts nothing, or what is not finite: int8 cannot be measured on it")
            before, known = known, {path: error / energy for path, error in changed.items()}
            if before and settled is not None and settled(before, known):
                break
    return known


@contextmanager
def in_int8(module: nn.Module, layer: Int8Layer) -> Iterator[None]:
    """Let a linear or convolution compute in torch what a graph computes in int8, for the length of a block."""
    scale, zero = (float(part.reshape(-1)[0]) for part in (layer.scales[0], layer.zero_points[0]))
    limits = np.iinfo(layer.zero_points[0].dtype)

    def rounded(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.fake_quantize_per_tensor_affine(args[0], scale, int(zero), limits.min, limits.max), *args[1:])

    weights = {"weight": torch.from_numpy(layer.weight())}
    if getattr(module, "bias", None) is not None and (bias := layer.bias()) is not None:
        weights["bias"] = torch.from_numpy(bias.copy())
    with exchanged(module, weights), module.register_forward_pre_hook(rounded):
        yield
