"""What int8 costs: a layer alone in int8, in torch as its graph has it, and the change of the noise prediction."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graphs.int8_layers import Int8Layer
from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.trajectory import Call, predict

log = logging.getLogger("slimdiff")


@torch.no_grad()
def macs_of(unet: nn.Module, paths: Sequence[str], call: Call) -> dict[str, int]:
    """Multiply-adds of linears and convolutions in one call."""
    found = dict.fromkeys(paths, 0)

    def count(path: str, module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.get_parameter("weight")
        found[path] += output.numel() * weight[0].numel()

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(unet.get_submodule(path).register_forward_hook(partial(count, path)))
        predict(unet, call)
    return found


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
