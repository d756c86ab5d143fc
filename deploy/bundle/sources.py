"""What can be bundled: the denoisers of a model, an ONNX folder, an engine or a build, and the rest of its pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from deploy.artifacts import build_folder
from deploy.artifacts.kinds import engine_of, graph_of, kind_of
from deploy.artifacts.schedules import find_schedule
from deploy.bundle.description import Model
from deploy.bundle.rest import ExportedRest, Latents, TorchRest
from exporters.dtypes import PRECISIONS
from exporters.engine.check import ENGINE, REPORT, capabilities, read_engine, runs_on
from exporters.graphs.inputs import SAMPLES
from exporters.graphs.int8_layers import is_int8
from exporters.graphs.reading import inputs_of, read_graph
from exporters.layout import (
    CONFIG,
    ENGINE_PIPELINE,
    EXPORTED_FOR,
    GRAPH,
    INDEX,
    denoiser_folder,
    engine_folders,
    parts_of,
    read_config,
)
from exporters.settings import of_vae
from slimdiff.errors import InputError
from slimdiff.loading.naming import find_component, places_of
from slimdiff.progress import working
from slimdiff.schedule import FILE, Schedule
from slimdiff.settings import Sampling, SteeringSettings
from slimdiff.storage import manifest as manifests


@dataclass(frozen=True)
class Selection:
    """Which denoisers a machine gets, and how; what is empty leaves the choice open."""

    target: Literal["edge", "server"]
    shapes: Sequence[tuple[int, int, int]] = ()
    """Samples in one call, height and width in pixels. A model is exported for each, else in its own size."""
    precisions: Sequence[str] = ()
    """A model is exported in each, else as its plan says, in int8 or fp32."""
    capabilities: Sequence[str] = ()
    """Compute capabilities of engines; graphs go along on a server, and an edge gets none."""
    runtime: str | None = None
    safety_checker: bool = True
    """Whether the pipeline's safety checker goes along, where it has one."""
    guidance: float = Sampling().guidance
    """That the pipeline is used with: how many samples a model is exported for, where `shapes` do not say."""
    variants: Mapping[str | None, str | None] = field(default_factory=dict)
    """Which weights are read of a model in torch, by its name."""
    keep_fp32: Sequence[str] = ()
    """What of a model in torch stays in fp32; see `ExportSettings.keep_fp32`."""

    steering: SteeringSettings = field(default_factory=SteeringSettings)
    """What is added to a model in torch."""
    split: bool = False
    """Whether the UNet of a model in torch is exported in parts; see `ExportSettings.split`."""

    def rest(self, model: str, pipeline: str | None = None) -> TorchRest:
        """The other components of a model in torch; of a denoiser alone, those of `pipeline`."""
        whole = pipeline if find_component(model) else None
        return TorchRest(model, self.safety_checker, self.variants.get(model), whole, self.keep_fp32, self.steering)


class Candidate(Model):
    """A denoiser that can go into a bundle."""

    write: Callable[[Path], None]
    """Copies or exports it into a folder."""
    latents: Latents
    backend: str | None = None
    """What an engine was built with; None for a graph."""
    place: Path | None = None
    """Where it lies; None of one that is exported for the bundle, by the model's schedule."""

    def __str__(self) -> str:
        where = f", an engine of {self.backend} for {' '.join(self.capabilities)}" if self.is_engine else ""
        return f"{self.name}, {self.precision}, {self.shape}{where}"


@dataclass(frozen=True)
class Source:
    """Something that bundles are made of."""

    kind: str
    folders: list[Path]
    """In which licences may lie; none for the embedded model."""
    candidates: list[Candidate]
    rest: ExportedRest | TorchRest
    made_from: dict[str, Any]
    schedule: Schedule | None = None
    """That its images are made by."""


