"""What an exported graph looks like: nodes and weights named by module, and the dims of every weight."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.graphs.reading import WEIGHTED, module_of, name_of, read_graph, weight_of
from slimdiff.errors import require
from slimdiff.groups import GROUPS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from slimdiff.groups.group import Inner
    from slimdiff.plan import Plan, SitePlan


def name_by_module(model: ir.Model, prefix: str) -> None:
    """Name nodes and weights after the modules that they come from, then drop what only the exporter needed.

    torch's exporter transposes the weights of linears and calls them `val_123`; only the nodes' metadata tell where
    they come from. Afterwards node `to_q`'s MatMul is `down_blocks.0...attn1.to_q/MatMul`, its weight
    `down_blocks.0...attn1.to_q.weight` (`.weight_t` where transposed, so that nobody loads it as torch's), and the
    layers of a TensorRT network and ONNX Runtime's profiles carry these names too. `metadata_props` (stack traces)
    are cleared.

    Args:
        model: changed in place.
        prefix: of the names, cut off: the wrapper's attribute that holds the module, e.g. `unet.`.
    """
    graph = model.graph
    weights = list(graph.initializers.values())
    taken = {name.removeprefix(prefix) for name in graph.initializers}
    seen: Counter[str] = Counter()
    for node in graph:
        module = _scope_of(node, prefix)
        weight = _second_input(node) if node.op_type in ("MatMul", "Gemm") else None
        # A weight that two modules share keeps the first one's name; the nodes still tell both.
        if weight is not None and module and name_of(weight).startswith("val_"):
            name = f"{module}.weight" if _transposed_b(node) else f"{module}.weight_t"
            if name not in taken:
                weight.name = name
                taken.add(name)
        path = f"{module}/{node.op_type}"
        seen[path] += 1
        node.name = path if seen[path] == 1 else f"{path}_{seen[path]}"
    outputs = {name_of(value) for value in graph.outputs}  # a text encoder's are called like its final norm's weights
    for weight in weights:
        name = name_of(weight).removeprefix(prefix)
        weight.name = name_of(weight) if name in outputs else name
        graph.initializers.add(graph.initializers.pop(weight.name))  # a new name moves it to the end: all go there
    _clear_metadata(model)


def weight_dims(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Dims of the weight of every linear and convolution in a graph that `export_unet` wrote.

    Returns:
        module path -> dims in torch's layout: `(out, in)` for linears, `(out, in / groups, kh, kw)` for convolutions.
    """
    found: dict[str, tuple[int, ...]] = {}
    for node in model.graph:
        weight = weight_of(node) if node.op_type in WEIGHTED else None
        if weight is not None and weight.const_value is not None:
            dims = tuple(weight.const_value.shape.numpy())
            keep = node.op_type == "Conv" or _transposed_b(node)
            found[module_of(node)] = dims if keep else dims[::-1]
    return found


def check_reduced_dims(onnx_file: Path | str, plan: Plan) -> list[dict[str, Any]]:
    """Hold the inner dims of a graph that `export_unet` wrote against the plan: `compare_dims`'s list."""
    return compare_dims(weight_dims(read_graph(onnx_file)), plan)


def layers_of(site: SitePlan) -> Mapping[str, Inner]:
    """The layers that carry a site's rank in a graph, by path below the site's module."""
    return site.layers or GROUPS[site.group].inner


def with_layers(plan: Plan, denoiser: nn.Module) -> Plan:
    """The plan of a slim model with the layers that carry its ranks, where a module has others than its group."""
    sites = {}
    for name, site in plan.sites.items():
        group, module = GROUPS[site.group], denoiser.get_submodule(site.path)
        own = {path: inner for path, _, inner in group.layers(module)}
        known = all(inner == group.inner.get(path) for path, inner in own.items())
        sites[name] = site if known else site.model_copy(update={"layers": own})
    return plan.model_copy(update={"sites": sites})


def compare_dims(
    dims: Mapping[str, tuple[int, ...]], plan: Plan, only: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Hold weight dims (module path -> `(out, in)`), wherever they were read, against the plan.

    Args:
        only: the layers, by module path, that are looked for: those of a denoiser's part. All if not given.

    Returns:
        one dict per site: `site`, `path`, `expected` and `found` (layer -> inner dim; `found` has None for a layer
        that is not there) and `ok`. A feed-forward's first linear has twice the inner dim when its activation is gated.
    """
    rows = []
    for name, site in plan.sites.items():
        layers = {layer: inner for layer, inner in layers_of(site).items() if inner.checked}
        paths = {layer: f"{site.path}.{layer}" for layer in layers if only is None or f"{site.path}.{layer}" in only}
        layers = {layer: layers[layer] for layer in paths}
        if not layers:
            continue
        found = {n: int(dims[paths[n]][inner.axis]) if paths[n] in dims else None for n, inner in layers.items()}
        # Nothing but the graph tells whether an activation is gated: then it receives twice what the last layer does.
        last = found[list(layers)[-1]] or 0
        expected = {}
        for layer, inner in layers.items():
            times = next((n for n in inner.times if (found[layer] or 0) == n * last), inner.times[-1])
            expected[layer] = inner.before + times * site.heads * site.rank
        rows.append(site_row(name, site.path, expected, found))
    return rows


def site_row(site: str, path: str, expected: dict[str, int], found: dict[str, int | None]) -> dict[str, Any]:
    """What the plan says of a site, what was found, and whether they agree."""
    return {"site": site, "path": path, "expected": expected, "found": found, "ok": expected == found}


def _second_input(node: ir.Node) -> ir.Value | None:
    """What a node reads second, if it is a weight."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return value if value is not None and value.is_initializer() else None


def _transposed_b(node: ir.Node) -> bool:
    return node.attributes.get_int("transB", 0) == 1


def _scope_of(node: ir.Node, prefix: str) -> str:
    """Path of the module in whose `forward` the exporter met the node; empty for its own nodes."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    inside = [scope for scope in scopes if scope.startswith(prefix)]
    return inside[-1].removeprefix(prefix) if inside else ""


def _clear_metadata(model: ir.Model) -> None:
    require("onnx_ir", "onnx").passes.common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
            if value.const_value is not None:
                value.const_value.metadata_props.clear()
