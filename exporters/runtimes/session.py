"""What a runtime offers once a graph or an engine is open in it: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from slimdiff.errors import InputError

Shape = tuple[int | str, ...]
"""Sizes, and names of open dims: those of one name have one size in a call."""
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Session(Protocol):
    """An open graph or engine. It stays where it was opened; tensors go in and come out on the CPU.

    Attributes:
        runtime: what runs it, for people: `ONNX Runtime 1.31.1, CPU`.
        source: the file, for messages.
        precision: `fp32`, `fp16` or `bf16`: the coarsest that it computes in.
        inputs: name -> shape.
        outputs: likewise.
        dtypes: name -> dtype, of inputs and outputs.
    """

    runtime: str
    source: str
    precision: str
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs for all inputs, which have the shapes and dtypes that the session says."""


def answer(session: Session, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a session on tensors of any dtype and device.

    Args:
        session: open.
        given: its inputs by name.

    Returns:
        its outputs by name, on the CPU, in its own dtypes.

    Raises:
        InputError: for other inputs than the session has, or a shape that it was not made for.
    """
    _check(session, given)
    return session.run({name: given[name].detach().to("cpu", session.dtypes[name]).contiguous() for name in given})


def _check(session: Session, given: Mapping[str, Tensor]) -> None:
    if set(given) != set(session.inputs):
        raise InputError(f"{session.source} takes {', '.join(session.inputs)}; given were {', '.join(given)}")
    sizes: dict[str, int] = {}
    for name, takes in session.inputs.items():
        shape = tuple(given[name].shape)
        wanted = [d if isinstance(d, int) else sizes.setdefault(d, n) for d, n in zip(takes, shape, strict=False)]
        steps = [_step(d) for d in takes]
        if len(shape) != len(takes) or list(shape) != wanted or any(n % k for n, k in zip(shape, steps, strict=True)):
            raise InputError(
                f"{name} has shape {shape}, but {session.source} takes "
                + ", ".join(f"{n} ({', '.join(map(str, s))})" for n, s in session.inputs.items())
                + ": ask for images of that size and number, or export for others (slimdiff export --height --width "
                "--batch, or --dynamic batch,size)"
            )


def _step(dim: int | str) -> int:
    """What an open dim is a multiple of: 8 for `8*height`."""
    factor = dim.partition("*")[0] if isinstance(dim, str) else ""
    return int(factor) if factor.isdigit() else 1


def open_dim(name: str, axis: int) -> str:
    """What to call an open dim where the runtime has lost its name: the first axis is the batch, of all tensors."""
    return "batch" if axis == 0 else f"{name}.{axis}"
