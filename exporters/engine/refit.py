"""Giving an engine that was built without its weights the weights of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.engine.key import differences, weight_files
from exporters.graphs.naming import read_graph
from slimdiff.errors import InputError, SlimdiffError
from slimdiff.storage import manifest


def needs_weights(report: Mapping[str, Any]) -> bool:
    """Whether an engine was built without its weights; `report` is `check_engine`'s."""
    return bool(report["parts"]["options"]["strip_weights"])


def check_weights(report: Mapping[str, Any], onnx_file: Path | str) -> None:
    """Refuse a graph or weights that the engine was not built from: it would compute something, and say nothing.

    Args:
        report: from `check_engine`.
        onnx_file: the graph, its external data beside it.

    Raises:
        InputError: naming what differs.
    """
    onnx_file = Path(onnx_file)
    names = weight_files(onnx_file, read_graph(onnx_file).graph)
    here = {
        "graph": manifest.sha256_of(onnx_file),
        "weights": {name: manifest.sha256_of(onnx_file.parent / name) for name in names},
    }
    wrong = differences({name: report["parts"][name] for name in here}, here)
    if wrong:
        raise InputError(
            f"{onnx_file} is not what the engine was built from ({', '.join(wrong)}): give that graph and its "
            "weights, or build the engine again"
        )


def refit(trt: Any, engine: Any, report: Mapping[str, Any], onnx_file: Path | str) -> None:
    """Fill in the weights of an open engine. Written after TensorRT's documentation; it takes a GPU, and was not tried.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        engine: an `ICudaEngine` that was built with `strip_weights`; changed in place.
        report: from `check_engine`.
        onnx_file: the graph that the engine was built from, its external data beside it.

    Raises:
        InputError: if it is another graph, or has other weights.
        SlimdiffError: if TensorRT does not take them, or misses some.
    """
    check_weights(report, onnx_file)
    logger = trt.Logger(trt.Logger.ERROR)
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(onnx_file)):
        told = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise SlimdiffError(f"the engine does not take the weights of {onnx_file}: {told}")
    missing = refitter.get_missing_weights()
    if missing:
        raise SlimdiffError(f"{onnx_file} lacks {len(missing)} of the engine's weights, first {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise SlimdiffError(f"filling in the weights of {onnx_file} failed on the GPU")
