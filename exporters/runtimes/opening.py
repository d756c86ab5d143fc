"""One way to open a graph or an engine in a runtime, by the runtime's name."""

from __future__ import annotations

from pathlib import Path

from exporters.graphs.int8 import check_int8
from exporters.graphs.int8_layers import is_int8
from exporters.graphs.reading import graph_files, read_graph, weight_files
from exporters.layout import GRAPH, parts_of
from exporters.registry import Runtime, runtime_of
from exporters.runtimes.session import Session
from exporters.runtimes.split import open_parts


def open_session(path: Path | str, runtime: str | Runtime = "onnxruntime", threads: int | None = None) -> Session:
    """Open a graph or an engine.

    Args:
        path: a folder with `model.onnx`, or the file itself; for TensorRT, a folder with `model.engine`; a denoiser's
            folder, if its graph or engine is in parts.
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
        return open_parts(row, path, threads)
    path = path / GRAPH if path.is_dir() and not parts_of(path) else path
    row.require()
    int8 = False
    for file in graph_files(path):
        weight_files(file, graph := read_graph(file))
        check_int8(file, row, graph)
        int8 = int8 or is_int8(graph)
    session = open_parts(row, path, threads)
    if int8:
        session.precision = "int8"
    return session


def version_of(runtime: str) -> str:
    """The version of what runs graphs under this name.

    Raises:
        MissingPackageError: if it is not here.
    """
    return str(runtime_of(runtime).require().__version__).partition("-")[0]
