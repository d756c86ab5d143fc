"""`config.pbtxt` of every model, in Triton's own protobuf schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.triton.components import Component
from deploy.triton.settings import TritonSettings
from exporters.graphs.reading import TensorSpec
from slimdiff.errors import require

PIPELINE = "text_to_image"
"""Name of the model that turns a prompt into an image."""
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
_REQUEST = {
    "prompt": "TYPE_STRING",
    "negative_prompt": "TYPE_STRING",
    "seed": "TYPE_INT64",
    "steps": "TYPE_INT32",
    "guidance": "TYPE_FP32",
}


def component_config(component: Component, settings: TritonSettings) -> str:
    """The configuration of one model, as text.

    Raises:
        MissingPackageError: without tritonclient, which has the schema.
    """
    inputs, outputs = ([_tensor(n, t, component) for n, t in s.items()] for s in (component.inputs, component.outputs))
    # One call of zeros before the model counts as ready: the first one allocates, and chooses kernels.
    zeros = {t["name"]: {"data_type": t["data_type"], "dims": t["dims"], "zero_data": True} for t in inputs}
    config = {
        "name": component.name,
        "platform": _PLATFORMS[component.backend],
        "default_model_filename": FILES[component.backend],
        "max_batch_size": component.max_batch,
        "input": inputs,
        "output": outputs,
        "instance_group": [{"count": settings.instances, "kind": f"KIND_{settings.device.upper()}"}],
        "model_warmup": [{"name": "zeros", "batch_size": 1, "inputs": zeros}],
    }
    if component.max_batch:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": settings.queue_delay_us}
    return _text(config)


def pipeline_config(size: Sequence[int | str], settings: TritonSettings) -> str:
    """The configuration of the model that calls all others, as text.

    Args:
        size: height and width of its images, in pixels.

    Raises:
        MissingPackageError: without tritonclient, which has the schema.
    """
    inputs = [{"name": n, "data_type": t, "dims": [1], "optional": n != "prompt"} for n, t in _REQUEST.items()]
    return _text(
        {
            "name": PIPELINE,
            "backend": "python",
            "default_model_filename": "model.py",
            "max_batch_size": 0,
            "input": inputs,
            "output": [{"name": "image", "data_type": "TYPE_UINT8", "dims": [*size, 3]}],
            "instance_group": [{"count": settings.concurrency, "kind": "KIND_CPU"}],
            "parameters": {"max_steps": {"string_value": str(settings.max_steps)}},
        }
    )


def _tensor(name: str, tensor: TensorSpec, component: Component) -> dict[str, Any]:
    """A tensor of a batch alone has no dims left, which Triton does not have: callers give it one more axis of 1."""
    inside = list(tensor.shape[1:] if component.max_batch else tensor.shape)
    flat = len(tensor.shape) == 1
    reshape = {"reshape": {"shape": inside}} if flat else {}
    return {"name": name, "data_type": _TYPES[tensor.dtype], "dims": inside + [1] * flat, **reshape}


def _text(config: dict[str, Any]) -> str:
    schema = require("tritonclient.grpc.model_config_pb2", "triton")
    from google.protobuf import json_format, text_format

    return text_format.MessageToString(json_format.ParseDict(config, schema.ModelConfig()))
