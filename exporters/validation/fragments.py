"""Running parts of a graph: any tensors in, any tensors out, with the weights of those nodes alone in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graphs.reading import Shape, inputs_of, module_of, name_of, outputs_of, read_graph, shape_of
from exporters.runtimes.ort_session import inference_session
from slimdiff.errors import InputError, require

if TYPE_CHECKING:
    import onnx_ir as ir


class OnnxFragments:
    """A graph that `export_module` wrote, to be run piece by piece on the CPU.

    `onnx_ir` and Polygraphy take parts out of graphs too, but not one whose outputs it also reads (a tensor computed
    from a reference's values, to be held against the reference's own).

    Args:
        prefix: what was cut off the module paths when it was written, to be put back: `vae.` of a VAE's halves.

    Attributes:
        nodes: in execution order; `inputs`, `outputs`: names of the graph's.

    Raises:
        InputError: if there is no such file, it is no ONNX model, or does not say the dtype of every tensor.
    """

    def __init__(self, onnx_file: Path | str, prefix: str = ""):
        self.file = Path(onnx_file)
        self.model = read_graph(onnx_file)
        self.nodes: list[ir.Node] = list(self.model.graph)
        for node in self.nodes:
            node.name = f"{prefix}{node.name}"
        self.inputs, self.outputs = list(inputs_of(self.model)), list(outputs_of(self.model))
        if self._untyped():  # quantisers leave theirs out
            require("onnx_ir.passes.common", "onnx").ShapeInferencePass()(self.model)
        if self._untyped():
            raise InputError(f"{onnx_file} does not say the dtype of every tensor: export it again")
        self._makers: dict[str, ir.Node] = {name_of(value): node for node in self.nodes for value in node.outputs}

    def _untyped(self) -> bool:
        return any(value.dtype is None for node in self.nodes for value in node.outputs if value.name)

    def reads(self, node: ir.Node) -> list[str]:
        """Names of the node's inputs that are not weights."""
        return list(dict.fromkeys(name_of(v) for v in node.inputs if v is not None and not v.is_initializer()))

    def shape(self, name: str) -> Shape:
        """Sizes of a tensor that a node gives, as the graph says them."""
        return next(shape_of(value) for value in self._makers[name].outputs if value.name == name)

    def between(self, known: Collection[str], results: Iterable[str]) -> tuple[list[ir.Node], list[str]]:
        """The nodes that compute `results` from `known` (a tensor that is both is computed), in execution order.

        Returns:
            the nodes, and those of `known` (and of the graph's inputs) that they read.
        """
        needed: set[ir.Node] = set()
        reads: dict[str, None] = {}
        stack = [self._makers[name] for name in results]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            for name in self.reads(node):
                if name in known or name not in self._makers:
                    reads[name] = None
                else:
                    stack.append(self._makers[name])
        return [node for node in self.nodes if node in needed], list(reads)

    def run(self, nodes: Sequence[ir.Node], feed: Mapping[str, np.ndarray], results: Sequence[str]) -> list[np.ndarray]:
        """Run these nodes alone.

        Args:
            feed: what they read, by name; cast to the graph's dtypes. Other names may be there too.

        Returns:
            the outputs, in the graph's dtypes.

        Raises:
            InputError: if ONNX Runtime does not run them on arrays of these shapes.
        """
        onnx, ir = require("onnx", "onnx"), require("onnx_ir", "onnx")
        outputs = {name_of(value): value for node in nodes for value in node.outputs}
        values: dict[str, Any] = {name_of(v): v for node in nodes for v in node.inputs if v is not None}
        weights = {name: value.const_value for name, value in values.items() if value.is_initializer()}
        fed = {name: f"{name}:fed" for name in values if name in feed and name not in weights}
        if missing := sorted(set(values) - set(weights) - set(fed) - set(outputs)):
            raise InputError(
                f"a part of {self.file.name} needs {', '.join(missing)}, which is not among what it is fed"
            )
        copies = [ir.to_proto(node) for node in nodes]
        for copy in copies:
            copy.input[:] = [fed.get(name, name) for name in copy.input]
        graph = onnx.GraphProto(
            name="fragment",
            node=copies,
            input=[ir.to_proto(ir.Value(name=new, type=values[name].type)) for name, new in fed.items()],
            output=[ir.to_proto(ir.Value(name=name, type=outputs[name].type)) for name in results],
            initializer=[ir.to_proto(ir.Tensor(w.numpy(), dtype=w.dtype, name=n)) for n, w in sorted(weights.items())],
        )
        opsets = [onnx.helper.make_opsetid(*opset) for opset in self.model.opset_imports.items()]
        model = onnx.ModelProto(ir_version=self.model.ir_version, graph=graph, opset_import=opsets)
        arrays = {new: np.asarray(feed[name], values[name].dtype.numpy()) for name, new in fed.items()}
        for name, new in fed.items():
            if arrays[new].dtype.kind == "i" and (arrays[new] != feed[name]).any():
                raise InputError(f"{self.file.name} takes whole numbers for {name}, given was {feed[name]}")
        session = inference_session(model.SerializeToString())
        try:
            return session.run(list(results), arrays)
        except Exception as error:  # ONNX Runtime has a dozen exception classes and no common base
            raise InputError(f"ONNX Runtime does not run {nodes[-1].name}: {str(error).splitlines()[0]}") from error

    def module_outputs(self, paths: Iterable[str]) -> dict[str, str]:
        """Module path -> the tensor that the module gives, for those of `paths` that the graph has nodes of.

        That is the last output of a node in the module that a node outside it reads.
        """
        found = {}
        for path, members in self._members(paths).items():
            inside = set(members)
            for value in (value for node in members for value in node.outputs):
                if value.is_graph_output() or not inside.issuperset(value.consumers()):
                    found[path] = name_of(value)
        return found

    def module_inputs(self, paths: Iterable[str]) -> dict[str, str]:
        """Module path -> the tensor that the module takes, for those of `paths` that take exactly one."""
        found = {}
        for path, members in self._members(paths).items():
            inside = {name_of(value) for node in members for value in node.outputs}
            names = {name for node in members for name in self.reads(node)} - inside
            if len(names) == 1:
                found[path] = names.pop()
        return found

    def _members(self, paths: Iterable[str]) -> dict[str, list[ir.Node]]:
        """Module path -> the nodes in the module or anywhere below it."""
        modules = {path for path in paths if path}
        found: dict[str, list[ir.Node]] = defaultdict(list)
        for node in self.nodes:
            path = module_of(node)
            while path:
                if path in modules:
                    found[path].append(node)
                path = path.rpartition(".")[0]
        return found
