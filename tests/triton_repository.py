"""A stand-in for a Triton server: it reads a repository's configurations and runs its graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from exporters.runtimes.ort_session import inference_session

NUMPY = {"TYPE_FP32": "float32", "TYPE_FP16": "float16", "TYPE_INT64": "int64", "TYPE_UINT8": "uint8"}


def read_config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


class Server:
    """What a Triton server does with a call: checks it against config.pbtxt, reshapes it, and runs the model's file."""

    def __init__(self, models: Path):
        self.configs = {folder.name: read_config(folder) for folder in models.iterdir()}
        self.sessions = {
            name: inference_session(models / name / "1" / config.default_model_filename, threads=1)
            for name, config in self.configs.items()
            if config.platform == "onnxruntime_onnx"
        }
        self.batches: dict[str, list[int]] = {}

    def __call__(self, model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        config, session = self.configs[model], self.sessions[model]
        assert set(inputs) == {spec.name for spec in config.input}
        self.batches.setdefault(model, []).append(len(next(iter(inputs.values()))))
        feed = {spec.name: self.checked(config, spec, inputs[spec.name]) for spec in config.input}
        found = dict(zip(outputs, session.run(outputs, feed), strict=True))
        for spec in config.output:
            if spec.name in found:
                self.checked(config, spec, found[spec.name])
        return found

    @staticmethod
    def checked(config: Any, spec: Any, array: np.ndarray) -> np.ndarray:
        assert array.dtype == NUMPY[schema.DataType.Name(spec.data_type)]
        batch = list(array.shape[:1]) if config.max_batch_size else []
        assert all(0 < size <= config.max_batch_size for size in batch)
        assert list(array.shape[len(batch) :]) == list(spec.dims)
        return array.reshape(batch + list(spec.reshape.shape)) if spec.HasField("reshape") else array