def open_source(name: str, pipeline: str | None, selection: Selection) -> Source:
    """Find what there is to bundle.

    Args:
        name: a model, an ONNX folder, an engine or several, or a finished build.
        pipeline: a model or the folder of a whole pipeline in ONNX, whose other components go with a denoiser alone.

    Raises:
        InputError: if it is nothing of these, or a denoiser alone and no pipeline is named.
    """
    kind, path = kind_of(name), Path(name)
    if selection.steering and kind != "model":
        raise InputError(f"{name} takes no ControlNet or adapter any more ({kind}): add it at the export")
    if kind == "model":
        return _model(name, pipeline, selection)
    if kind not in ("onnx", "engine", ENGINE_PIPELINE, "engines", "build"):
        raise InputError(f"{name} is of the kind {kind}: bundled are models, ONNX folders, engines and builds")
    if kind == "build":
        export = build_folder.read_verdict(path)["recipe"]["export"]
        checked = selection.safety_checker and export.get("safety_checker", True)
        rest: TorchRest | ExportedRest = TorchRest(str(path / "slim"), checked, keep_fp32=export.get("keep_fp32", ()))
    else:
        rest = _rest(name, pipeline, selection)
    # Of a denoiser alone, the VAE may still be a model in torch.
    late = [
        path for path in selection.keep_fp32 if kind == "build" or isinstance(rest, ExportedRest) or not of_vae(path)
    ]
    if late:
        raise InputError(
            f"--keep-fp32 {late[0]}: {name} is exported already, and takes that then (a build, in its recipe)"
        )
    if selection.split:
        raise InputError(f"--split: {name} is exported already, and takes that then (a build, in its recipe)")
    owners = [path]
    if kind == "onnx":
        candidates = [_graph("onnx", graph_of(name), rest.scale)]
    elif kind == "engines":
        manifests.verify_manifest(path)
        owners = sorted(file.parent for file in path.glob(f"*/{REPORT}"))
        candidates = [_engine(folder.name, folder, rest.scale) for folder in owners]
    elif kind == "build":
        owners = [path / "slim"]
        candidates = _build(path, rest)
    else:  # of a pipeline of engines, the UNet alone: a bundle has all else in ONNX
        candidates = [_engine("engine", engine_of(name, kind), rest.scale)]
    schedule = _common([find_schedule(str(owner), None) for owner in owners], name)
    folders = [path, path / "slim", *([Path(pipeline)] if pipeline else [])]  # a build has its model in a folder
    return Source(kind, folders, candidates, rest, _made_from(path), schedule)


def _common(schedules: Sequence[Schedule | None], name: str) -> Schedule | None:
    """The schedule of engines for several shapes, which is one."""
    if any(schedule != schedules[0] for schedule in schedules):
        raise InputError(f"{name} has engines of different schedules, and a bundle has one: name one of them")
    return schedules[0]


def _graph(name: str, graph: Path, scale: int) -> Candidate:
    """A graph of a denoiser, or the folder with its parts, as it is."""
    inputs = inputs_of(content := read_graph(graph))
    name_of_sample = next((key for key in SAMPLES if key in inputs), None)
    if name_of_sample is None or len(inputs[name_of_sample].shape) not in (3, 4):
        raise InputError(f"{graph} is no UNet and no transformer: its inputs are {', '.join(inputs)}")
    sample = inputs[name_of_sample]
    precision = "int8" if is_int8(content) else PRECISIONS.get(sample.dtype, "other")
    endings = (".onnx", ".onnx.data", ".onnx_data")
    folder = graph if graph.is_dir() else graph.parent
    places = [folder, *parts_of(folder).values()]
    there = [p for place in places for p in place.iterdir() if p.is_file()]
    kept = [p.relative_to(folder).as_posix() for p in there if p.name == CONFIG or p.name.endswith(endings)]
    copy, latents = partial(_copy, folder, kept), _with_latents(sample.shape, folder)
    return _candidate(name, copy, precision, latents, scale, place=graph)


