"""What a Triton model repository is written with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimdiff.settings import Settings, like

_IMAGE = like(r"[\w./:@-]+", "a container image such as nvcr.io/nvidia/tritonserver:26.07-py3")


class TritonSettings(Settings):
    """How the server runs the models."""

    backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    """`tensorrt` serves the engines that there are, of the UNet at least; what has none is served as ONNX."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Where ONNX Runtime computes; TensorRT always does on the GPU."""
    instances: int = Field(1, ge=1, le=1024)
    """Copies of every model (per GPU), each with its weights in memory."""
    concurrency: int = Field(4, ge=1, le=1024)
    """Requests that are denoised at the same time; those beyond wait. Their UNet calls can share batches."""
    max_batch: int = Field(8, ge=2, le=4096)
    """Largest batch that requests are gathered to, in models with an open batch; with guidance, two per image."""
    queue_delay_us: int = Field(1000, ge=0, le=10_000_000)
    """How long a call may wait for others to share a batch with, in microseconds."""
    max_steps: int = Field(100, ge=1, le=1000)
    """Requests for more steps are refused."""
    image: Annotated[str, _IMAGE] = "nvcr.io/nvidia/tritonserver:26.07-py3"
    """Container image of the server. Engines ask for the one with the TensorRT version that built them."""

    @model_validator(mode="after")
    def _on_a_gpu(self) -> TritonSettings:
        if self.backend == "tensorrt" and self.device == "cpu":
            raise ValueError("TensorRT engines run on a GPU: take the onnxruntime backend for a CPU")
        return self
