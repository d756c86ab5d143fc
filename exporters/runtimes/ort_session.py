"""ONNX Runtime, on the provider that was asked for and on no other; loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporters.dtypes import DTYPES, PRECISIONS
from exporters.machine import exact_int8, usable_cores
from exporters.runtimes.session import Shape
from slimdiff.errors import InputError, MissingPackageError, require

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
QUANTISER = b"QuantizeLinear"
"""In the bytes of every graph with a node of that kind."""
_TITLES = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}


class OnnxRuntimeSession:
    """A graph in ONNX Runtime; a `Session`. Data go through the CPU on every provider: next to a UNet that is nothing.

    Arguments and errors are `inference_session`'s.
    """

    def __init__(self, file: Path, threads: int | None = None, *, provider: str = "cpu", as_written: bool = False):
        self._session = inference_session(file, provider, threads, as_written=as_written)
        self.source = str(file)
        self.runtime = f"ONNX Runtime {require('onnxruntime', 'onnx').__version__}, {_TITLES[provider]}"
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs: dict[str, Shape] = {i.name: tuple(i.shape) for i in inputs}
        self.outputs: dict[str, Shape] = {o.name: tuple(o.shape) for o in outputs}
        words = {t.name: t.type.removeprefix("tensor(").removesuffix(")") for t in (*inputs, *outputs)}
        self.dtypes = {name: DTYPES.get(word, word) for name, word in words.items()}
        self.precision = next(PRECISIONS[d] for d in self.dtypes.values() if d in PRECISIONS)

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Session`."""
        return dict(zip(self.outputs, self._session.run(None, feed), strict=True))


def inference_session(
    graph: Path | bytes, provider: str = "cpu", threads: int | None = None, *, as_written: bool = False
) -> Any:
    """ONNX Runtime's own session for a graph.

    Args:
        graph: its file, weights beside it; or the content of one that has its weights inside.
        provider: `cpu`, `cuda` or `tensorrt`.
        threads: within one operator; its own default if not given, or the cores that may be used.
        as_written: node by node, nothing fused: of a graph in int8, products of the floats that it says.

    Raises:
        InputError: for a graph that ONNX Runtime does not load.
        MissingPackageError: if ONNX Runtime is not here, or would have fallen back to another provider.
    """
    ort = require("onnxruntime", "onnx" if provider == "cpu" else "gpu")
    needed = PROVIDERS[provider]
    if needed not in ort.get_available_providers():
        raise MissingPackageError(
            f"this onnxruntime has no {needed}: pip install 'slimdiff[gpu]' in an environment of its own"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is wrong comes as an exception
    if threads is None and usable_cores() < (os.cpu_count() or 1):
        # Its own choice counts cores that this process may not use; their threads then wait for one another.
        threads = usable_cores()
    if threads is not None:
        options.intra_op_num_threads = threads
    if not exact_int8():  # then products of bytes in Q/DQ or dynamic graphs are computed by slower kernels, exactly
        options.add_session_config_entry("session.x64quantprecision", "1")
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # It makes a Gemm of a linear whose input is quantised, then a quantiser of two dtypes, and does not load that.
    spoilt = ["MatMulAddFusion"] if QUANTISER in (graph if isinstance(graph, bytes) else graph.read_bytes()) else []
    # What TensorRT does not take runs in CUDA.
    providers = [needed] if provider != "tensorrt" else [needed, PROVIDERS["cuda"]]
    try:
        source = graph if isinstance(graph, bytes) else str(graph)
        session = ort.InferenceSession(source, options, providers=providers, disabled_optimizers=spoilt)
    except Exception as error:  # ONNX Runtime has a dozen exception classes and no common base
        name = "a part of a graph" if isinstance(graph, bytes) else graph
        raise InputError(f"ONNX Runtime does not load {name}: {str(error).splitlines()[0]}") from error
    # A provider whose libraries are missing is replaced by the CPU without an error.
    if session.get_providers()[0] != needed:
        raise MissingPackageError(
            f"{needed} could not start (are its libraries missing?); ONNX Runtime would run on "
            f"{', '.join(session.get_providers())} instead"
        )
    session.disable_fallback()
    return session