def _engine(name: str, folder: Path, scale: int) -> Candidate:
    """An engine of a denoiser, as it is; an InputError if it was changed, or is of something else."""
    report = read_engine(folder)
    read_config(folder)
    shape = next((i["shape"] for i in report["inputs"] if i["name"] in SAMPLES), None)
    if shape is None or len(shape) not in (3, 4):
        raise InputError(f"{folder} is no engine of a denoiser: its inputs are {[i['name'] for i in report['inputs']]}")
    places = ["", *(f"{place.relative_to(folder).as_posix()}/" for place in engine_folders(folder))]
    kept = [f"{place}{name}" for place in places for name in (ENGINE, REPORT, CONFIG, FILE, manifests.MANIFEST)]
    copy = partial(_copy_engine, folder, [name for name in kept if (folder / name).is_file()])
    about = {"backend": report["backend"], "capabilities": capabilities(report), "version": runs_on(report)["version"]}
    about["place"] = folder
    return _candidate(name, copy, report["parts"]["precision"], _with_latents(shape, folder), scale, **about)


def _with_latents(sample: Sequence[int | str], folder: Path) -> Sequence[Any]:
    """The shape of what is denoised as batch, channels and latents, of a transformer whose tokens do not say them."""
    said = (read_config(folder).get(EXPORTED_FOR) or {"latents": sample[-2:]}).get("latents")
    return (sample[0], None, *(said or (None, None)))


def _candidate(name: str, write: Callable[[Path], None], precision: str, sample: Any, scale: int, **more: Any) -> Any:
    """A candidate whose input `sample` has that shape; `scale` is pixels per latent, along a side."""
    batch, _, *latents = (n if isinstance(n, int) and n >= 0 else None for n in sample)
    pixels = {k: n and n * scale for k, n in zip(("height", "width"), latents, strict=True)}
    values = {"capabilities": [], "version": None, "latents": tuple(latents), **pixels, **more}
    return Candidate(name=name, write=write, precision=precision, batch=batch, **values)


