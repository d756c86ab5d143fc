"""A pipeline's unet, VAE and text encoders in other runtimes than torch, as modules that diffusers takes for its own.

`session.py` says what a runtime must offer, `*_session.py` are the runtimes, `opening.py` opens any of them by name;
`unet.py`, `vae.py` and `text_encoder.py` are the modules, and `pipeline.py` puts a whole pipeline together. Here are
the runtimes' names alone, so that a command line can offer them without loading anything.
"""

from typing import Literal, get_args

GraphRuntime = Literal[
    "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino", "openvino-fp32", "openvino-bf16"
]
"""What runs an ONNX graph. `onnxruntime` is its CPU provider; `openvino` computes in the precision that it takes for
the fastest on this CPU (bf16 where the CPU has that), the other two in the one that they name."""
EngineRuntime = Literal["tensorrt", "tensorrt-rtx"]
"""What runs an engine."""
TableRuntime = Literal["torch", GraphRuntime]
"""Where a latency table can be measured: torch, and whatever takes a graph."""

GRAPH_RUNTIMES: tuple[GraphRuntime, ...] = get_args(GraphRuntime)
ENGINE_RUNTIMES: tuple[EngineRuntime, ...] = get_args(EngineRuntime)
TABLE_RUNTIMES: tuple[TableRuntime, ...] = get_args(TableRuntime)
RUNTIMES = (*TABLE_RUNTIMES, *ENGINE_RUNTIMES)
