"""A graph worked on in stretches, one after the other, so that one stretch's weights and tensors are in memory at once.

A quantiser has ONNX Runtime give out every layer's weight, input and output together: of a full-size UNet that is
several times its own size. A stretch is a few of the denoiser's modules in the order that they run. What comes into it
on recorded calls is computed by ONNX Runtime too, a stretch at a time; cuts lie between blocks' resnets, transformers
and samplers, where nothing that could be quantised once is cut in two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graphs.reading import WEIGHTED, module_of, name_of, read_graph, shape_of
from slimdiff.errors import require
from slimdiff.progress import bar

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

STRETCH_BYTES = 2**28
"""Weights and outputs of layers in a stretch, in fp32; a module that has more is a stretch of its own."""
HELD = 3
"""How often a stretch's bytes are in memory: in its graph, in the session, and as what the session gives out."""

Feed = dict[str, np.ndarray]
Work = Callable[["onnx.ModelProto", Sequence[Feed]], "onnx.ModelProto"]
"""From a stretch's graph, its weights left in their file, and its inputs to the same graph worked on."""


def work_in_stretches(
    file: Path, feeds: Sequence[Mapping[str, np.ndarray]], names: Collection[str], work: Work, most: int = STRETCH_BYTES
) -> ir.Model:
    """Work on a graph stretch by stretch.

    Args:
        file: of the graph, whose weights lie beside it.
        feeds: its inputs, of recorded calls.
        names: of the nodes that are to be worked on: stretches without any stay as they are.
        work: gives a stretch back with the same inputs and outputs.
        most: bytes of a stretch.

    Returns:
        the whole graph; weights that `work` left alone are still in the file.
    """
    ir, model = require("onnx_ir", "onnx"), read_graph(file)
    whole = _Whole(model.graph)
    tensors = [dict(feed) for feed in feeds]
    stretches = cut(model.graph, most)
    last = max((i for i, nodes in enumerate(stretches) if any(n.name in names for n in nodes)), default=-1)
    for number, nodes in enumerate(bar(stretches, "quantise", "stretch")):
        part = _part(model, nodes)
        proto = ir.to_proto(part)
        inputs = [name_of(value) for value in part.graph.inputs]
        asked = any(node.name in names for node in nodes)
        done = work(proto, [{name: held[name] for name in inputs} for held in tensors]) if asked else proto
        whole.add(ir.from_proto(done), number)
        if number < last:
            _run(proto, file.parent, inputs, tensors)
            needed = {name_of(v) for later in stretches[number + 1 :] for node in later for v in node.inputs if v}
            for held in tensors:
                for name in set(held) - needed:
                    del held[name]
    return ir.Model(whole.graph(), ir_version=model.ir_version)


def cut(graph: ir.Graph, most: int = STRETCH_BYTES) -> list[list[ir.Node]]:
    """The nodes in stretches, in order: as many modules together as have at most so many bytes."""
    modules: list[list[ir.Node]] = []
    before = ""
    for node in graph:
        module = _module(node) or before
        if not modules or module != before:
            modules.append([])
        modules[-1].append(node)
        before = module
    stretches: list[list[ir.Node]] = []
    size = 0
    for nodes in modules:
        own = sum(map(_bytes, nodes))
        if not stretches or size + own > most:
            stretches.append([])
            size = 0
        stretches[-1] += nodes
        size += own
    return stretches


def peak_bytes(graph: ir.Graph, calls: int, most: int = STRETCH_BYTES) -> int:
    """About what a graph worked on in stretches takes at its peak beside itself in fp32; open sizes count as one.

    That is its weights in int8, a stretch as a quantiser has it, and what crosses a cut on all calls.
    """
    weights = sum(_size(value) for value in graph.initializers.values()) // 4
    ends: dict[ir.Value, int] = {}
    stretches = cut(graph, most)
    for number, nodes in enumerate(stretches):
        ends |= {v: number for node in nodes for v in node.inputs if v is not None and v.producer() is not None}
    crossing = [0] * len(stretches)
    for number, nodes in enumerate(stretches):
        for value in (value for node in nodes for value in node.outputs):
            for later in range(number, ends.get(value, number)):
                crossing[later] += _size(value)
    return weights + HELD * max(sum(map(_bytes, nodes)) for nodes in stretches) + calls * max(crossing)


def _module(node: ir.Node) -> str:
    """What a node's module lies in, down to the second place in a list: `down_blocks.0.resnets.1`."""
    names, places = module_of(node).split("."), 0
    for index, name in enumerate(names):
        places += name.isdigit()
        if places == 2:
            return ".".join(names[: index + 1])
    return ".".join(names[:3]) if places else names[0]


