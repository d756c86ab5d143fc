"""A denoiser's graph in parts: what depends on the prompt alone, what on the time, and what is left for every step.

The exported graph is cut, so that a part has the very nodes that the whole had: keys and values of cross-attention, and
whatever else the prompt alone decides, are outputs of the graph `prompt`, the time projections are outputs of the graph
`time`, and the graph `step` takes both, by the names of the modules that they come from.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import exporters.graphs.inputs as names
from exporters.graphs.reading import module_of, name_of, read_graph, shape_of
from exporters.graphs.timesteps import timestep_per_sample
from exporters.layout import GRAPH, PARTS, PROMPT, STEP, TIME
from slimdiff.errors import InputError, require

if TYPE_CHECKING:
    import onnx_ir as ir

_OWNERS = {**dict.fromkeys(names.PROMPT, PROMPT), **dict.fromkeys(names.TIME, TIME)}
"""Kind of a graph's input -> the part that it goes to, unless another part's input comes in."""


def split_graph(onnx_file: Path | str, folder: Path | str) -> dict[str, Path]:
    """Cut a denoiser's graph into parts.

    A part ends with a module whose nodes are all of that part (`attn2.to_k`, `time_emb_proj`). What a module does next
    that needs the sample too, such as the split into heads, stays in the step. `exporters.graphs.reading.read_graph`
    joins the parts again.

    Args:
        onnx_file: that `export_unet` wrote; it is not changed.
        folder: gets a folder for each part, with `model.onnx` and `model.onnx.data`.

    Returns:
        the parts' graphs, by `exporters.layout.PARTS`; none for a part that this denoiser does not have (`prompt`, if
        it has no cross-attention).

    Raises:
        InputError: for a graph that is no denoiser's, or in which no module depends on the prompt or the time alone.
    """
    cuts = _cuts(_per_sample(onnx_file))
    if not cuts:
        raise InputError(
            f"{onnx_file} has no module that depends on the prompt or the time alone, so it cannot be split: export it "
            "whole, without --split"
        )
    files = {part: Path(folder) / part / GRAPH for part in PARTS if part == STEP or part in cuts.values()}
    for part, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = _per_sample(onnx_file)
        model = _part(whole, part, cuts)
        model.metadata_props.update(whole.metadata_props)
        require("onnx_ir", "onnx").save(model, str(file), external_data=f"{GRAPH}.data")
        require("onnx", "onnx").checker.check_model(str(file), full_check=True)
    return files


def crossing(model: ir.Model) -> dict[str, str]:
    """What the step takes from the other parts of a whole graph: its name there -> that of the tensor in this graph."""
    values = {name_of(v): v for node in model.graph for v in node.outputs}
    return {new: old for old, new in _names(values, _cuts(model)).items()}


def parameters_of_parts(model: ir.Model) -> dict[str, int]:
    """How many numbers the initializers of each part of a whole graph would have, by `exporters.layout.PARTS`.

    They need no values.
    """
    cuts = _cuts(model)
    graphs = {part: _part(model, part, cuts).graph for part in PARTS if part == STEP or part in cuts.values()}
    return {
        part: sum(prod(weight.shape.numpy()) for weight in graph.initializers.values() if weight.shape)
        for part, graph in graphs.items()
    }


def _per_sample(onnx_file: Path | str) -> ir.Model:
    """The graph, its timestep `[B]`."""
    model = read_graph(onnx_file)
    timestep_per_sample(model)
    return model


def _cuts(model: ir.Model) -> dict[str, str]:
    """Names of the tensors that the step takes from the other parts, each with its part."""
    batch = _batch_sizes(model)
    owners: dict[str, str] = {
        name_of(v): _OWNERS.get(names.kind_of_input(name_of(v)), STEP) for v in model.graph.inputs
    }
    parts: dict[ir.Node, str] = {}
    for node in model.graph:
        read = {owners[name_of(v)] for v in node.inputs if v is not None and name_of(v) in owners}
        if node in batch or not read:  # a constant is computed where it is needed
            continue
        parts[node] = next(part for part in (STEP, TIME, PROMPT) if part in read)
        owners |= dict.fromkeys(map(name_of, node.outputs), parts[node])
    modules: dict[str, set[str]] = defaultdict(set)
    for node, part in parts.items():
        modules[module_of(node)].add(part)
    cuts: dict[str, str] = {}
    for node in reversed(list(model.graph)):
        crossing = [v for v in node.outputs if any(parts.get(use.node) == STEP for use in v.uses())]
        if parts.get(node, STEP) == STEP or not crossing:
            continue
        if module_of(node) and modules[module_of(node)] == {parts[node]}:
            cuts |= {name_of(value): parts[node] for value in crossing}
        else:  # it stays in the step, and what it reads crosses in its place
            parts[node] = STEP
    return dict(reversed(cuts.items()))


def _names(values: Mapping[str, ir.Value], cuts: Mapping[str, str]) -> dict[str, str]:
    """The names of what crosses between parts, after the modules that it comes from."""
    seen: Counter[str] = Counter()
    named: dict[str, str] = {}
    for name in cuts:
        module = module_of(values[name].producer())  # type: ignore[arg-type]  # which it has
        seen[module] += 1
        named[name] = module if seen[module] == 1 else f"{module}_{seen[module]}"
    return named


def _batch_sizes(model: ir.Model) -> list[ir.Node]:
    """The nodes that ask an input for its open batch, which every part can ask one of its own inputs for."""
    return [
        node
        for node in model.graph
        if node.op_type == "Shape"
        and node.attributes.get_int("start", 0) == 0
        and node.attributes.get_int("end", -1) == 1
        and (value := node.inputs[0]) is not None
        and value.is_graph_input()
        and isinstance(shape_of(value)[0], str)
    ]


def _part(model: ir.Model, part: str, cuts: Mapping[str, str]) -> ir.Model:
    """One of the parts, with what crosses between them named after the modules that it comes from."""
    ir = require("onnx_ir", "onnx")
    values = {name_of(v): v for node in model.graph for v in node.outputs}
    named = _names(values, cuts)
    own = [value for value in model.graph.inputs if part == STEP or _OWNERS.get(names.kind_of_input(name_of(value)))]
    for node in _batch_sizes(model):
        source = node.inputs[0]
        if source not in own:
            alike = next((v for v in own if shape_of(v)[:1] == shape_of(source)[:1]), None)
            node.replace_input_with(0, alike or source)
    edge = [name for name, owner in cuts.items() if owner == part or part == STEP]
    inputs = [*own, *(values[name] for name in edge if part == STEP)]
    outputs = list(model.graph.outputs) if part == STEP else [values[name] for name in edge]
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    for value in (*graph.inputs, *graph.outputs):
        if name_of(value) in named:
            value.name = named[name_of(value)]
    unused = [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]
    for value in unused:
        graph.inputs.remove(value)
    return ir.Model(graph, ir_version=model.ir_version)
