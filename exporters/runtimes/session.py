"""What a runtime offers once a graph or an engine is open in it: named arrays in, named arrays out. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Shape = tuple[int | str, ...]
"""Sizes, and names of open dims: those of one name have one size in a call."""


class Session(Protocol):
    """An open graph or engine. It stays where it was opened; numpy's arrays go in and come out.

    Attributes:
        runtime: what runs it, for people: `ONNX Runtime 1.31.1, CPU`.
        source: the file, for messages.
        precision: `fp32`, `fp16`, `bf16` or `int8`: the coarsest that it computes in.
        inputs: name -> shape.
        outputs: name -> shape.
        dtypes: name -> numpy's name of the dtype, of inputs and outputs.
    """

    runtime: str
    source: str
    precision: str
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    dtypes: dict[str, str]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs for all inputs, which have the shapes and dtypes that the session says."""


def open_dim(name: str, axis: int) -> str:
    """What to call an open dim where the runtime has lost its name: the first axis is the batch, of all tensors."""
    return "batch" if axis == 0 else f"{name}.{axis}"