def _bytes(node: ir.Node) -> int:
    """Of a layer's constants and output."""
    if node.op_type not in WEIGHTED:
        return 0
    return sum(
        _size(v)
        for v in (*node.inputs, *node.outputs)
        if v is not None and (v.is_initializer() or v.producer() is node)
    )


def _size(value: ir.Value) -> int:
    """Bytes in fp32; open sizes count as one."""
    return 4 * prod(dim for dim in shape_of(value) if isinstance(dim, int))


def _part(model: ir.Model, nodes: Sequence[ir.Node]) -> ir.Model:
    ir, own = require("onnx_ir", "onnx"), set(nodes)
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and not v.is_initializer())
    inputs = [value for value in read if value.producer() not in own]
    outputs = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in own for use in value.uses())
    ]
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    return ir.Model(graph, ir_version=model.ir_version)


def _run(proto: onnx.ModelProto, folder: Path, inputs: Sequence[str], tensors: Sequence[Feed]) -> None:
    """Compute a stretch's outputs, and put them to the calls' tensors."""
    ort = require("onnxruntime", "int8")
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False  # an output that is kept would keep all of it
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    for held in tensors:
        held |= dict(zip(outputs, session.run(outputs, {name: held[name] for name in inputs}), strict=True))


class _Whole:
    """The stretches put together again."""

    def __init__(self, source: ir.Graph) -> None:
        self._source = source
        self._values: dict[str, Any] = {}
        self._weights: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._names: set[str | None] = set()
        self._quantisers: dict[tuple[Any, ...], ir.Node] = {}

    def add(self, model: ir.Model, number: int) -> None:
        """Take a stretch's nodes and constants, which go by new names where another has theirs."""
        graph = model.graph
        inputs, outputs, nodes = list(graph.inputs), list(graph.outputs), list(graph)
        weights = list(graph.initializers.values())
        for part in (graph.inputs, graph.outputs, graph.initializers):
            part.clear()
        graph.remove(nodes)
        for value in inputs:
            known = self._values.setdefault(name_of(value), value)
            if known is not value:
                value.replace_all_uses_with(known)
        for value in weights:
            self._weigh(value, number)
        held: list[Any] = [*(v for node in nodes for v in node.outputs), *nodes]
        for named in held:
            if named.name in self._names:
                named.name = f"{named.name}:{number}"
            self._names.add(named.name)
        self._values |= {name_of(value): value for value in outputs}
        self._nodes += [node for node in nodes if not self._is_known(node)]

    def graph(self) -> ir.Graph:
        source = self._source
        return require("onnx_ir", "onnx").Graph(
            [self._values.get(name_of(value), value) for value in source.inputs],
            [self._values[name_of(value)] for value in source.outputs],
            nodes=self._nodes,
            initializers=[value for value in self._weights.values() if value.uses()],
            opset_imports=dict(source.opset_imports),
            name=source.name,
        )

    def _weigh(self, value: ir.Value, number: int) -> None:
        """Take a constant: the one that is there, or that lies in the file, if it is the same."""
        tensor, name = value.const_value, name_of(value)
        assert tensor is not None
        known, there = self._weights.get(name), self._source.initializers.get(name)
        if there is not None and there.const_value is not None and _same(there.const_value, tensor):
            value.const_value = tensor = there.const_value
        else:  # out of the stretch's memory, which goes as a whole
            ir = require("onnx_ir", "onnx")
            value.const_value = tensor = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
        if known is not None and known.const_value is not None:
            if _same(known.const_value, tensor):
                value.replace_all_uses_with(known)
                return
            value.name = f"{name}:{number}"
        self._weights[name_of(value)] = value
        self._names.add(name_of(value))

    def _is_known(self, node: ir.Node) -> bool:
        """Whether another stretch quantises the same tensor in the same steps: this one then takes its."""
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.inputs[0] in self._weights.values():
            return False
        steps = [v.const_value.numpy().tobytes() for v in node.inputs[1:] if v is not None and v.const_value]
        known = self._quantisers.setdefault((node.op_type, node.inputs[0], *steps), node)
        if known is not node:
            node.outputs[0].replace_all_uses_with(known.outputs[0])
        return known is not node


def _same(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    if one is other or _place(one) is not None and _place(one) == _place(other):
        return True
    return one.shape == other.shape and one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy())


def _place(tensor: ir.TensorProtocol) -> tuple[Any, ...] | None:
    """Where in the weights' file a tensor lies, which a graph taken from another no longer knows the folder of."""
    external = isinstance(tensor, require("onnx_ir", "onnx").ExternalTensor)
    return (tensor.location, tensor.offset, tensor.length) if external else None  # type: ignore[attr-defined]
