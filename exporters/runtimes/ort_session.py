"""A graph in ONNX Runtime, with torch's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from exporters.runtimes.ort import inference_session
from exporters.runtimes.session import PRECISIONS, Shape
from slimdiff.errors import require

_TITLES = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int64)": torch.int64}


class OnnxRuntimeSession:
    """A graph in ONNX Runtime; a `Session`. Data go through the CPU on every provider: next to a UNet that is nothing.

    Arguments and errors are `inference_session`'s.
    """

    def __init__(self, file: Path, provider: str = "cpu", threads: int | None = None):
        session = inference_session(file, provider, threads)
        self._session = session
        version = require("onnxruntime", "onnx").__version__
        self.runtime = f"ONNX Runtime {version}, {_TITLES[provider]}"
        self.source = str(file)
        self.inputs: dict[str, Shape] = {i.name: tuple(i.shape) for i in session.get_inputs()}
        self.outputs: dict[str, Shape] = {o.name: tuple(o.shape) for o in session.get_outputs()}
        self.dtypes = {t.name: _DTYPES[t.type] for t in (*session.get_inputs(), *session.get_outputs())}
        self.precision = PRECISIONS[self.dtypes[next(iter(self.outputs))]]

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session`."""
        found = self._session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, found, strict=True)}
