"""Products of bytes whose sums do not fit: which graphs have them, and which processors they come out right on.

An x86 processor without VNNI multiplies bytes by VPMADDUBSW: it adds two products of an unsigned activation and a
signed weight and clips the sum to 16 bits. It fits while weights are within 64 of zero, 7 bits: 2 * 255 * 64 < 2**15.
Beyond that the result is wrong without a word: in ONNX Runtime (its page "Quantize ONNX models", section on U8S8) and
in OpenVINO ("Saturation (overflow) Issue Workaround"). Tried in ONNX Runtime 1.32 and OpenVINO 2026 as on AVX2, as on
AVX-512 without VNNI and as on AVX2 with VNNI, on convolutions and linears whose weights have one sign (30 % of the
result are lost):

    written as                            ONNX Runtime                      OpenVINO
    Q/DQ around a product                 right, as U8U8 is asked of it     wrong
    MatMulInteger, ConvInteger            right, as U8U8 is asked of it     right: computes in floats
    QLinearConv, QLinearMatMul, QGemm     wrong, or not opened with U8U8    wrong

Right everywhere: weights of 7 bits or uint8, weights alone in int8, and two activations with one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graphs.reading import read_graph
from exporters.machine import EXACT_INT8, exact_int8
from exporters.registry import Int8Format, Runtime
from slimdiff.errors import MissingPackageError, require

if TYPE_CHECKING:
    import onnx_ir as ir

EXACT_PROCESSORS = "x86 with VNNI or AMX, or another architecture"
"""Where products of 8-bit weights are exact."""
SEVEN_BITS = 64
"""The largest magnitude of a weight that overflows nowhere."""

_FORMATS: dict[str, Int8Format] = {
    **dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger"), "dynamic"),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm", "QAttention", "DynamicQuantizeLSTM"), "QOperator"),
}
_FLOAT_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# What runtimes move quantisation across: the values stay, or are chosen or averaged among.
_MOVES = (
    *("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Concat", "Split", "Slice"),
    *("Gather", "Pad", "DepthToSpace", "SpaceToDepth", "Resize", "MaxPool", "AveragePool", "Relu", "LeakyRelu", "Clip"),
)


def wide_products(model: ir.Model) -> dict[Int8Format, str]:
    """The integer products of a graph whose int8 weights take more than 7 bits, by how they are written.

    Returns:
        by format, the first node's name. Weights are read until one is found of each format.
    """
    ir, found = require("onnx_ir", "onnx"), dict[Int8Format, str]()
    for graph in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            kind: Int8Format = _FORMATS.get(node.op_type, "Q/DQ")
            if kind in found or not (node.op_type in _FORMATS or node.op_type in _FLOAT_PRODUCTS):
                continue
            if _between_dequantised(node) if kind == "Q/DQ" else any(map(_is_wide_weight, node.inputs)):
                found[kind] = f"{node.op_type} {node.name}".strip()
    return found


def processors_for(*models: ir.Model) -> str:
    """The processors that graphs are right on in every runtime, for people and manifests."""
    return EXACT_PROCESSORS if any(map(wide_products, models)) else "any"


def check_int8(graph: Path | str, runtime: Runtime, model: ir.Model | None = None) -> None:
    """Refuse a graph that a runtime on this host computes wrongly, or perhaps so where the system does not tell.

    It is no warning: nobody sees from an image, or a latency, that a third of a layer's sums was clipped. Whoever knows
    better says so in the environment, `SLIMDIFF_EXACT_INT8=1`.

    Args:
        graph: its file.
        model: what `read_graph` made of it.

    Raises:
        MissingPackageError: naming the product, the processor and what would be right.
    """
    if not runtime.clips or (exact := exact_int8()):
        return
    found = wide_products(model or read_graph(graph))
    node = next((found[kind] for kind in runtime.clips if kind in found), None)
    if node is None:
        return
    lacks = "has no VNNI" if exact is False else f"may lack VNNI (if it does not, set {EXACT_INT8}=1)"
    others = "" if "QOperator" in found else "; ONNX Runtime computes it exactly (--runtime onnxruntime)"
    raise MissingPackageError(
        f"{graph} multiplies by 8-bit weights ({node}), and this processor {lacks}: {runtime.title} would clip the sums"
        f" without a word. Quantise again in the Q/DQ format with 7-bit weights (reduce_range=True, or overflow_fix in"
        f" NNCF), or run it on {EXACT_PROCESSORS}{others}"
    )


def _between_dequantised(node: ir.Node) -> bool:
    """Whether a float product is written for integers: a wide int8 weight on one side, 8-bit activations on the other.

    Weights alone in int8 are multiplied as floats.
    """
    sides = [list(_dequantised(value)) for value in node.inputs[:2]]
    wide = [any(map(_is_wide_weight, side)) for side in sides]
    active = [any(_weight(value) is None and _is_byte(value) for value in side) for side in sides]
    return any(wide[i] and active[1 - i] for i in range(len(sides)))


def _dequantised(value: ir.Value | None) -> Iterator[ir.Value]:
    """The quantised tensors that a float tensor comes from, itself or across moves."""
    stack, seen = [value], set[int]()
    while stack:
        node = value.producer() if (value := stack.pop()) is not None else None
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type == "DequantizeLinear":
            yield from node.inputs[:1]  # type: ignore[misc]  # which it has
        elif node.op_type in _MOVES:
            stack += node.inputs


def _is_byte(value: ir.Value) -> bool:
    """Of activations, which need not say their dtype: those that ONNX quantises to by default are bytes."""
    return value.dtype is None or value.dtype.name in ("UINT8", "INT8")


def _is_wide_weight(value: ir.Value | None) -> bool:
    weight = None if value is None else _weight(value)
    if weight is None or weight.dtype != np.int8 or weight.ndim < 2:  # zero points have fewer dims
        return False
    return bool(weight.max(initial=0) > SEVEN_BITS or weight.min(initial=0) < -SEVEN_BITS)


def _weight(value: ir.Value) -> np.ndarray | None:
    """A quantised tensor that is known without running: constant, or a constant that the graph itself quantises."""
    constant = partial(require("onnx_ir", "onnx").convenience.get_const_tensor, propagate_shape_type=False)
    if (tensor := constant(value)) is not None:
        return np.asarray(tensor.numpy())
    node = value.producer()
    if node is None or node.op_type != "QuantizeLinear":
        return None
    given: list[Any] = [one and constant(one) for one in node.inputs]
    if given[0] is None or given[1] is None:
        return None
    floats, scale = given[0].numpy(), given[1].numpy()
    zero = given[2].numpy() if len(given) > 2 and given[2] is not None else np.zeros_like(scale, dtype=np.uint8)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if scale.ndim == 1 and scale.size > 1:  # per channel
        shape = [-1 if dim == axis % floats.ndim else 1 for dim in range(floats.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    if zero.dtype != np.int8 or scale.ndim not in (0, 1, floats.ndim):
        return zero  # neither a weight in int8 nor of a rank that counts
    limits = np.iinfo(np.int8)
    return np.clip(np.rint(floats / scale) + zero, limits.min, limits.max).astype(np.int8)
