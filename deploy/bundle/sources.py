"""What can be bundled: the denoisers of a model, an ONNX folder, an engine or a build, and the rest of its pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from deploy.artifacts.kinds import engine_of, graph_of, kind_of
from deploy.bundle.rest import ExportedRest, Rest, TorchRest
from exporters.dtypes import PRECISIONS
from exporters.engine.check import ENGINE, REPORT, read_engine
from exporters.graphs.reading import inputs_of, read_graph
from exporters.layout import ENGINE_PIPELINE, read_config
from slimdiff.errors import InputError
from slimdiff.storage import manifest as manifests


@dataclass(frozen=True)
class Candidate:
    """A denoiser that can go into a bundle."""

    name: str
    write: Callable[[Path], None]
    """Copies or exports it into a folder."""
    precision: str
    batch: int | None
    """Samples in one call; None: any."""
    latents: tuple[int | None, int | None]
    """Height and width of what it denoises; None: any."""
    backend: str | None = None
    """What an engine was built with; None for a graph."""
    capabilities: tuple[str, ...] = ()
    version: str | None = None

    @property
    def is_engine(self) -> bool:
        return self.backend is not None


@dataclass(frozen=True)
class Source:
    """Something that bundles are made of."""

    kind: str
    folders: list[Path]
    """In which licences may lie; none for the embedded model."""
    candidates: list[Candidate]
    rest: Rest
    scale: int
    """Pixels per latent, along a side."""
    made_from: dict[str, Any]


def open_source(
    name: str, pipeline: str | None, shapes: Sequence[tuple[int, int, int]], precisions: Sequence[str]
) -> Source:
    """Find what there is to bundle.

    Args:
        name: a model, an ONNX folder, an engine or several, or a finished build.
        pipeline: a model or the folder of a whole pipeline in ONNX, whose other components go with a denoiser alone.
        shapes: samples, height and width in pixels that a model is exported for; its own size if empty.
        precisions: that a model is exported in; fp32 if empty.

    Raises:
        InputError: if it is nothing of these, or a denoiser alone and no pipeline is named.
    """
    kind, path = kind_of(name), Path(name)
    if kind == "model":
        return _model(name, shapes, precisions)
    if kind == "onnx":
        graph = graph_of(name)
        found = [graph_candidate("onnx", graph)]
        whole = graph.parent == path / "unet" and (path / "model_index.json").is_file()
        rest = ExportedRest(path) if whole and pipeline is None else _rest(name, pipeline)
    elif kind in ("engine", ENGINE_PIPELINE):  # of a pipeline, the UNet alone: a bundle has all else in ONNX
        found, rest = [engine_candidate("engine", engine_of(name, kind))], _rest(name, pipeline)
    elif kind == "engines":
        manifests.verify_manifest(path)
        folders = sorted(file.parent for file in path.glob(f"*/{ENGINE}"))
        found, rest = [engine_candidate(folder.name, folder) for folder in folders], _rest(name, pipeline)
    elif kind == "build":
        found, rest = _build(path), TorchRest(str(path / "slim"))
    else:
        raise InputError(f"{name} is of the kind {kind}: bundled are models, ONNX folders, engines and builds")
    folders = [path, path / "slim", *([Path(pipeline)] if pipeline else [])]  # a build has its model in a folder
    return Source(kind, folders, found, rest, rest.scale, _made_from(path))


def graph_candidate(name: str, graph: Path) -> Candidate:
    """A graph of a UNet, as it is."""
    inputs = inputs_of(read_graph(graph))
    if "sample" not in inputs or len(inputs["sample"].shape) != 4:
        raise InputError(f"{graph} is no UNet: its inputs are {', '.join(inputs)}")
    sizes = [dim if isinstance(dim, int) else None for dim in inputs["sample"].shape]
    precision = PRECISIONS.get(inputs["sample"].dtype, "other")
    return Candidate(name, lambda folder: _copy(graph.parent, folder), precision, sizes[0], (sizes[2], sizes[3]))


def engine_candidate(name: str, folder: Path) -> Candidate:
    """An engine of a UNet, as it is.

    Raises:
        InputError: if it was changed, or is no engine of a UNet.
    """
    report = read_engine(folder)
    read_config(folder)
    shape = next((i["shape"] for i in report["inputs"] if i["name"] == "sample"), None)
    if shape is None or len(shape) != 4:
        raise InputError(f"{folder} is no engine of a UNet: its inputs are {[i['name'] for i in report['inputs']]}")
    sizes = [None if n < 0 else n for n in shape]
    parts = report["parts"]
    place = parts["runs_on"]
    capabilities = (place["gpu"]["capability"],) if "gpu" in place else tuple(place["targets"])
    return Candidate(
        name,
        lambda into: _copy(folder, into, ENGINE, REPORT, "config.json", manifests.MANIFEST),
        parts["precision"],
        sizes[0],
        (sizes[2], sizes[3]),
        report["backend"],
        capabilities,
        parts["versions"][report["backend"]],
    )


def _model(name: str, shapes: Sequence[tuple[int, int, int]], precisions: Sequence[str]) -> Source:
    from deploy.artifacts.hashes import model_hash
    from exporters.graphs.export import export_unet
    from exporters.graphs.pipeline import example_call
    from exporters.settings import ExportSettings

    rest = TorchRest(name)
    pipeline = rest.pipeline
    scale = rest.scale
    if getattr(pipeline, "unet", None) is None:
        raise InputError(f"{name} is a {type(pipeline).__name__}, without a unet: it is not exported, so not bundled")
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    found = []
    for batch, high, wide in shapes or [(2, height * scale, width * scale)]:
        for precision in precisions or ["fp32"]:

            def write(folder: Path, b: int = batch, h: int = high, w: int = wide, p: Any = precision) -> None:
                call = example_call(pipeline, height=h, width=w, batch=b)
                export_unet(pipeline.unet, folder, call, ExportSettings(precision=p))

            label = f"{precision}-{batch}x{high}x{wide}"
            found.append(Candidate(label, write, precision, batch, (high // scale, wide // scale)))
    folders = [] if name == "demo" else [Path(name)]
    return Source("model", folders, found, rest, scale, {"model": model_hash(name)})


def _rest(name: str, pipeline: str | None) -> Rest:
    if kind_of(whole := pipeline or name) == ENGINE_PIPELINE:
        raise InputError(
            f"{whole} has text encoders and VAE as engines, and a bundle has them in ONNX: say with --pipeline which "
            "exported folder they were built from"
        )
    if pipeline is None:
        raise InputError(
            f"{name} is a denoiser alone: say with --pipeline which model, or which exported folder, has the other "
            "components that go with it"
        )
    if (Path(pipeline) / "model_index.json").is_file() and (Path(pipeline) / "vae_decoder").is_dir():
        return ExportedRest(Path(pipeline))
    return TorchRest(pipeline)


def _build(folder: Path) -> list[Candidate]:
    cells = build_folder.read_verdict(folder).get("cells", [])
    manifests.verify_manifest(folder / "slim")
    found = parts_of_build(folder, "")
    for cell in cells:
        found += parts_of_build(folder / build_folder.CELLS / cell["name"], f"{cell['name']}-")
    # Cells for several GPUs have the same graph.
    alike = {(c.name if c.is_engine else (c.precision, c.batch, c.latents)): c for c in reversed(found)}
    return [candidate for candidate in found if candidate in alike.values()]


def parts_of_build(folder: Path, prefix: str) -> list[Candidate]:
    """The slim graph of a build, and its engine with the graph that it was built from, where there is one."""
    for stage in ("export", "engine"):
        if (folder / stage).is_dir():
            manifests.verify_manifest(folder / stage)
    found = [graph_candidate(f"{prefix}onnx", folder / "export" / "slim" / "model.onnx")]
    if (folder / "engine" / ENGINE).is_file():
        found.append(engine_candidate(f"{prefix}engine", folder / "engine"))
    half = folder / "engine" / "onnx-fp16" / "model.onnx"
    if half.is_file():
        found.append(graph_candidate(f"{prefix}onnx-fp16", half))
    return found


def _made_from(folder: Path) -> dict[str, Any]:
    """The source's own provenance, and its manifest's hash: what ties a bundle to what it was made from."""
    file = folder / manifests.MANIFEST
    if folder.is_dir() and file.is_file():
        manifest = manifests.read_manifest(folder)
        return {
            "manifest": manifests.sha256_of(file),
            "made_from": manifest["made_from"],
            "versions": manifest["versions"],
        }
    if (folder / build_folder.BUILD).is_file():
        whole = build_folder.read(folder, "build")
        kept = ("name", "model", "verdict", "made_from", "versions")
        return {"build": manifests.sha256_of(folder / build_folder.BUILD), **{k: whole.get(k) for k in kept}}
    return {}


def _copy(source: Path, folder: Path, *names: str) -> None:
    """The named files, or all that a graph is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = names or [p.name for p in source.iterdir() if p.is_file() and _belongs_to_graph(p.name)]
    for name in wanted:
        shutil.copyfile(source / name, folder / name)


def _belongs_to_graph(name: str) -> bool:
    return name == "config.json" or name.endswith((".onnx", ".onnx.data", ".onnx_data"))
