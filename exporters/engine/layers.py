"""The layers of an engine, read on the GPU that it runs on."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
"""A kernel's `Metadata` lists the graph's nodes that it was made from, with control characters between them."""


def inspect_engine(trt: Any, engine_bytes: bytes) -> dict[str, list[list[int]]] | None:
    """Open an engine and read its layers; it has to be built with detailed profiling verbosity.

    Written after TensorRT's documentation and not tried: no GPU was at hand.

    Returns:
        `dims_by_node`'s map; None if the engine does not open, or lists no layers.
    """
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine_bytes)
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return dims_by_node(json.loads(text)) or None


def dims_by_node(information: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Dims of the tensors into and out of the kernels, by the name of the graph's node that they were made from.

    Args:
        information: what `IEngineInspector.get_engine_information` gives: `Layers`, each with `Metadata`, `Inputs` and
            `Outputs` (`Dimensions`). With less verbosity layers are mere names, and are passed over.
    """
    found: dict[str, list[list[int]]] = defaultdict(list)
    for layer in information.get("Layers", []):
        if isinstance(layer, dict):
            tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
            shapes = [list(t["Dimensions"]) for t in tensors if t.get("Dimensions")]
            for node in dict.fromkeys(_NODE.findall(layer.get("Metadata", ""))):
                found[node] += shapes
    return dict(found)
