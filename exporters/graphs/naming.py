"""What an exported graph looks like: nodes and weights named by module, and the dims of every weight."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimdiff.errors import InputError, require
from slimdiff.groups import GROUPS
from slimdiff.storage.manifest import is_inside

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

    from slimdiff import Plan

WEIGHTED = ("MatMul", "Gemm", "Conv")
"""Operators that a linear or a convolution is exported as, the weight being their second input."""


def name_by_module(model: ModelProto, prefix: str) -> None:
    """Name nodes and weights after the modules that they come from, then drop what only the exporter needed.

    torch's exporter transposes the weights of linears and calls them `val_123`; only the nodes' metadata tell where
    they come from. Afterwards node `to_q`'s MatMul is `down_blocks.0...attn1.to_q/MatMul`, its weight
    `down_blocks.0...attn1.to_q.weight` (`.weight_t` where transposed, so that nobody loads it as torch's), and the
    layers of a TensorRT network and ONNX Runtime's profiles carry these names too. `metadata_props` (stack traces)
    and `value_info` are cleared.

    Args:
        model: changed in place; initializers need not be loaded.
        prefix: of the names, cut off: the wrapper's attribute that holds the module, e.g. `unet.`.
    """
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    renamed = {name: name.removeprefix(prefix) for name in weights}
    taken = set(renamed.values())
    seen: Counter[str] = Counter()
    for node in graph.node:
        module = _scope_of(node, prefix)
        if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1 and node.input[1] in weights and module:
            name = node.input[1]
            wanted = f"{module}.weight" if _transposed_b(node) else f"{module}.weight_t"
            # A weight that two modules share keeps the first one's name; the nodes still tell both.
            if renamed[name] == name.removeprefix(prefix) and name.startswith("val_") and wanted not in taken:
                renamed[name] = wanted
                taken.add(wanted)
        path = f"{module}/{node.op_type}"
        seen[path] += 1
        node.name = path if seen[path] == 1 else f"{path}_{seen[path]}"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]
    for initializer in graph.initializer:
        initializer.name = renamed[initializer.name]
    _clear_metadata(model)


def dims_in_graph(onnx_file: Path | str) -> dict[str, tuple[int, ...]]:
    """Dims of the weight of every linear and convolution in a graph that `export_unet` wrote.

    Returns:
        module path -> dims in torch's layout: `(out, in)` for linears, `(out, in / groups, kh, kw)` for convolutions.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
    """
    graph = read_graph(onnx_file).graph
    weights = {i.name: tuple(i.dims) for i in graph.initializer}
    found: dict[str, tuple[int, ...]] = {}
    for node in graph.node:
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in weights:
            dims = weights[node.input[1]]
            keep = node.op_type == "Conv" or _transposed_b(node)
            found[module_of(node)] = dims if keep else dims[::-1]
    return found


def check_reduced_dims(onnx_file: Path | str, plan: Plan) -> list[dict[str, Any]]:
    """Hold the inner dims of a graph that `export_unet` wrote against the plan.

    Returns:
        `compare_dims`'s list.
    """
    return compare_dims(dims_in_graph(onnx_file), plan)


def compare_dims(dims: Mapping[str, tuple[int, ...]], plan: Plan) -> list[dict[str, Any]]:
    """Hold weight dims, wherever they were read, against the plan.

    Args:
        dims: module path -> `(out, in)`, perhaps more.
        plan: whose sites are checked.

    Returns:
        one dict per site: `site`, `path`, `expected` and `found` (layer -> inner dim; `found` has None for a layer
        that is not there) and `ok`. A feed-forward's first linear has twice the inner dim when its activation is gated.
    """
    rows = []
    for name, site in plan.sites.items():
        layers = {layer: inner for layer, inner in GROUPS[site.group].inner.items() if inner.checked}
        found = {layer: _inner(dims.get(f"{site.path}.{layer}"), inner.axis) for layer, inner in layers.items()}
        # Nothing but the graph tells whether an activation is gated: then it receives twice what the last layer does.
        last = found[list(layers)[-1]] or 0
        expected = {}
        for layer, inner in layers.items():
            times = next((times for times in inner.times if (found[layer] or 0) == times * last), inner.times[-1])
            expected[layer] = times * site.heads * site.rank
        rows.append(site_row(name, site.path, expected, found))
    return rows


def site_row(site: str, path: str, expected: dict[str, int], found: dict[str, int | None]) -> dict[str, Any]:
    """What the plan says of a site, what was found, and whether they agree."""
    return {"site": site, "path": path, "expected": expected, "found": found, "ok": expected == found}


def attention_products(onnx_file: Path | str) -> list[str]:
    """Names of the MatMul nodes of which neither operand is a weight: two per attention layer."""
    graph = read_graph(onnx_file).graph
    constant = {i.name for i in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    return [n.name for n in graph.node if n.op_type == "MatMul" and not constant & set(n.input)]


def read_graph(onnx_file: Path | str) -> ModelProto:
    """The model without its external weights.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
    """
    onnx = require("onnx", "onnx")
    path = Path(onnx_file)
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has its own exception per implementation
        raise InputError(f"{path} is no ONNX model: {error}") from error


def external_data(graph: GraphProto) -> Iterator[dict[str, str]]:
    """What each tensor that is kept outside the graph's file says of its place: `location`, `offset`, `length`."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    tensors = [*graph.initializer, *(a.t for a in attributes), *(t for a in attributes for t in a.tensors)]
    yield from ({e.key: e.value for e in tensor.external_data} for tensor in tensors if tensor.external_data)
    for attribute in attributes:
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.initializer:
                yield from external_data(inner)


def refuse_outside(onnx_file: Path, names: Iterable[str]) -> None:
    """Refuse a graph whose weights lie elsewhere than below its folder, also by way of a link.

    Raises:
        InputError: naming them.
    """
    root = onnx_file.parent.resolve()
    outside = [n for n in names if not is_inside(n) or not (root / n).resolve().is_relative_to(root)]
    if outside:
        raise InputError(f"{onnx_file} names weights outside its folder ({', '.join(map(repr, outside))}): refused")


def module_of(node: NodeProto) -> str:
    """Path of the module that a node named by `name_by_module` comes from; empty for the exporter's own nodes."""
    return node.name.rpartition("/")[0]


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Name -> `onnx.TensorProto` dtype of every tensor of a graph, by the operators' own type constraints.

    onnx's shape inference ends at the first GroupNormalization, and dtypes need no shapes.
    """
    onnx = require("onnx", "onnx")
    versions = {opset.domain: opset.version for opset in model.opset_import}
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in graph.input}
    types |= {w.name: w.data_type for w in graph.initializer}
    for node in graph.node:
        schema = onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)
        bound: dict[str, int] = {}
        for index, name in enumerate(node.input):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]  # the last may take any number
            if name:
                bound.setdefault(formal.type_str, types[name])
        attributes = {a.name: a for a in node.attribute}
        said = [attributes[name].i for name in ("to", "dtype") if name in attributes]
        said += [attributes["value"].t.data_type] if "value" in attributes else []
        allowed = {c.type_param_str: c.allowed_type_strs[0] for c in schema.type_constraints}
        for index, name in enumerate(node.output):
            kind = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
            only = allowed.get(kind, kind).removeprefix("tensor(").removesuffix(")").upper()
            default = said[0] if said else onnx.TensorProto.DataType.Value(only)
            types[name] = bound.get(kind, default)
    return types


def _inner(dims: tuple[int, ...] | None, axis: int) -> int | None:
    return None if dims is None else int(dims[axis])


def _transposed_b(node: NodeProto) -> bool:
    return any(a.name == "transB" and a.i == 1 for a in node.attribute)


def _scope_of(node: NodeProto, prefix: str) -> str:
    """Path of the module in whose `forward` the exporter met the node; empty for its own nodes."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes: list[str] = ast.literal_eval(entry.value)
            inside = [s for s in scopes if s.startswith(prefix)]
            return inside[-1].removeprefix(prefix) if inside else ""
    return ""


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _clear_metadata(model: ModelProto) -> None:
    holders: list[Iterable[Any]] = [[model, *model.functions], *(f.node for f in model.functions)]
    for graph in _graphs(model.graph):
        holders += [[graph], graph.node, graph.initializer, graph.input, graph.output]
        del graph.value_info[:]
    for holder in holders:
        for item in holder:
            if hasattr(item, "metadata_props"):
                del item.metadata_props[:]
