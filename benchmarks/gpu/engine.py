"""A UNet in a TensorRT engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.timing import Run


class _Flat(nn.Module):
    """The UNet with tensors alone as arguments, in the order of its call."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        more = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added, strict=True))} if added else {}
        return self.unet(sample, timestep, states, **more, return_dict=False)[0]


def tensorrt_run(unet: nn.Module, inputs: dict[str, Any]) -> Run:
    """Through ONNX into a TensorRT engine, its precision that of the weights."""
    import tensorrt as trt

    own = [value for value in inputs.values() if isinstance(value, Tensor)]
    tensors = [tensor.contiguous() for tensor in (*own, *inputs.get("added_cond_kwargs", {}).values())]
    names = [f"input_{i}" for i in range(len(tensors))]
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        program = torch.onnx.export(
            _Flat(unet), tuple(tensors), dynamo=True, opset_version=22, input_names=names, output_names=["output"]
        )
        program.save(file, external_data=True)  # type: ignore[union-attr]
        if not parser.parse_from_file(file):
            raise RuntimeError(f"TensorRT does not parse the UNet: {parser.get_error(0)}")
        engine = builder.build_serialized_network(network, builder.create_builder_config())
    context = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine).create_execution_context()
    output = torch.empty_like(tensors[0])
    for name, tensor in zip([*names, "output"], [*tensors, output], strict=True):
        context.set_tensor_address(name, tensor.data_ptr())

    def run(_read: list[Tensor] = tensors) -> Tensor:  # the engine reads them: they must live as long as it does
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT does not run the UNet: its log on stderr says why")
        return output

    return run
