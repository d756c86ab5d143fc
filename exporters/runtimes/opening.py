"""One way to open a graph or an engine in a runtime, by the runtime's name."""

from __future__ import annotations

from pathlib import Path

from exporters.graphs.int8 import check_int8
from exporters.graphs.int8_layers import is_int8
from exporters.graphs.reading import read_graph, weight_files
from exporters.layout import GRAPH
from exporters.registry import Runtime, runtime_of
from exporters.runtimes.session import Session


def open_session(path: Path | str, runtime: str | Runtime = "onnxruntime", threads: int | None = None) -> Session:
    """Open a graph or an engine.

    Args:
        path: a folder with `model.onnx`, or the file itself; for TensorRT, a folder with `model.engine`.
        threads: of a runtime on the CPU; its own choice if not given.

    Raises:
        InputError: for an unknown runtime, a graph that is not there, is no graph or lacks its weights, or an engine
            for something else than is here.
        MissingPackageError: if the runtime, its provider, its GPU or a processor that the graph comes out right on is
            not here; it never takes another instead.
    """
    path = Path(path)
    row = runtime if isinstance(runtime, Runtime) else runtime_of(runtime, "graph", "engine")
    if row.takes != "graph":
        return row.load()(path, threads, **row.options)
    path = path / GRAPH if path.is_dir() else path
    row.require()
    weight_files(path, graph := read_graph(path))
    check_int8(path, row, graph)
    session = row.load()(path, threads, **row.options)
    if is_int8(graph):
        session.precision = "int8"
    return session


def version_of(runtime: str) -> str:
    """The version of what runs graphs under this name.

    Raises:
        MissingPackageError: if it is not here.
    """
    return str(runtime_of(runtime).require().__version__).partition("-")[0]
