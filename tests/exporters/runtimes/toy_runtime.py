"""A runtime as a stranger would add it: onnx's own evaluator, which computes node by node in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from exporters.registry import Runtime
from exporters.runtimes.ort_session import OnnxRuntimeSession

DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}


class ReferenceSession:
    """A graph in onnx's evaluator; a `Session`."""

    def __init__(self, file: Path, threads: int | None = None, *, title: str):
        graph = onnx.load(str(file)).graph
        self._evaluator = ReferenceEvaluator(str(file))
        self.runtime, self.source, self.precision = f"{title} {onnx.__version__}", str(file), "fp32"
        self.inputs, self.outputs = _shapes(graph.input), _shapes(graph.output)
        values = (*graph.input, *graph.output)
        self.dtypes = {value.name: DTYPES[value.type.tensor_type.elem_type] for value in values}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._evaluator.run(None, dict(feed)), strict=True))


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int | str, ...]]:
    return {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


TOY = Runtime(
    name="toy",
    takes="graph",
    module="onnx",
    opens="toy_runtime:ReferenceSession",
    title="Toy",
    extra="onnx",
    precision="fp32",
    options={"title": "Toy"},
)


def open_engine(folder: Path, threads: int | None = None) -> OnnxRuntimeSession:
    """What stands for an engine: a graph in its file, in ONNX Runtime."""
    return OnnxRuntimeSession(folder / "model.engine", threads, provider="cpu")


TOY_ENGINE = Runtime(
    name="toy-engine", takes="engine", module="onnx", opens="toy_runtime:open_engine", title="Toy", extra="onnx"
)
