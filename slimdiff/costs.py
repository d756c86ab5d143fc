"""What a model costs: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimdiff.trajectory import Call


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, in the dtype they are held in."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def count_macs(denoiser: nn.Module, call: Call) -> int:
    """Multiply-accumulates of one call, for its whole batch: linears, convolutions and attention products."""
    counter = FlopCounterMode(display=False)
    parameter = next(denoiser.parameters())
    # The counter knows attention by its plain products; which kernel runs does not change how many there are.
    with sdpa_kernel(SDPBackend.MATH), counter:
        denoiser(**call.to(parameter.device, parameter.dtype), return_dict=False)
    return counter.get_total_flops() // 2
