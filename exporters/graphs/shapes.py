"""Shapes of everything in a graph, and the search for dimensions of the dense model that a slim one's graph kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.graphs.naming import compare_dims, dims_in_graph, module_of, read_graph
from slimdiff.errors import SlimdiffError, require
from slimdiff.groups import GROUPS

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

    from slimdiff.plan import Plan, SitePlan

Shape = tuple[int | str, ...]
_INT64 = 7
"""`onnx.TensorProto`'s dtype of shapes."""


def add_shapes(model: ModelProto) -> None:
    """Infer the shape of every tensor, write it into the graph's `value_info`, and hold the outputs' against torch's.

    onnx's inference knows nothing of GroupNormalization before it is expanded, and would end at the first one; it gives
    what it takes, in shape and dtype, so that for inference an Identity stands in for it.

    Args:
        model: changed in place; its outputs have the shapes that torch gave them. Weights need not be loaded.

    Raises:
        SlimdiffError: if inference fails, or an output's shape is not torch's.
    """
    onnx = require("onnx", "onnx")
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(model)
    for node in stand_in.graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    for value in stand_in.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(stand_in, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise SlimdiffError(f"shapes cannot be inferred in this graph: {error}") from error
    for told, found in zip(model.graph.output, graph.output, strict=True):
        pairs = zip(shape_of(told), shape_of(found), strict=False)
        clash = any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
        if clash or len(shape_of(told)) != len(shape_of(found)):
            raise SlimdiffError(f"{told.name} is {shape_of(told)} in torch and {shape_of(found)} in the graph")
    model.graph.value_info.extend(graph.value_info)


def shape_of(value: ValueInfoProto) -> Shape:
    """Sizes; of open dims their names, or nothing where they have none."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)


def shapes_in_graph(onnx_file: Path | str) -> dict[str, Shape]:
    """Shape of every input, output, weight and intermediate tensor that the graph says one of, by name.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
    """
    return _shapes(read_graph(onnx_file).graph)


def _shapes(graph: GraphProto) -> dict[str, Shape]:
    values = (*graph.input, *graph.output, *graph.value_info)
    shapes: dict[str, Shape] = {v.name: shape_of(v) for v in values if v.type.tensor_type.HasField("shape")}
    return shapes | {i.name: tuple(i.dims) for i in graph.initializer}


def leftover_dims(onnx_file: Path | str, plan: Plan) -> list[dict[str, Any]]:
    """Whatever in a slim model's graph still has a dimension of the dense one.

    At every site that the plan slims, everything from its first layers to its last is looked at: weights, intermediate
    tensors, and the whole numbers that Reshapes and Splits are told. A dense dimension that equals one which may be
    there (the batch, the tokens, twice the rank) says nothing and is passed over; the layers' own weights are held
    against the plan axis by axis. A weight that no node reads is a leftover too.

    Args:
        onnx_file: a graph that `export_unet` wrote.
        plan: of the model in it.

    Returns:
        one dict per finding: `site` (module path; empty for unread weights), `tensor`, `dims` and `what`.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
    """
    graph = read_graph(onnx_file).graph
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    unread = [_row("", i.name, i.dims, "a weight that no node reads") for i in graph.initializer if i.name not in read]
    weights, wires = dims_in_graph(onnx_file), _Wires(graph)
    rows = []
    for site in compare_dims(weights, plan):
        for layer, wanted in site["expected"].items():
            if (found := site["found"][layer]) != wanted:
                dims = [] if found is None else [found]
                rows.append(_row(site["path"], f"{layer}'s weight", dims, f"the plan keeps {wanted}"))
    by_path: dict[str, list[SitePlan]] = defaultdict(list)
    for planned in plan.sites.values():
        if planned.rank < planned.dense_rank:
            by_path[planned.path].append(planned)
    return (
        unread + rows + [row for path, sites in by_path.items() for row in _leftovers_at(path, sites, wires, weights)]
    )


def check_leftovers(onnx_file: Path | str, plan: Plan) -> None:
    """Refuse a slim model's graph in which something dense is left.

    Raises:
        SlimdiffError: naming the first of `leftover_dims`.
    """
    if rows := leftover_dims(onnx_file, plan):
        first = rows[0]
        raise SlimdiffError(
            f"{len(rows)} dense dimensions are left in {onnx_file}, the first at {first['site'] or 'no site'}: "
            f"{first['tensor']} {first['dims']} ({first['what']})"
        )


class _Wires:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: GraphProto):
        numpy_helper = require("onnx", "onnx").numpy_helper
        self.shapes = _shapes(graph)
        self.nodes: list[NodeProto] = list(graph.node)
        self.by_module: dict[str, list[int]] = defaultdict(list)
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.maker: dict[str, NodeProto] = {}
        self.weights = {i.name for i in graph.initializer if i.data_type != _INT64}
        numbers = {i.name: i for i in graph.initializer if i.data_type == _INT64}
        for index, node in enumerate(self.nodes):
            self.by_module[module_of(node)].append(index)
            for name in node.input:
                self.readers[name].append(index)
            for name in node.output:
                self.maker[name] = node
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                if value is not None and value.data_type == _INT64:
                    numbers[node.output[0]] = value
        self.numbers = {name: numpy_helper.to_array(t).reshape(-1).tolist() for name, t in numbers.items()}
        self.whole = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == _INT64}

    def weighted(self, path: str) -> list[int]:
        """Nodes of the linear or convolution at this path that read a weight of more than one axis."""
        found = []
        for index in self.by_module[path]:
            read = [self.shapes[name] for name in self.nodes[index].input if name in self.weights]
            found += [index] if any(len(shape) > 1 for shape in read) else []
        return found

    def between(self, first: Iterable[int], last: Iterable[int]) -> set[int]:
        """The nodes that what the first nodes make goes through on its way to the last ones, without both."""
        ends, found = set(last), set()
        stack = [name for i in first for name in self.nodes[i].output]
        while stack:
            for index in self.readers[stack.pop()]:
                if index not in ends and index not in found:
                    found.add(index)
                    stack += self.nodes[index].output
        return found

    def told(self, name: str) -> list[int]:
        """The whole numbers that a tensor of them is made of: the constant ones among a Reshape's target."""
        if name in self.numbers:
            return self.numbers[name]
        if name not in self.whole or self.maker[name].op_type == "Shape":
            return []
        return [number for source in self.maker[name].input for number in self.told(source)]


def _leftovers_at(
    path: str, sites: list[SitePlan], wires: _Wires, weights: Mapping[str, tuple[int, ...]]
) -> list[dict[str, Any]]:
    dense = {n for site in sites for n in _inner_sizes(site, site.dense_rank)}
    dense -= {n for site in sites for n in _inner_sizes(site, site.rank)}
    heads = max(site.heads for site in sites)
    axes = {layer: inner.axis for site in sites for layer, inner in GROUPS[site.group].inner.items()}
    first: list[int] = []
    last: list[int] = []
    around: set[int] = set()
    for layer, axis in axes.items():
        nodes = wires.weighted(f"{path}.{layer}")
        (first if axis == 0 else last).extend(nodes)
        for node in nodes if axis == 0 else ():
            convolution = len(weights[f"{path}.{layer}"]) == 4
            around |= _extents(wires.shapes.get(wires.nodes[node].input[0], ()), convolution, heads)
    rows = []
    inside = wires.between(first, last) if last else set()
    for index in sorted({*inside, *first}):
        for name in wires.nodes[index].output:
            if hits := (dense - around) & set(wires.shapes.get(name, ())):
                rows.append(_row(path, name, wires.shapes[name], f"{min(hits)} is dense"))
    for index in sorted(inside):
        for name in wires.nodes[index].input:
            if name in wires.weights and (hits := dense & set(wires.shapes[name])):
                rows.append(_row(path, name, wires.shapes[name], f"a weight with a dense {min(hits)}"))
            if hits := (dense - around) & set(wires.told(name)):
                rows.append(_row(path, name, wires.told(name), f"tells {wires.nodes[index].name} a dense {min(hits)}"))
    return rows


def _inner_sizes(site: SitePlan, rank: int) -> set[int]:
    """Sizes that a rank shows as: of a head and of all heads; of value rows alone and with gate rows."""
    return {rank} | {times * site.heads * rank for inner in GROUPS[site.group].inner.values() for times in inner.times}


def _extents(shape: Shape, convolution: bool, heads: int) -> set[int]:
    """Sizes of a layer's input that are no channels: the batch (once per head, too), tokens, height and width."""
    channels = 1 if convolution else len(shape) - 1
    sizes = {size for axis, size in enumerate(shape) if axis != channels and isinstance(size, int)}
    return sizes | {size * heads for size in shape[:1] if isinstance(size, int)}


def _row(site: str, tensor: str, dims: Iterable[int | str], what: str) -> dict[str, Any]:
    return {"site": site, "tensor": tensor, "dims": list(dims), "what": what}
