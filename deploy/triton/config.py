"""`config.pbtxt` of every model, in Triton's own protobuf schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.triton.components import Component, TensorSpec
from deploy.triton.settings import TritonSettings
from slimdiff.errors import require

PIPELINE = "text_to_image"
"""Name of the model that turns a prompt into an image."""
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
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
    schema = _schema()
    batching = component.max_batch > 0
    config = schema.ModelConfig(
        name=component.name,
        platform=_PLATFORMS[component.backend],
        default_model_filename=FILES[component.backend],
        max_batch_size=component.max_batch,
        input=[schema.ModelInput(**_tensor(schema, t, batching)) for t in component.inputs],
        output=[schema.ModelOutput(**_tensor(schema, t, batching)) for t in component.outputs],
        instance_group=[_group(schema, settings.instances, settings.device)],
        model_warmup=[_warmup(schema, component, batching)],
    )
    if batching:
        config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    return _text(config)


def pipeline_config(size: Sequence[int], settings: TritonSettings) -> str:
    """The configuration of the model that calls all others, as text.

    Args:
        size: height and width of its images, in pixels.
        settings: how many requests at a time, how many steps.

    Raises:
        MissingPackageError: without tritonclient, which has the schema.
    """
    schema = _schema()
    config = schema.ModelConfig(
        name=PIPELINE,
        backend="python",
        default_model_filename="model.py",
        max_batch_size=0,
        input=[
            schema.ModelInput(name=name, data_type=kind, dims=[1], optional=name != "prompt")
            for name, kind in _REQUEST.items()
        ],
        output=[schema.ModelOutput(name="image", data_type="TYPE_UINT8", dims=[*size, 3])],
        instance_group=[_group(schema, settings.concurrency, "cpu")],
    )
    config.parameters["max_steps"].string_value = str(settings.max_steps)
    return _text(config)


def _schema() -> Any:
    return require("tritonclient.grpc.model_config_pb2", "triton")


def _tensor(schema: Any, tensor: TensorSpec, batching: bool) -> dict[str, Any]:
    """A tensor of a batch alone has no dims left, which Triton does not have: callers give it one more axis of 1."""
    flat = len(tensor.shape) == 1
    inside = list(tensor.shape[1:] if batching else tensor.shape)
    reshape = {"reshape": schema.ModelTensorReshape(shape=inside)} if flat else {}
    return {"name": tensor.name, "data_type": _TYPES[tensor.dtype], "dims": inside + [1] * flat, **reshape}


def _warmup(schema: Any, component: Component, batching: bool) -> Any:
    """One call of zeros before the model counts as ready: the first one allocates, and chooses kernels."""
    warmup = schema.ModelWarmup(name="zeros", batch_size=1)
    for tensor in component.inputs:
        described = _tensor(schema, tensor, batching)
        warmup.inputs[tensor.name].MergeFrom(
            schema.ModelWarmup.Input(data_type=described["data_type"], dims=described["dims"], zero_data=True)
        )
    return warmup


def _group(schema: Any, count: int, device: str) -> Any:
    return schema.ModelInstanceGroup(count=count, kind="KIND_GPU" if device == "gpu" else "KIND_CPU")


def _text(config: Any) -> str:
    from google.protobuf import text_format

    return text_format.MessageToString(config)