def _model(name: str, pipeline_name: str | None, selection: Selection) -> Source:
    from deploy.artifacts.hashes import model_hash, steering_hashes
    from deploy.artifacts.usage import usage_of, use
    from deploy.recipe.rounding import prompts_for_int8, record_for_int8
    from exporters.graphs.inputs import latent_size
    from exporters.graphs.pipeline import example_call
    from exporters.graphs.scheduled import export_scheduled
    from exporters.graphs.vae import settings_for_unet
    from exporters.settings import ExportSettings
    from slimdiff.denoising.sizes import autoencoder_of
    from slimdiff.denoising.trajectory import denoiser_name
    from slimdiff.models import plan_of
    from slimdiff.planning.costs import batch_of
    from slimdiff.settings import Sampling

    rest = selection.rest(name, pipeline_name)
    pipeline, scale = rest.pipeline, rest.scale
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    settings = ExportSettings(keep_fp32=list(selection.keep_fp32), split=selection.split)
    settings = settings_for_unet(denoiser, autoencoder_of(pipeline), settings)
    plan = plan_of(denoiser)
    planned = "int8" if plan is not None and plan.int8() else "fp32"
    if "int8" in selection.precisions and planned != "int8":
        raise InputError(
            f"{name} has no plan for int8: put it into int8 first (slimdiff export --precision int8), and bundle that"
        )
    usage = use(Sampling(guidance=selection.guidance), usage_of(name))

    def write(batch: int, height: int, width: int, precision: Any, folder: Path) -> None:
        call = example_call(pipeline, height=height, width=width, batch=batch)
        how: Any = {"settings": settings.model_copy(update={"precision": precision}), "scheduler": pipeline.scheduler}
        if precision == "int8":
            sampling = usage.model_copy(update={"height": height, "width": width})
            prompts = prompts_for_int8(rest.rest or name, None, sampling, settings)
            how["calibration"] = record_for_int8(pipeline, prompts, sampling, settings)
        export_scheduled(denoiser, folder, call, schedule, **how)

    schedule = find_schedule(name, None)
    shapes, candidates = selection.shapes, []
    if not shapes:
        call = example_call(pipeline, guidance=selection.guidance)
        high, wide = latent_size(call.arguments)
        shapes = [(batch_of(call), high * scale, wide * scale)]
    for batch, high, wide in shapes:
        for precision in selection.precisions or [planned]:
            taken = batch if schedule is None or schedule.guides_always() else None  # see export_scheduled
            label, sample = f"{precision}-{batch}x{high}x{wide}", (taken, None, high // scale, wide // scale)
            export = partial(write, batch, high, wide, precision)
            candidates.append(_candidate(label, export, precision, sample, scale))
    folders = [] if name == "demo" else [*places_of(name), *([Path(rest.rest)] if rest.rest else [])]
    made_from = {"model": model_hash(name, rest.rest), **steering_hashes(selection.steering)}
    return Source("model", folders, candidates, rest, made_from, schedule)


def _rest(name: str, pipeline: str | None, selection: Selection) -> ExportedRest | TorchRest:
    whole = Path(pipeline or name)
    if kind_of(str(whole)) == ENGINE_PIPELINE:
        raise InputError(
            f"{whole} has text encoders and VAE as engines, and a bundle has them in ONNX: say with --pipeline which "
            "exported folder they were built from"
        )
    own = denoiser_folder(whole)
    if (whole / INDEX).is_file() and ((own / GRAPH).is_file() or parts_of(own)):
        return ExportedRest(whole, selection.safety_checker)
    if pipeline is None:
        raise InputError(
            f"{name} is a denoiser alone: say with --pipeline which model, or which exported folder, has the other "
            "components that go with it"
        )
    return selection.rest(pipeline)


def _build(folder: Path, rest: TorchRest | ExportedRest) -> list[Candidate]:
    """The slim graphs of a build and its cells, and its engines with the graphs that they were built from."""
    cells = [cell["name"] for cell in build_folder.read_verdict(folder).get("cells", [])]
    manifests.verify_manifest(folder / "slim")
    candidates, scale = [], rest.scale
    for place, prefix in ((folder, ""), *((folder / build_folder.CELLS / cell, f"{cell}-") for cell in cells)):
        for stage in ("export", "engine"):
            if (place / stage).is_dir():
                manifests.verify_manifest(place / stage)
        candidates.append(_graph(f"{prefix}onnx", graph_of(str(place / "export" / "slim"), verified=False), scale))
        if (place / "engine" / ENGINE).is_file() or parts_of(place / "engine"):
            candidates.append(_engine(f"{prefix}engine", place / "engine", scale))
        if (half := place / "engine" / "onnx-fp16").is_dir():
            candidates.append(_graph(f"{prefix}onnx-fp16", graph_of(str(half), verified=False), scale))
    # Cells for several GPUs have the same graph.
    first = {(c.name if c.is_engine else (c.precision, c.batch, c.latents)): c for c in reversed(candidates)}
    return [candidate for candidate in candidates if candidate in first.values()]


def _made_from(folder: Path) -> dict[str, Any]:
    """The source's own provenance, and its manifest's hash: what ties a bundle to what it was made from."""
    file = folder / manifests.MANIFEST
    if folder.is_dir() and file.is_file():
        manifest = manifests.read_manifest(folder)
        return {"manifest": manifests.sha256_of(file), **{k: manifest[k] for k in ("made_from", "versions")}}
    if (folder / build_folder.BUILD).is_file():
        whole = build_folder.read(folder, "build")
        kept = ("name", "model", "verdict", "made_from", "versions")
        return {"build": manifests.sha256_of(folder / build_folder.BUILD), **{k: whole.get(k) for k in kept}}
    return {}


@working("copy files")
def _copy(source: Path, names: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _copy_engine(source: Path, names: Sequence[str], folder: Path) -> None:
    """Copy an engine, whose manifests then list what is there: that of a build also has the graph it was built from."""
    _copy(source, names, folder)
    for place in (*engine_folders(folder), folder):  # the manifest around others lists theirs
        if (place / manifests.MANIFEST).is_file():
            about = manifests.read_manifest(place)
            manifests.write_manifest(place, about["kind"], about["made_from"], about["runs_on"])
