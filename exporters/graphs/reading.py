"""Reading ONNX files: the graph in memory, its weights on disk until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.dtypes import DTYPES
from exporters.layout import GRAPH, STEP, parts_of
from slimdiff.errors import InputError, require
from slimdiff.storage.manifest import is_inside, leads_inside

if TYPE_CHECKING:
    import onnx_ir as ir

Shape = tuple[int | str, ...]
"""Sizes; of open dims their names, or nothing where they have none."""

DEPTH = "slimdiff.depth"
"""In a shallow graph's metadata: the path of the up block that it begins with."""

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

    Args:
        onnx_file: or the folder of a denoiser in parts, which are joined.

    Raises:
        InputError: if there is no such file, or it is no ONNX model, or parts do not go together.
        MissingPackageError: without onnx and onnx_ir.
    """
    ir, path = require("onnx_ir", "onnx"), Path(onnx_file)
    if parts := parts_of(path):
        models = {part: read_graph(parts[part] / GRAPH) for part in reversed(parts)}  # the step first
        check_parts({part: (inputs_of(model), outputs_of(model)) for part, model in models.items()}, path)
        return _joined(models)
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf has its own exception per implementation
        raise InputError(f"{path} is no ONNX model: {error}") from error


def graph_files(onnx_file: Path | str) -> list[Path]:
    """The file itself; of the folder of a denoiser in parts, those of the parts."""
    path = Path(onnx_file)
    return [folder / GRAPH for folder in parts_of(path).values()] or [path]


def check_parts(tensors: Mapping[str, tuple[Iterable[str], Iterable[str]]], where: object) -> None:
    """Refuse parts of a denoiser that do not go together.

    Args:
        tensors: by part, the names of its inputs and outputs.
        where: they lie, for people.
    """
    gives = {name: part for part, (_, outputs) in tensors.items() if part != STEP for name in outputs}
    # What crosses is named after a module of some depth, and no input of a denoiser has a dot.
    takes = {name for name in tensors[STEP][0] if "." in name or name in gives}
    if odd := sorted(takes ^ set(gives)):
        what = f"nothing gives {odd[0]} to the step" if odd[0] in takes else f"the step does not take {odd[0]}"
        raise InputError(f"{where} has graphs that are not of one export: {what}; export it again")


def inputs_of(model: ir.Model) -> dict[str, TensorSpec]:
    """The graph's inputs by name, in their order."""
    return {name_of(v): _spec(v) for v in model.graph.inputs if not v.is_initializer()}


def outputs_of(model: ir.Model) -> dict[str, TensorSpec]:
    """The graph's outputs by name, in their order."""
    return {name_of(v): _spec(v) for v in model.graph.outputs}


def shape_of(value: ir.Value | None) -> Shape:
    """Sizes of a tensor; no dims where the graph says no shape."""
    return tuple(d if isinstance(d, int) else d.value or "" for d in (value and value.shape) or ())


def depth_of(model: ir.Model) -> str | None:
    """The up block that a shallow graph begins with; None of another graph."""
    return model.metadata_props.get(DEPTH)


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


def _joined(models: Mapping[str, ir.Model]) -> ir.Model:
    """The whole graph of a denoiser in parts, the step first: all inputs (`timestep` a scalar), nodes and weights.

    What two parts both compute is in it twice.
    """
    from exporters.graphs.inputs import in_order

    onnx_ir = require("onnx_ir", "onnx")
    step = models[STEP].graph
    inputs: dict[str, ir.Value] = {name_of(value): value for value in step.inputs}
    results = [*step.outputs]
    nodes: list[ir.Node] = []
    weights: dict[str, ir.Value] = {}
    taken: set[tuple[bool, str | None]] = set()
    for part, model in models.items():
        crossing = {name_of(value): value for value in model.graph.outputs if part != STEP}
        values = [*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]
        for named in (*values, *model.graph):
            key = (isinstance(named, onnx_ir.Node), named.name)
            if key in taken:
                named.name = f"{named.name}:{part}"
            taken.add(key)
        own, at, initializers = list(model.graph.inputs), list(model.graph), list(model.graph.initializers.values())
        for held in (model.graph.inputs, model.graph.outputs, model.graph.initializers):
            held.clear()
        model.graph.remove(at)
        for value in own:
            known = inputs.setdefault(name_of(value), value)
            if known is not value:
                value.replace_all_uses_with(known)
        for name, value in crossing.items():
            inputs.pop(name).replace_all_uses_with(value)
        weights |= {name_of(value): value for value in initializers}
        nodes = nodes + at if part == STEP else at + nodes
    spread, constants = _spread(inputs)
    ordered = [inputs[name] for name in in_order(inputs)]
    graph = onnx_ir.Graph(
        ordered,
        results,
        nodes=[*spread, *nodes],
        initializers=[*weights.values(), *constants],
        opset_imports=dict(models[STEP].opset_imports),
        name=step.name,
    )
    model = onnx_ir.Model(graph, ir_version=models[STEP].ir_version)
    model.metadata_props.update(models[STEP].metadata_props)
    return model


def _spread(inputs: dict[str, ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that spread a scalar `timestep`, which is put into `inputs`, over the batch; and their constant."""
    onnx_ir = require("onnx_ir", "onnx")
    per_sample, sample = inputs["timestep"], inputs["sample"]
    inputs["timestep"] = onnx_ir.Value(name="timestep", type=per_sample.type, shape=onnx_ir.Shape([]))
    axis = onnx_ir.Value(name="timestep:axis", const_value=onnx_ir.tensor([0], name="timestep:axis"))
    whole = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    size = onnx_ir.Value(name="timestep:batch", type=whole, shape=onnx_ir.Shape([1]))
    one = onnx_ir.Value(name="timestep:one", type=per_sample.type, shape=onnx_ir.Shape([1]))
    many = onnx_ir.Value(name="timestep:spread", type=per_sample.type, shape=per_sample.shape)
    per_sample.replace_all_uses_with(many)
    nodes = [
        onnx_ir.node("Shape", [sample], {"start": 0, "end": 1}, outputs=[size], name="/Shape:timestep"),
        onnx_ir.node("Unsqueeze", [inputs["timestep"], axis], outputs=[one], name="/Unsqueeze:timestep"),
        onnx_ir.node("Expand", [one, size], outputs=[many], name="/Expand:timestep"),
    ]
    return nodes, [axis]
