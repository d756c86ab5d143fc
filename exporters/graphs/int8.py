"""Products of 8-bit integers in a graph, which overflow on x86 processors without VNNI, and nobody says so.

There, both ONNX Runtime and OpenVINO multiply unsigned by signed bytes and add two neighbours in 16 bits (VPMADDUBSW),
which saturates: 2 x 255 x 127 is more than 32,767. Weights of 7 bits (NNCF's `OverflowFix.ENABLE`, ONNX Runtime's
`reduce_range`) cannot reach it. VNNI and AMX add in 32 bits, and so does ARM. Weights that are stored in 8 bits and
multiplied as floating-point numbers do not overflow anywhere.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimdiff.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

PROCESSORS = "x86 with VNNI or AMX-INT8, or ARM"
"""That compute 8-bit products as they are written."""
_SEVEN_BITS = 64
_X86 = ("x86_64", "amd64", "i386", "i686")
_INSTRUCTIONS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_INTEGER = {"MatMulInteger": (0, 1), "ConvInteger": (0, 1), "QLinearMatMul": (0, 3), "QLinearConv": (0, 3)}
_FLOATING = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


@cache
def multiplies_bytes() -> bool | None:
    """Whether this processor computes 8-bit products as they are written; None where nothing here says so."""
    if platform.machine().lower() not in _X86:
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return None if flags is None else not _INSTRUCTIONS.isdisjoint(flags)


def overflowing(model: ir.Model) -> list[str]:
    """Nodes whose 8-bit products can overflow, by name: signed weights beyond 7 bits, times quantised activations."""
    return [node.name or node.op_type for node in model.graph.all_nodes() if _overflows(node)]


def processors_for(model: ir.Model) -> str | None:
    """The processors that compute a graph as it is written; None: every one."""
    return PROCESSORS if overflowing(model) else None


def check_bytes(onnx_file: Path, model: ir.Model) -> None:
    """Refuse a graph that this processor would compute wrongly, for a runtime on the CPU.

    Raises:
        InputError: naming the first of its nodes, and what would be right.
    """
    if multiplies_bytes() is False and (nodes := overflowing(model)):
        raise InputError(
            f"{onnx_file} multiplies 8-bit integers ({nodes[0]}), which overflow on this processor, for it has no "
            f"VNNI: run it on {PROCESSORS}, or quantise it again with weights of 7 bits (NNCF: "
            "overflow_fix=OverflowFix.ENABLE, ONNX Runtime: reduce_range=True)"
        )


def _overflows(node: ir.Node) -> bool:
    if node.op_type in _INTEGER:
        weight = node.inputs[_INTEGER[node.op_type][1]]
        return weight is not None and _is_signed(weight) and not _has_seven_bits(weight)
    if node.op_type not in _FLOATING:
        return False
    pair = [_quantised(value) for value in node.inputs[:2]]
    if any(value is None for value in pair):
        return False
    constant = [value for value in pair if value is not None and _values(value) is not None]
    weights = constant or [value for value in pair if value is not None]
    return len(constant) < 2 and any(_is_signed(value) and not _has_seven_bits(value) for value in weights)


def _quantised(value: ir.Value | None) -> ir.Value | None:
    """The integers behind a tensor that was quantised; None if it is computed in floating point."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return node.inputs[0]
        if node.op_type not in _MOVES:
            return None
        value = node.inputs[0]
    return None


def _is_signed(value: ir.Value) -> bool:
    """Whether these are int8. Of a QuantizeLinear its zero point says so; without one they are uint8."""
    node = value.producer()
    if node is None or node.op_type != "QuantizeLinear":
        return value.dtype is not None and value.dtype.name == "INT8"
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return zero is not None and zero.dtype is not None and zero.dtype.name == "INT8"


def _values(value: ir.Value) -> np.ndarray | None:
    """The integers, where they are constants: as they are stored, or as a QuantizeLinear makes them of a weight."""
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "QuantizeLinear":
        return None
    weight, scale = (v.const_value if v is not None else None for v in node.inputs[:2])
    if weight is None or scale is None:
        return None
    steps = scale.numpy()
    if steps.ndim == 1 and steps.size > 1:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        steps = steps.reshape([-1 if i == axis % len(weight.shape) else 1 for i in range(len(weight.shape))])
    return np.round(weight.numpy() / steps)


def _has_seven_bits(value: ir.Value) -> bool:
    values = _values(value)
    return values is not None and bool(np.abs(values.astype(np.float32)).max(initial=0) <= _SEVEN_BITS)
