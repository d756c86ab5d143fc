"""Shapes of everything in a graph, and the search for dimensions of the dense model that a slim one's graph kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.graphs.naming import compare_dims, layers_of, weight_dims
from exporters.graphs.reading import Shape, module_of, name_of, read_graph, shape_of
from slimdiff.errors import SlimdiffError, require
from slimdiff.groups import GROUPS

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto, ValueInfoProto

    from slimdiff.plan import Plan, SitePlan


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
    for output, inferred in zip(model.graph.output, graph.output, strict=True):
        in_torch, in_graph = _dims(output), _dims(inferred)
        pairs = zip(in_torch, in_graph, strict=False)
        clash = any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
        if clash or len(in_torch) != len(in_graph):
            raise SlimdiffError(f"{output.name} is {in_torch} in torch and {in_graph} in the graph")
    model.graph.value_info.extend(graph.value_info)


def _dims(value: ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)


def leftover_dims(onnx_file: Path | str, plan: Plan) -> list[dict[str, Any]]:
    """Whatever in a slim model's graph still has a dimension of the dense one.

    At every site that the plan slims, everything from its first layers to its last is looked at: weights, intermediate
    tensors, and the whole numbers that Reshapes and Splits get. A dense dimension that equals one which may be
    there (the batch, the tokens, twice the rank) says nothing and is passed over; the layers' own weights are held
    against the plan axis by axis. A weight that no node reads is a leftover too. The graph is one of `export_unet`'s.

    Returns:
        one dict per finding: `site` (module path; empty for unread weights), `tensor`, `dims` and `what`.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
    """
    model = read_graph(onnx_file)
    graph, weights = model.graph, weight_dims(model)
    unread = [w for w in graph.initializers.values() if not w.uses() and not w.is_graph_output()]
    by_module: dict[str, list[ir.Node]] = defaultdict(list)
    for node in graph:
        by_module[module_of(node)].append(node)
    rows = []
    for site in compare_dims(weights, plan):
        for layer, expected in site["expected"].items():
            if (found := site["found"][layer]) != expected:
                dims = [] if found is None else [found]
                rows.append(_row(site["path"], f"{layer}'s weight", dims, f"the plan keeps {expected}"))
    by_path: dict[str, list[SitePlan]] = defaultdict(list)
    for planned in plan.sites.values():
        if planned.rank < planned.dense_rank and not GROUPS[planned.group].fills_up:
            by_path[planned.path].append(planned)
    left = [row for path, sites in by_path.items() for row in _leftovers_at(path, sites, graph, by_module, weights)]
    return [_row("", name_of(w), shape_of(w), "a weight that no node reads") for w in unread] + rows + left


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


def _leftovers_at(
    path: str,
    sites: Sequence[SitePlan],
    graph: ir.Graph,
    by_module: Mapping[str, list[ir.Node]],
    weights: Mapping[str, tuple[int, ...]],
) -> list[dict[str, Any]]:
    dense = {n for site in sites for n in _inner_sizes(site, site.dense_rank)}
    dense -= {n for site in sites for n in _inner_sizes(site, site.rank)}
    heads = max(site.heads for site in sites)
    axes = {layer: inner.axis for site in sites for layer, inner in layers_of(site).items()}
    first: list[ir.Node] = []
    last: list[ir.Node] = []
    around: set[int] = set()
    for layer, axis in axes.items():
        nodes = by_module[f"{path}.{layer}"]
        nodes = [node for node in nodes if any(_is_weight(v) and len(shape_of(v)) > 1 for v in node.inputs)]
        (first if axis == 0 else last).extend(nodes)
        for node in nodes if axis == 0 else ():
            convolution = len(weights[f"{path}.{layer}"]) == 4
            around |= _extents(shape_of(node.inputs[0]), convolution, heads)
    rows = []
    inside = _between(first, last) if last else set()
    for value in (v for node in graph if node in inside or node in first for v in node.outputs):
        if hits := (dense - around) & set(shape_of(value)):
            rows.append(_row(path, name_of(value), shape_of(value), f"{min(hits)} is dense"))
    for node, value in ((n, v) for n in graph if n in inside for v in n.inputs if v is not None):
        if _is_weight(value) and (hits := dense & set(shape_of(value))):
            rows.append(_row(path, name_of(value), shape_of(value), f"a weight with a dense {min(hits)}"))
        if hits := (dense - around) & set(numbers := _whole_numbers(value)):
            rows.append(_row(path, name_of(value), numbers, f"tells {node.name} a dense {min(hits)}"))
    return rows


def _between(first: Iterable[ir.Node], last: Iterable[ir.Node]) -> set[ir.Node]:
    """The nodes on the way from the outputs of the first nodes to the last ones, without both."""
    ends, found = set(last), set()
    stack = [node for start in first for node in start.successors()]
    while stack:
        node = stack.pop()
        if node not in ends and node not in found:
            found.add(node)
            stack += node.successors()
    return found


def _whole_numbers(value: ir.Value | None) -> list[int]:
    """The whole numbers that a tensor of them is made of: the constant ones among a Reshape's target."""
    ir = require("onnx_ir", "onnx")
    if value is None or value.dtype != ir.DataType.INT64:
        return []
    if (tensor := ir.convenience.get_const_tensor(value)) is not None:
        return tensor.numpy().reshape(-1).tolist()
    node = value.producer()
    return [n for v in node.inputs for n in _whole_numbers(v)] if node and node.op_type != "Shape" else []


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.dtype != require("onnx_ir", "onnx").DataType.INT64


def _inner_sizes(site: SitePlan, rank: int) -> set[int]:
    """Sizes that a rank shows as: of a head and of all heads; of value rows alone and with gate rows."""
    return {rank} | {n * site.heads * rank + inner.before for inner in layers_of(site).values() for n in inner.times}


def _extents(shape: Shape, convolution: bool, heads: int) -> set[int]:
    """Sizes around a layer that are no channels: heads, the batch (once per head, too), tokens, height and width."""
    channels = 1 if convolution else len(shape) - 1
    sizes = {size for axis, size in enumerate(shape) if axis != channels and isinstance(size, int)}
    return sizes | {heads} | {size * heads for size in shape[:1] if isinstance(size, int)}


def _row(site: str, tensor: str, dims: Iterable[int | str], what: str) -> dict[str, Any]:
    return {"site": site, "tensor": tensor, "dims": list(dims), "what": what}
