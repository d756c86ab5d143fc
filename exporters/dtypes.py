"""Dtypes by the names that runtimes and file formats have for them. Loads nothing."""

from __future__ import annotations

_NAMES = {
    "float32": ("fp32", "FLOAT", "f32", "float"),
    "float16": ("fp16", "FLOAT16", "HALF", "f16"),
    "bfloat16": ("bf16", "BFLOAT16", "BF16"),
    "float64": ("DOUBLE", "f64", "double"),
    "int64": ("INT64", "i64"),
    "int32": ("INT32", "i32"),
    "bool": ("BOOL", "boolean"),
}

DTYPES = {other: name for name, others in _NAMES.items() for other in (name, *others)}
"""Name of a precision (`fp16`), or of a dtype in ONNX or TensorRT (`FLOAT`), OpenVINO (`f32`) or ONNX Runtime
(`float`) -> its name in numpy and torch."""

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""The other way, for those that a model can be in."""
