"""What a graph in half precision computes in single precision, and how modules are kept so.

A strongly typed engine computes in the dtypes of the graph, so whatever would overflow in fp16, or lose too much, must
be fp32 in the graph itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exporters.graphs.reading import inputs_of, module_of, read_graph, shape_of
from slimdiff.denoising.trajectory import map_tensors
from slimdiff.errors import InputError, require

if TYPE_CHECKING:
    import onnx_ir as ir

SOFTMAX_TERMS = 2048
"""A sum of ones in an fp16 accumulator stops here: the next whole number has no fp16 of its own."""

NORMS = ("GroupNormalization", "LayerNormalization")


def paths_to_keep(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Paths of the modules that match a pattern, without those inside another that does.

    Of a list of modules, which computes nothing itself, they are its items.

    Args:
        patterns: paths, or shell-style patterns of whole paths such as `*.attn1`.

    Raises:
        InputError: for a pattern that matches nothing.
    """
    modules = dict(module.named_modules())
    paths = [path for path in modules if path]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise InputError(
                f"keep_fp32: no module matches {pattern!r}; name a whole path, such as {paths[-1]!r}, or a pattern of "
                "whole paths, such as '*.attn1'"
            )
    chosen = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]
    chosen = [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]
    return [called for path in chosen for called in _called(path, modules[path])]


def _called(path: str, module: nn.Module) -> list[str]:
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [path]
    return [called for name, item in module.named_children() for called in _called(f"{path}.{name}", item)]


def keep_in_float32(module: nn.Module, paths: Iterable[str]) -> None:
    """Let modules at paths compute in float32 inside a half-precision model: inputs are cast up, outputs back.

    The model is changed in place; the weights of these modules are to be float32 already.
    """
    up, down = partial(cast_tensor, torch.float16, torch.float32), partial(cast_tensor, torch.float32, torch.float16)
    for path in paths:
        part = module.get_submodule(path)
        part.register_forward_pre_hook(lambda _module, *inputs: map_tensors(up, inputs), with_kwargs=True)
        part.register_forward_hook(lambda _module, _inputs, output: map_tensors(down, output))


def cast_tensor(old: torch.dtype, new: torch.dtype, tensor: Tensor) -> Tensor:
    """The tensor in the new dtype, if it is in the old one."""
    return tensor.to(new) if tensor.dtype == old else tensor


def widen_softmax(model: ir.Model, terms: int = SOFTMAX_TERMS) -> None:
    """Let every half-precision Softmax over more than `terms` values compute in fp32, between two casts.

    Exponentials are at most 1 and their sum at most the number of terms, so nothing overflows below 65504 terms; but a
    sum that a runtime accumulates in fp16 may lose terms beyond 2048. TensorRT-RTX fuses such attention all the same.

    Args:
        model: changed in place; it says every tensor's dtype and shape, as torch's exporter leaves it.
        terms: along the softmax's axis; an axis of unknown size counts as longer.
    """
    ir, graph = require("onnx_ir", "onnx"), model.graph
    for node in [node for node in graph if node.op_type == "Softmax"]:
        source, result = node.inputs[0], node.outputs[0]
        size = (shape_of(source) or (0,))[node.attributes.get_int("axis", -1)]
        if source is None or source.dtype != ir.DataType.FLOAT16 or isinstance(size, int) and 0 < size <= terms:
            continue
        name = result.name
        up = ir.node("Cast", [source], {"to": ir.DataType.FLOAT})
        down = ir.node("Cast", [result], {"to": ir.DataType.FLOAT16})
        result.replace_all_uses_with(down.outputs[0], replace_graph_outputs=True)
        down.replace_input_with(0, result)
        node.replace_input_with(0, up.outputs[0])
        up.outputs[0].name, result.name, down.outputs[0].name = f"{name}:fp32_in", f"{name}:fp32", name
        result.dtype = ir.DataType.FLOAT
        for cast in (up, down):
            cast.metadata_props.update(node.metadata_props)  # which say whose module it is
        graph.insert_before(node, up)
        graph.insert_after(node, down)


def join_casts(model: ir.Model) -> None:
    """Let what is cast down to half precision and up again stay in fp32: between two modules that are kept in fp32.

    A value beyond 65504 gets from one to the next so.

    Args:
        model: changed in place; it says every tensor's dtype, as torch's exporter leaves it.
    """
    wide, half = (require("onnx_ir", "onnx").DataType[name] for name in ("FLOAT", "FLOAT16"))
    graph = model.graph
    for up in [node for node in graph if node.op_type == "Cast" and node.outputs[0].dtype == wide]:
        source = up.inputs[0]
        down = source.producer() if source is not None and source.dtype == half else None
        if source is None or down is None or down.op_type != "Cast":
            continue
        if down.inputs[0] is None or down.inputs[0].dtype != wide:
            continue
        if not up.outputs[0].is_graph_output():
            up.outputs[0].replace_all_uses_with(down.inputs[0])
            graph.remove(up, safe=True)
        if not source.uses() and not source.is_graph_output():
            graph.remove(down, safe=True)


def fp32_islands(onnx_file: Path | str) -> list[dict[str, str]]:
    """What a graph with half-precision inputs, which `export_unet` wrote, computes in fp32 all the same.

    Returns:
        one dict per node, in execution order: `node`, `module`, `operator` and `fp32`: `tensors` where the node's own
        tensors are fp32, `statistics` where a norm says so of its mean and variance (`stash_type`). Casts, which
        compute nothing, are not among them. Nothing for a graph whose inputs are fp32.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
    """
    model, wide = read_graph(onnx_file), require("onnx_ir", "onnx").DataType.FLOAT
    if not any(spec.dtype == "float16" for spec in inputs_of(model).values()):
        return []
    rows = []
    for node in (node for node in model.graph if node.op_type != "Cast"):
        tensors = any(value.dtype == wide for value in node.outputs)
        # fp32 is the operators' own default.
        if tensors or node.op_type in NORMS and node.attributes.get_int("stash_type", wide) == wide:
            what = "tensors" if tensors else "statistics"
            rows.append({"node": str(node.name), "module": module_of(node), "operator": node.op_type, "fp32": what})
    return rows
