"""Reading ONNX files: the graph in memory, its weights on disk until they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.dtypes import DTYPES
from slimdiff.errors import InputError, require
from slimdiff.storage.manifest import is_inside, leads_inside

if TYPE_CHECKING:
    import onnx_ir as ir

Shape = tuple[int | str, ...]
"""Sizes; of open dims their names, or nothing where they have none."""

WEIGHTED = ("MatMul", "Gemm", "Conv")
"""Operators that a linear or a convolution is exported as, the weight being their second input."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph."""

    dtype: str
    """Its name in numpy and torch."""
    shape: Shape
    """An open dim that has no name is named after its place: `sample.2`."""


def read_graph(onnx_file: Path | str) -> ir.Model:
    """The model; a weight outside the graph's file is read when its values are asked for.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
        MissingPackageError: without onnx and onnx_ir.
    """
    ir, path = require("onnx_ir", "onnx"), Path(onnx_file)
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf has its own exception per implementation
        raise InputError(f"{path} is no ONNX model: {error}") from error


def inputs_of(model: ir.Model) -> dict[str, TensorSpec]:
    """The graph's inputs by name, in their order."""
    return {name_of(v): _spec(v) for v in model.graph.inputs if not v.is_initializer()}


def outputs_of(model: ir.Model) -> dict[str, TensorSpec]:
    """The graph's outputs by name, in their order."""
    return {name_of(v): _spec(v) for v in model.graph.outputs}


def shape_of(value: ir.Value | None) -> Shape:
    """Sizes of a tensor; no dims where the graph says no shape."""
    return tuple(d if isinstance(d, int) else d.value or "" for d in (value and value.shape) or ())


def steps_of(dim: str) -> tuple[int, str]:
    """Of an open dim, the factor and what it multiplies: 8 and `height` of `8*height`; 1 and all of it otherwise."""
    factor, _, name = dim.partition("*")
    return (int(factor), name) if factor.isdigit() else (1, dim)


def name_of(value: ir.Value) -> str:
    """Name of a tensor: every tensor that a node reads has one."""
    return value.name or ""


def module_of(node: ir.Node) -> str:
    """Path of the module that a node named by `name_by_module` comes from; empty for the exporter's own nodes."""
    return (node.name or "").rpartition("/")[0]


def weight_of(node: ir.Node) -> ir.Value | None:
    """The weight that a linear or a convolution multiplies by, in bytes where it is quantised; None if it is none."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "DequantizeLinear":
        value = maker.inputs[0]
    return value if value is not None and value.is_initializer() else None


def weight_files(onnx_file: Path, model: ir.Model) -> list[str]:
    """Names of the files that a graph keeps tensors in, as every graph over 2 GB does: weights, and constants of nodes.

    Raises:
        InputError: naming those that lie elsewhere than below the graph's folder, also by way of a link, and what is
            missing or too short.
    """
    needed: dict[str, int] = {}
    for tensor in _external_tensors(model):
        name, end = str(tensor.location), (tensor.offset or 0) + (tensor.length or 0)
        needed[name] = max(end, needed.get(name, 0))
    folder = onnx_file.parent
    outside = [n for n in needed if not is_inside(n) or not leads_inside(folder / n, folder)]
    if outside:
        raise InputError(f"{onnx_file} names weights outside its folder ({', '.join(map(repr, outside))}): refused")
    for name, size in needed.items():
        data = onnx_file.parent / name
        if not data.is_file():
            raise InputError(f"{onnx_file} keeps its weights in {name}, which is not beside it: copy the folder whole")
        if (there := data.stat().st_size) < size:
            raise InputError(
                f"{data} has {there} bytes, and {onnx_file.name} takes {size} from it: copy the folder again"
            )
    return sorted(needed)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    ir = require("onnx_ir", "onnx")
    graphs = (model.graph, *model.functions.values())
    nodes = [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    for attribute in (attribute for node in nodes for attribute in node.attributes.values()):
        if attribute.type == ir.AttributeType.TENSOR:
            tensors.append(attribute.as_tensor())
        elif attribute.type == ir.AttributeType.TENSORS:
            tensors += attribute.as_tensors()
    return (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor))


def _spec(value: ir.Value) -> TensorSpec:
    shape = (f"{value.name}.{axis}" if dim == "" else dim for axis, dim in enumerate(shape_of(value)))
    dtype = value.dtype.name if value.dtype else "UNDEFINED"
    return TensorSpec(DTYPES.get(dtype, dtype.lower()), tuple(shape))
