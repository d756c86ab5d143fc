"""One way to open a graph or an engine in a runtime, by the runtime's name."""

from __future__ import annotations

from pathlib import Path

from exporters.graphs.reading import external_tensors, read_graph, refuse_outside
from exporters.layout import GRAPH
from exporters.registry import Runtime, runtime_of
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


def open_session(path: Path | str, runtime: str | Runtime = "onnxruntime", threads: int | None = None) -> Session:
    """Open a graph or an engine.

    Args:
        path: a folder with `model.onnx`, or the file itself; for TensorRT, a folder with `model.engine`.
        runtime: one of `exporters.registry`, or its name.
        threads: of a runtime on the CPU; its own choice if not given.

    Raises:
        InputError: for an unknown runtime, a graph that is not there, is no graph or lacks its weights, or an engine
            for something else than is here.
        MissingPackageError: if the runtime, its provider or its GPU is not here; it never takes another instead.
    """
    path = Path(path)
    row = runtime if isinstance(runtime, Runtime) else runtime_of(runtime, "graph", "engine")
    if row.takes == "graph":
        path = path / GRAPH if path.is_dir() else path
        row.require()
        check_weights(path)
    return row.load(row.opens)(path, threads, **row.options)


def version_of(runtime: str) -> str:
    """The version of what runs graphs under this name.

    Raises:
        MissingPackageError: if it is not here.
    """
    return str(runtime_of(runtime).require().__version__).partition("-")[0]


def check_weights(file: Path) -> None:
    """See that the weights which a graph keeps beside it, as every graph over 2 GB does, are there, whole and its own.

    Raises:
        InputError: naming what is missing, too short, or not below the graph's folder.
    """
    needed: dict[str, int] = {}
    for tensor in external_tensors(read_graph(file)):
        name, end = str(tensor.location), (tensor.offset or 0) + (tensor.length or 0)
        needed[name] = max(end, needed.get(name, 0))
    refuse_outside(file, needed)
    for name, size in needed.items():
        data = file.parent / name
        if not data.is_file():
            raise InputError(f"{file} keeps its weights in {name}, which is not beside it: copy the folder whole")
        if data.stat().st_size < size:
            raise InputError(
                f"{data} has {data.stat().st_size} bytes, and {file.name} takes {size} from it: copy the folder again"
            )
