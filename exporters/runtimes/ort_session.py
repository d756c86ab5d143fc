"""A graph in ONNX Runtime, with torch's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from exporters.runtimes.ort import ArraySession
from exporters.runtimes.session import PRECISIONS


class OnnxRuntimeSession:
    """A graph in ONNX Runtime; a `Session`. Arguments and errors are `inference_session`'s."""

    def __init__(self, file: Path, threads: int | None = None, *, provider: str = "cpu"):
        self._arrays = arrays = ArraySession(file, threads, provider=provider)
        self.source, self.runtime, self.inputs, self.outputs = str(file), arrays.runtime, arrays.inputs, arrays.outputs
        self.dtypes: dict[str, torch.dtype] = {name: getattr(torch, word) for name, word in arrays.dtypes.items()}
        self.precision = PRECISIONS[self.dtypes[next(iter(self.outputs))]]

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session`."""
        arrays = self._arrays.run({name: tensor.numpy() for name, tensor in feed.items()})
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, arrays, strict=True)}
