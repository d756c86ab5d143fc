"""What can be read from a parsed TensorRT network and from an engine's bytes; with a GPU, from an open engine."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from exporters.dtypes import DTYPES

_FUSED = re.compile(rb"fqn=(_gemm_mha_v2_0x[0-9a-f]+)")
"""The engine's bytes name the kernel thus once per call, and elsewhere in the kernel's own source."""

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
"""A kernel's `Metadata` lists the graph's nodes that it was made from, with control characters between them."""

_THROUGH = ("SHUFFLE", "CAST", "UNSQUEEZE", "SQUEEZE", "IDENTITY", "DEQUANTIZE")
"""Layers that the parser puts between a weight and its product."""


def describe_network(trt: Any, network: Any) -> dict[str, Any]:
    """Inputs, outputs, weight dims and attention products of a network whose layers `name_by_module` named.

    Args:
        network: `trt`'s `INetworkDefinition`, with static shapes.

    Returns:
        `inputs` and `outputs` (`name`, `shape`, `dtype`), `layers` (count), `dims` (module path -> `(out, in)` of its
        linear or convolution), `int8` (paths of those whose factors are both dequantised, in order) and `attention`
        (see `attention_of`).
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    dims: dict[str, tuple[int, ...]] = {}
    products: dict[str, list[dict[str, Any]]] = defaultdict(list)
    int8: list[str] = []
    for layer in layers:
        if layer.type == trt.LayerType.CONVOLUTION:
            layer.__class__ = trt.IConvolutionLayer
            channels = layer.get_input(0).shape[1] // layer.num_groups
            dims[module := layer.name.rpartition("/")[0]] = (layer.num_output_maps, channels)
            int8 += [module] * _is_int8(layer, makers)
        if layer.type != trt.LayerType.MATRIX_MULTIPLY:
            continue
        layer.__class__ = trt.IMatrixMultiplyLayer  # the network hands out the base class, which lacks op1
        a, b = layer.get_input(0), layer.get_input(1)
        module = layer.name.rpartition("/")[0]
        if _is_constant(trt, b, makers):
            shape = tuple(b.shape)[-2:]
            dims[module] = shape if layer.op1 == trt.MatrixOperation.TRANSPOSE else shape[::-1]
            int8 += [module] * _is_int8(layer, makers)
        elif not _is_constant(trt, a, makers):
            shapes = (a, b, layer.get_output(0))
            products[module].append(dict(zip(("a", "b", "out"), (list(s.shape) for s in shapes), strict=True)))
    return {
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "layers": len(layers),
        "dims": dims,
        "int8": int8,
        "attention": list(attention_of(products)),
    }


def attention_of(products: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Per attention module, from its two products: `module`, `query_key_dim` and `value_dim` (per head), `queries` and
    `keys` (tokens), `heads` (None where the processor folds them into the batch), and `products`, the shapes."""
    for module, pair in products.items():
        if len(pair) != 2:  # not softmax(QK)V: shapes alone
            yield {"module": module, "products": pair}
            continue
        scores, mixed = pair
        yield {
            "module": module,
            "heads": scores["a"][1] if len(scores["a"]) == 4 else None,
            "query_key_dim": scores["a"][-1],
            "value_dim": mixed["out"][-1],
            "queries": scores["out"][-2],
            "keys": scores["out"][-1],
            "products": pair,
        }


def fused_attention(engine_bytes: bytes) -> dict[str, int]:
    """Count fused attention in a serialized engine: `calls` (one per layer that fused) and `kernels` (distinct)."""
    calls = _FUSED.findall(engine_bytes)
    return {"calls": len(calls), "kernels": len(set(calls))}


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


def _tensor(tensor: Any) -> dict[str, Any]:
    name = tensor.dtype.name
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": DTYPES.get(name, name.lower())}


def _is_int8(layer: Any, makers: dict[str, Any]) -> bool:
    """Whether both factors of a product are dequantised; between weight and product the parser may turn dims."""
    inputs = [layer.get_input(i) for i in range(min(2, layer.num_inputs))]
    return len(inputs) == 2 and all(tensor is not None and _dequantised(tensor, makers) for tensor in inputs)


def _dequantised(tensor: Any, makers: dict[str, Any]) -> bool:
    layer = makers.get(tensor.name)
    while layer is not None and layer.type.name in _THROUGH and layer.type.name != "DEQUANTIZE":
        layer = makers.get(layer.get_input(0).name)
    return layer is not None and layer.type.name == "DEQUANTIZE"


def _is_constant(trt: Any, tensor: Any, makers: dict[str, Any]) -> bool:
    layer = makers.get(tensor.name)
    while layer is not None and layer.type.name in _THROUGH:
        layer = makers.get(layer.get_input(0).name)
    return layer is not None and layer.type == trt.LayerType.CONSTANT
