"""ONNX Runtime, on the provider that was asked for and on no other; loads no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from exporters.machine import usable_cores
from slimdiff.errors import InputError, MissingPackageError, require

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def inference_session(file: Path, provider: str = "cpu", threads: int | None = None) -> Any:
    """ONNX Runtime's own session for a graph.

    Args:
        file: the graph, its weights beside it.
        provider: `cpu`, `cuda` or `tensorrt`.
        threads: within one operator; its own default if not given, or the cores that may be used.

    Raises:
        InputError: for a graph that ONNX Runtime does not load.
        MissingPackageError: if ONNX Runtime is not here, or would have fallen back to another provider.
    """
    ort = require("onnxruntime", "onnx" if provider == "cpu" else "gpu")
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise MissingPackageError(
            f"this onnxruntime has no {wanted}: pip install 'slimdiff[gpu]' in an environment of its own"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is wrong comes as an exception
    if threads is None and usable_cores() < (os.cpu_count() or 1):
        # Its own choice counts cores that this process may not use; their threads then wait for one another.
        threads = usable_cores()
    if threads is not None:
        options.intra_op_num_threads = threads
    # What TensorRT does not take runs in CUDA.
    providers = [wanted] if provider != "tensorrt" else [wanted, PROVIDERS["cuda"]]
    try:
        session = ort.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # ONNX Runtime has a dozen exception classes and no common base
        raise InputError(f"ONNX Runtime does not load {file}: {str(error).splitlines()[0]}") from error
    # A provider whose libraries are missing is replaced by the CPU without an error.
    if session.get_providers()[0] != wanted:
        raise MissingPackageError(
            f"{wanted} could not start (are its libraries missing?); ONNX Runtime would run on "
            f"{', '.join(session.get_providers())} instead"
        )
    session.disable_fallback()
    return session
