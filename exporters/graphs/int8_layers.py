"""Which layers of a graph multiply in int8, what each is quantised by, and their share of all multiply-adds.

A layer counts as int8 where both factors of its product are 8-bit numbers put back into floats (Q/DQ), as NNCF and
`onnxruntime.quantization` write it: a runtime then multiplies bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graphs.reading import WEIGHTED, module_of, name_of, shape_of, weight_of
from slimdiff.errors import require

if TYPE_CHECKING:
    import onnx_ir as ir

REPORT = "slimdiff.int8"
"""Under this name a graph of ours carries, as JSON, what `quantise_graph` found; see there."""
_BYTES = ("INT8", "UINT8")


@dataclass(frozen=True)
class Int8Layer:
    """A linear or convolution whose product is of bytes."""

    path: str
    """Of the module."""
    node: ir.Node
    scales: tuple[np.ndarray, np.ndarray]
    """Of the input (one, or one a channel), and of the weight (one a channel of the output, or one)."""
    zero_points: tuple[np.ndarray, np.ndarray]

    def weight(self) -> np.ndarray:
        """What the layer multiplies by, float32, in torch's layout: `(out, in)`, `(out, in / groups, kh, kw)`."""
        value = self.node.inputs[1]
        maker = value.producer() if value is not None else None
        assert maker is not None and maker.inputs[0] is not None and maker.inputs[0].const_value is not None
        whole = maker.inputs[0].const_value.numpy().astype(np.float32)
        scale, zero = (np.asarray(part, np.float32) for part in (self.scales[1], self.zero_points[1]))
        if scale.ndim == 1 and scale.size > 1:
            axis = maker.attributes.get_int("axis", 1) % whole.ndim
            dims = [-1 if dim == axis else 1 for dim in range(whole.ndim)]
            scale, zero = scale.reshape(dims), zero.reshape(dims) if zero.size > 1 else zero
        weight = (whole - zero) * scale
        keep = self.node.op_type == "Conv" or self.node.attributes.get_int("transB", 0) == 1
        return weight if keep else np.ascontiguousarray(weight.T)

    def bias(self) -> np.ndarray | None:
        """What is added to the product, float32: quantisers move it. None where nothing is, or it is not constant."""
        value: Any = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if self.node.op_type == "MatMul":
            after = list(self.node.outputs[0].consumers())
            if len(after) == 1 and after[0].op_type == "Add":
                value = next((v for v in after[0].inputs if v is not None and v.is_initializer()), None)
        tensor = value.const_value if value is not None else None
        return None if tensor is None else tensor.numpy()


def int8_layers(model: ir.Model) -> dict[str, Int8Layer]:
    """The layers that multiply in int8, by module path, in execution order."""
    found = {}
    for node in model.graph:
        if node.op_type in WEIGHTED and (layer := _layer(node)):
            found[layer.path] = layer
    return found


def report_of(model: ir.Model) -> dict[str, Any] | None:
    """What a graph of ours says of its int8 layers: `layers`, `wide` and more; None of any other graph."""
    text = model.metadata_props.get(REPORT)
    return json.loads(text) if text else None


def is_int8(model: ir.Model) -> bool:
    """Whether any layer of a graph multiplies in int8."""
    return any(node.op_type in WEIGHTED and _layer(node) is not None for node in model.graph)


def share_of_macs(model: ir.Model) -> float | None:
    """The part of a graph's multiply-adds, attention's products among them, that is in int8.

    An open batch multiplies all of them alike. Where more is open, it is what the graph was calibrated on that counts;
    None if it does not say.
    """
    layers, total, bytes_ = int8_layers(model), 0, 0
    for node, macs in products(model):
        if macs is None:
            return (report_of(model) or {}).get("share")
        total += macs
        layer = layers.get(module_of(node))
        bytes_ += macs if layer is not None and layer.node is node else 0
    return bytes_ / total if total else None


def products(model: ir.Model) -> Iterator[tuple[ir.Node, int | None]]:
    """Every product in a graph with its multiply-adds; None where a size other than the batch is open."""
    for node in model.graph:
        if node.op_type not in WEIGHTED:
            continue
        out = [1 if axis == 0 and isinstance(dim, str) else dim for axis, dim in enumerate(shape_of(node.outputs[0]))]
        weight = weight_of(node)
        if node.op_type == "Conv":
            inner: Any = shape_of(weight)[1:] if weight is not None else ("",)
        elif weight is not None:
            dims = shape_of(weight)
            inner = dims[1:] if node.attributes.get_int("transB", 0) else dims[:1]
        else:
            inner = shape_of(node.inputs[0])[-1:]
        sizes = [*out, *inner]
        yield node, prod(sizes) if out and inner and all(isinstance(size, int) for size in sizes) else None


def _layer(node: ir.Node) -> Int8Layer | None:
    active, weight = (_dequantiser(value) for value in node.inputs[:2])
    if active is None or weight is None or not _is_constant(weight.inputs[0]):
        return None
    maker = active.inputs[0].producer() if active.inputs[0] is not None else None
    if maker is None or maker.op_type != "QuantizeLinear":
        return None
    parts = [_constants(one) for one in (active, weight)]
    if parts[0] is None or parts[1] is None:
        return None
    pairs = [part for part in parts if part is not None]
    return Int8Layer(module_of(node), node, (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1]))


def _dequantiser(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    dtype = node.inputs[0].dtype
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = zero.dtype if dtype is None and zero is not None else dtype  # quantisers leave activations untyped
    return node if dtype is None or dtype.name in _BYTES else None


def _constants(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of a quantiser, if they are constant."""
    constant = require("onnx_ir", "onnx").convenience.get_const_tensor
    scale = constant(node.inputs[1]) if node.inputs[1] is not None else None
    if scale is None:
        return None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant(zero) if zero is not None else None
    return scale.numpy(), np.zeros(1, np.int8) if tensor is None else tensor.numpy()


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None and bool(name_of(value))
