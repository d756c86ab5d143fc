"""One way to open a graph or an engine in a runtime, by the runtime's name."""

from __future__ import annotations

from pathlib import Path

from exporters.graphs.int8 import check_bytes
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
        InputError: for an unknown runtime, a graph that is not there, is no graph, lacks its weights or would overflow
            on this processor, or an engine for something else than is here.
        MissingPackageError: if the runtime, its provider or its GPU is not here; it never takes another instead.
    """
    path = Path(path)
    row = runtime if isinstance(runtime, Runtime) else runtime_of(runtime, "graph", "engine")
    if row.takes == "graph":
        path = path / GRAPH if path.is_dir() else path
        row.require()
        graph = read_graph(path)
        weight_files(path, graph)
        if row.device == "cpu":
            check_bytes(path, graph)
    return row.load()(path, threads, **row.options)


def version_of(runtime: str) -> str:
    """The version of what runs graphs under this name.

    Raises:
        MissingPackageError: if it is not here.
    """
    return str(runtime_of(runtime).require().__version__).partition("-")[0]
