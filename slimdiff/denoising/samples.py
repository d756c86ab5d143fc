"""A few samples of a recorded call: what is fitted on many calls needs no more of each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slimdiff.denoising.trajectory import Call, map_tensors


def batch_size(call: Call) -> int | None:
    """How many samples a call has; None if its tensors do not have one entry for each, so that none can be taken out.

    Scalars are for all samples.
    """
    sizes: list[int] = []

    def see(tensor: Tensor) -> Tensor:
        sizes.extend(tensor.shape[:1])
        return tensor

    map_tensors(see, call.arguments)
    return sizes[0] if len(set(sizes)) == 1 else None


def some_of(call: Call, samples: Tensor) -> Call:
    """The call of these samples alone."""
    return replace(call, arguments=map_tensors(lambda t: t[samples] if t.ndim else t, call.arguments))


def spread(batch: int, taken: int, number: int) -> Tensor:
    """Evenly spread samples of a batch, others at each call; of both branches of guidance, if there are two."""
    if batch % 2:
        return ((torch.arange(taken) * batch) // taken + number) % batch
    half, pairs = batch // 2, max(1, taken // 2)
    one = ((torch.arange(pairs) * half) // pairs + number) % half
    return torch.cat([one, one + half])


def one_branch(batch: int, taken: int, number: int) -> Tensor:
    """Samples of a batch, others at each call; of two branches of guidance, now one and now the other."""
    stride = batch // 2 + (batch > 2)  # the same place in the other half, and one on
    return (number * stride + (torch.arange(taken) * batch) // taken) % batch
