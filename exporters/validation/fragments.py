"""Running parts of a graph: any tensors in, any tensors out, with the weights of those nodes alone in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.graphs.naming import module_of, read_graph, tensor_types
from exporters.runtimes.ort import inference_session
from slimdiff.errors import InputError, require

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_DTYPES = {1: np.float32, 7: np.int64, 10: np.float16, 11: np.float64}


class OnnxFragments:
    """A graph that `export_unet` wrote, to be run piece by piece on the CPU.

    Polygraphy's `extract_subgraph` takes a part out of a graph too, but not one whose outputs are also given (a tensor
    computed from a reference's values, to be held against the reference's own), and it needs onnx-graphsurgeon.

    Args:
        onnx_file: the graph; its external data lie beside it.

    Attributes:
        nodes: in execution order.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        weights: names of the initializers.

    Raises:
        InputError: if there is no such file, or it is no ONNX model.
    """

    def __init__(self, onnx_file: Path | str):
        self.file = Path(onnx_file)
        self.model: ModelProto = read_graph(onnx_file)
        graph = self.model.graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.weights = {w.name: w for w in graph.initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.weights]
        self.outputs = [o.name for o in graph.output]
        self.types = tensor_types(self.model)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}

    def needs(self, node: NodeProto) -> list[str]:
        """Names of the node's inputs that are not weights."""
        return list(dict.fromkeys(name for name in node.input if name and name not in self.weights))

    def between(self, given: Collection[str], wanted: Iterable[str]) -> tuple[list[int], list[str]]:
        """The nodes that compute `wanted` out of `given` (a tensor that is both is computed), in execution order.

        Returns:
            indices of the nodes, and those of `given` (and of the graph's inputs) that they read.
        """
        found: set[int] = set()
        reads: dict[str, None] = {}
        stack = [self.producer[name] for name in wanted]
        while stack:
            index = stack.pop()
            if index in found:
                continue
            found.add(index)
            for name in self.needs(self.nodes[index]):
                if name in given or name not in self.producer:
                    reads[name] = None
                else:
                    stack.append(self.producer[name])
        return sorted(found), list(reads)

    def run(self, nodes: Sequence[int], feed: Mapping[str, np.ndarray], wanted: Sequence[str]) -> list[np.ndarray]:
        """Run these nodes alone.

        Args:
            nodes: indices, as from `between`.
            feed: what they read, by name; cast to the graph's dtypes. Other names may be there too.
            wanted: names of outputs of these nodes.

        Returns:
            the outputs, in the graph's dtypes.

        Raises:
            InputError: if ONNX Runtime does not run them on arrays of these shapes.
        """
        onnx = require("onnx", "onnx")
        chosen = [self.nodes[i] for i in nodes]
        made = {name for node in chosen for name in node.output}
        reads = dict.fromkeys(name for node in chosen for name in self.needs(node))
        given = {name: f"{name}:given" for name in reads if name in feed}
        copies = []
        for node in chosen:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [given.get(name, name) for name in node.input]
            copies.append(copy)
        missing = sorted(set(reads) - set(given) - made)
        if missing:
            raise InputError(f"a part of {self.file.name} needs {', '.join(missing)}, which was not given")
        graph = onnx.helper.make_graph(
            copies,
            "fragment",
            [onnx.helper.make_tensor_value_info(new, self.types[old], None) for old, new in given.items()],
            [onnx.helper.make_tensor_value_info(name, self.types[name], None) for name in wanted],
            initializer=self._loaded({name for node in chosen for name in node.input if name in self.weights}),
        )
        model = onnx.helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        arrays = {new: np.asarray(feed[old], _DTYPES[self.types[old]]) for old, new in given.items()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "fragment.onnx"
            file.write_bytes(model.SerializeToString())
            session = inference_session(file)
        try:
            return session.run(list(wanted), arrays)
        except Exception as error:  # ONNX Runtime has a dozen exception classes and no common base
            raise InputError(f"ONNX Runtime does not run {chosen[-1].name}: {str(error).splitlines()[0]}") from error

    def module_outputs(self, paths: Iterable[str]) -> dict[str, str]:
        """Module path -> the tensor that the module gives, for those of `paths` that the graph has nodes of.

        That is the last tensor made by a node within the module that a node outside reads.
        """
        readers = self._readers()
        found = {}
        for path, members in self._members(paths).items():
            inside = set(members)
            for index in reversed(members):
                names = [n for n in self.nodes[index].output if n in self.outputs or readers.get(n, set()) - inside]
                if names:
                    found[path] = names[-1]
                    break
        return found

    def module_inputs(self, paths: Iterable[str]) -> dict[str, str]:
        """Module path -> the tensor that the module takes, for those of `paths` that take exactly one."""
        found = {}
        for path, members in self._members(paths).items():
            inside = {name for i in members for name in self.nodes[i].output}
            names = {name for i in members for name in self.needs(self.nodes[i])} - inside
            if len(names) == 1:
                found[path] = names.pop()
        return found

    def _members(self, paths: Iterable[str]) -> dict[str, list[int]]:
        """Module path -> indices of the nodes in the module or anywhere below it."""
        wanted = {path for path in paths if path}
        found: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            path = module_of(node)
            while path:
                if path in wanted:
                    found.setdefault(path, []).append(index)
                path = path.rpartition(".")[0]
        return found

    def _readers(self) -> dict[str, set[int]]:
        readers: dict[str, set[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.input:
                readers.setdefault(name, set()).add(index)
        return readers

    def _loaded(self, names: Collection[str]) -> list[Any]:
        onnx = require("onnx", "onnx")
        loaded = []
        for name in sorted(names):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(self.weights[name])
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.file.parent))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
            loaded.append(tensor)
        return loaded
