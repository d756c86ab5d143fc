"""Layers computing with bytes, as far as their errors go: inputs and weights rounded in torch to int8's steps.

It is for measuring before there is a graph. What quantises graphs is a library, elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError
from slimdiff.progress import bar

ACTIVATION_STEPS = 127
"""From 0 to the largest magnitude of an input: symmetric, as TensorRT takes no other."""
WEIGHT_STEPS = 64
"""The same of a channel of a weight: 7 bits, which no processor's sums clip."""

Range = tuple[float, float]


def product_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The linears and convolutions, by module path."""
    return {path: module for path, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


@torch.no_grad()
def count_layer_macs(denoiser: nn.Module, call: Call) -> dict[str, int]:
    """Multiply-adds that linears and convolutions make in a call, by module path, for those that int8 is worth it for.

    A layer that multiplies one row a sample gains nothing, and one that runs more than once has no single input.
    """
    macs: dict[str, int] = {}
    odd: set[str] = set()

    def count(path: str, module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        if path in macs or output.ndim < 3:
            odd.add(path)
        macs[path] = output.numel() * module.get_parameter("weight")[0].numel()

    with ExitStack() as hooks:
        for path, module in product_layers(denoiser).items():
            hooks.enter_context(module.register_forward_hook(partial(count, path)))
        predict(denoiser, call)
    return {path: value for path, value in macs.items() if path not in odd}


@torch.no_grad()
def input_ranges(denoiser: nn.Module, paths: Collection[str], calls: Sequence[Call]) -> dict[str, Range]:
    """The least and the largest number that goes into each layer in all calls, by module path.

    Raises:
        InputError: for an input that is not finite.
    """
    ends: dict[str, Range] = {}

    def see(path: str, call: Call, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        low, high = (float(end) for end in args[0].float().aminmax())
        if not -float("inf") < low <= high < float("inf"):
            raise InputError(
                f"the input of {path} is not finite at t={call.timestep}: no int8 steps can be measured; use the "
                "model in float32, with a scheduler that goes with it"
            )
        before = ends.get(path, (low, high))
        ends[path] = min(low, before[0]), max(high, before[1])

    for call in bar(calls, "ranges", "call"):
        with ExitStack() as hooks:
            for path in paths:
                module = denoiser.get_submodule(path)
                hooks.enter_context(module.register_forward_pre_hook(partial(see, path, call)))
            predict(denoiser, call)
    return ends


@contextmanager
def rounded(denoiser: nn.Module, ranges: Mapping[str, Range]) -> Iterator[None]:
    """Let layers compute on rounded inputs and weights, for the length of a block.

    Args:
        ranges: of their inputs, by module path; one number alone has no steps, and such an input is left as it is.
    """
    with ExitStack() as stack:
        for path, (low, high) in ranges.items():
            module = denoiser.get_submodule(path)
            weight = module.get_parameter("weight")
            stack.enter_context(exchanged(module, {"weight": _round_weight(weight.detach())}))
            if high > low:
                step = max(-low, high) / ACTIVATION_STEPS
                stack.enter_context(module.register_forward_pre_hook(partial(_round_input, step)))
        yield


def _round_input(step: float, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = args[0]
    fine = x if x.dtype == torch.float32 else x.float()
    bytes_ = torch.fake_quantize_per_tensor_affine(fine, step, 0, -ACTIVATION_STEPS - 1, ACTIVATION_STEPS)
    return (bytes_.to(x), *args[1:])


def _round_weight(weight: Tensor) -> Tensor:
    """`[out, ...]`, each channel in its own steps."""
    fine = weight.float()
    steps = fine.flatten(1).abs().amax(1) / WEIGHT_STEPS
    steps = torch.where(steps < torch.finfo(torch.float32).tiny, 1.0, steps)  # a channel of zeros has none
    zeros = torch.zeros(len(steps), dtype=torch.int32, device=steps.device)
    return torch.fake_quantize_per_channel_affine(fine, steps, zeros, 0, -WEIGHT_STEPS, WEIGHT_STEPS - 1).to(weight)
