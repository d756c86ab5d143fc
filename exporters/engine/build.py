"""Building an engine, unless the one that is there is that very engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.engine.backends import Backend, choose_backend
from exporters.engine.check import ENGINE, REPORT, read_engine, runs_on
from exporters.engine.errors import explain, stage_of
from exporters.engine.gpu import AskGpu, gpu_here
from exporters.engine.key import differences, engine_parts
from exporters.engine.memory import available_memory, demand_memory
from exporters.engine.scheduled import branches_of, schedule_of
from exporters.engine.shapes import dims_of_inputs, engine_shapes, part_shapes, with_single_branches
from exporters.engine.sites import compare_layers, compare_network, demand_int8, demand_plan
from exporters.graphs.int8_layers import int8_layers, report_of
from exporters.graphs.naming import compare_dims, weight_dims
from exporters.graphs.reading import depth_of, read_graph, weight_files
from exporters.layout import CONFIG, GRAPH, SHALLOW, SHALLOW_ENGINE, STEP, parts_of, shallow_of
from exporters.process import worker_command
from exporters.settings import EngineSettings
from slimdiff.errors import InputError, SlimdiffError
from slimdiff.progress import bar
from slimdiff.schedule import FILE
from slimdiff.storage import manifest

if TYPE_CHECKING:
    import onnx_ir as ir

    from slimdiff import Plan


@dataclass(frozen=True)
class EngineRequest:
    """An engine that can be built: what it is made from is here, fits together, and is hashed."""

    onnx_file: Path
    settings: EngineSettings
    backend: Backend
    plan: Plan | None
    parts: dict[str, Any]
    """What decides the engine: `engine_parts`."""
    weights: int
    """Bytes of the graph's weights."""
    int8: list[str]
    """Paths of the layers that the graph says are in int8."""
    on_gpu: bool
    """Whether there is a GPU, on which the finished engine can be opened."""
    only: frozenset[str] | None = None
    """Of a denoiser's part, or a shallow graph, the layers that the plan is looked for in; None: all."""
    shallow: EngineRequest | None = None
    """Of a UNet that a schedule runs in part in some steps: that part, with an engine of its own beside this one."""

    @property
    def key(self) -> str:
        """SHA-256 of the parts."""
        return manifest.fingerprint(self.parts)

    def why_build(self, folder: Path | str) -> str | None:
        """Why what is in a folder will not do: `weights changed`, say; None if it is this engine, whole."""
        folder = Path(folder)
        if not any((folder / name).exists() for name in (ENGINE, REPORT)):
            return "there is none yet"
        try:
            found = read_engine(folder)
        except InputError as error:
            return str(error)
        if found["key"] == self.key:
            return None
        return ", ".join(differences(found["parts"], self.parts)) or "its key has other parts"

    def reuse(self, source: Path | str, folder: Path | str) -> dict[str, Any]:
        """Take over an engine for which `why_build` has nothing to say: its files appear in `folder` too."""
        source, folder = Path(source), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.shallow is not None:
            self.shallow.reuse(source / SHALLOW_ENGINE, folder / SHALLOW_ENGINE)
        for name in (ENGINE, REPORT):
            with manifest.replacing(folder / name, is_file=True) as temporary:
                shutil.copyfile(source / name, temporary)
        return self._describe(json.loads((folder / REPORT).read_text(encoding="utf-8")), folder)

    def build(self, folder: Path | str) -> dict[str, Any]:
        """Build it; see `build_engine`."""
        folder = Path(folder)
        if self.settings.check_memory:
            demand_memory(self.weights, available_memory())
        folder.mkdir(parents=True, exist_ok=True)
        with manifest.replacing(folder / ENGINE, is_file=True) as temporary:
            found = _in_process(self, temporary)
            dims, layers = found.pop("dims"), found.pop("engine_layers")
            demand_int8(found["int8"], self.int8, "the parsed network", SlimdiffError)
            sites = in_engine = None
            if self.plan is not None:
                sites = compare_network(dims, found["attention"], self.plan, self.only)
                demand_plan(sites, "the parsed network", SlimdiffError)
                in_engine = compare_layers(layers, self.plan) if layers else None
        report = {
            "backend": self.backend,
            "targets": self.settings.targets,
            "precision": self.parts["precision"],
            "weights": self.weights,
            **found,
            "sites": sites,
            "engine_sites": in_engine,
            "key": self.key,
            "parts": self.parts,
        }
        if self.shallow is not None:
            report |= _both(report, self.shallow.build(folder / SHALLOW_ENGINE), folder)
        manifest.write_json(folder / REPORT, report)
        return self._describe(report, folder)

    def _describe(self, report: dict[str, Any], folder: Path) -> dict[str, Any]:
        made_from = {"key": self.key, "parts": self.parts, "settings": self.settings.model_dump()}
        config = (self.onnx_file if self.onnx_file.is_dir() else self.onnx_file.parent) / CONFIG
        if config.is_file() and self.onnx_file.name != SHALLOW:  # what a pipeline reads of its unet
            shutil.copy(config, folder)
        manifest.write_manifest(folder, "engine", made_from, runs_on(report))
        return report


def _both(whole: Mapping[str, Any], shallow: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a report has of a UNet and of its shallow graph together, and `engines`: of each, what was read back."""
    each = {ENGINE: whole, f"{SHALLOW_ENGINE}/{ENGINE}": shallow}
    read = ("key", "bytes", "layers", "sites", "int8")
    engines = [
        {"file": name, "sha256": manifest.sha256_of(folder / name), **{key: report[key] for key in read}}
        for name, report in each.items()
    ]
    return {
        **{name: whole[name] + shallow[name] for name in ("bytes", "seconds", "layers")},
        "seconds": round(whole["seconds"] + shallow["seconds"], 3),
        "peak_memory": max(whole["peak_memory"], shallow["peak_memory"]),
        "engines": engines,
    }


@dataclass(frozen=True)
class PartsRequest(EngineRequest):
    """Engines of a denoiser in parts, in folders as its graphs; beside them one report and one manifest for all."""

    requests: Mapping[str, EngineRequest] = field(default_factory=dict)
    """By part."""

    def reuse(self, source: Path | str, folder: Path | str) -> dict[str, Any]:
        """See `EngineRequest`."""
        for part, request in self.requests.items():
            request.reuse(Path(source) / part, Path(folder) / part)
        shutil.copyfile(Path(source) / REPORT, Path(folder) / REPORT)
        return self._describe(json.loads((Path(folder) / REPORT).read_text(encoding="utf-8")), Path(folder))

    def build(self, folder: Path | str) -> dict[str, Any]:
        """Build all. The report has what `build_engine`'s has: sums and lists over the parts, the step's attention."""
        reports = {part: request.build(Path(folder) / part) for part, request in self.requests.items()}
        inputs = {i["name"]: i for report in reports.values() for i in report["inputs"]}
        crossing = {o["name"] for part, report in reports.items() if part != STEP for o in report["outputs"]}
        every = list(reports.values())
        sums = {name: sum(report[name] for report in every) for name in ("weights", "bytes", "seconds", "layers")}
        sites = {
            name: None if reports[STEP][name] is None else [row for report in every for row in report[name] or []]
            for name in ("sites", "engine_sites")
        }
        report = {
            **reports[STEP],
            **sums,
            "seconds": round(sums["seconds"], 3),
            **sites,
            "precision": self.parts["precision"],
            "inputs": [value for name, value in inputs.items() if name not in crossing],
            "peak_memory": max(report["peak_memory"] for report in every),
            "key": self.key,
            "parts": self.parts,
        }
        if engines := report.get("engines"):
            report["engines"] = [{**row, "file": f"{STEP}/{row['file']}"} for row in engines]
        manifest.write_json(Path(folder) / REPORT, report)
        return self._describe(report, Path(folder))


def request_engine(
    onnx_file: Path | str,
    settings: EngineSettings | None = None,
    *,
    plan: Plan | None = None,
    branches: int = 1,
    gpu: AskGpu = gpu_here,
) -> EngineRequest:
    """Find out whether an engine can be built, and what its key is; builds nothing.

    Args:
        onnx_file: `model.onnx`, its external data beside it; or the folder of a denoiser in parts. A shallow graph that
            lies beside it gets an engine, too.
        plan: what the inner dims are held against.
        branches: of guidance, where a schedule has steps without, which run one of them: the engine then takes that
            batch, too. A batch of one image where none is said.

    Raises:
        InputError: for a graph, shapes or targets that the backend does not take, a plan that the graph does not
            follow, or int8 layers that are not those that the graph names.
        MissingPackageError: if the backend, or the GPU that it builds on, is not here.
    """
    settings, onnx_file = settings or EngineSettings(), Path(onnx_file)
    model = read_graph(onnx_file)
    if plan is not None:
        demand_plan(compare_dims(weight_dims(model), plan, _layers(model)), f"{onnx_file}", InputError)
    dims = dims_of_inputs(model)
    if branches > 1:
        said = settings.batch or settings.shapes or settings.profiles
        settings = settings if said else settings.model_copy(update={"batch": branches})
        shapes = with_single_branches(dims, engine_shapes(dims, settings), branches)
        settings = settings.model_copy(update=shapes)
    if not (parts := parts_of(onnx_file)):
        return _with_shallow(_request(onnx_file, model, settings, plan, gpu), gpu)
    whole = engine_shapes(dims, settings)
    requests = {}
    for part, folder in parts.items():
        own = read_graph(folder / GRAPH)
        fitted = settings.model_copy(update=part_shapes(dims_of_inputs(own), whole))
        request = _request(folder / GRAPH, own, fitted, plan, gpu)
        requests[part] = _with_shallow(replace(request, only=frozenset(weight_dims(own))), gpu)
    step = requests[STEP]
    alike = {name: step.parts[name] for name in ("precision", "options", "versions", "runs_on")}
    decides = {"engines": {part: request.key for part, request in requests.items()}, "shapes": whole, **alike}
    weights = max(request.weights for request in requests.values())
    int8 = [layer for request in requests.values() for layer in request.int8]
    about = (onnx_file, settings, step.backend, plan, decides, weights, int8, step.on_gpu)
    return PartsRequest(*about, requests=requests)


def _request(
    onnx_file: Path, model: ir.Model, settings: EngineSettings, plan: Plan | None, gpu: AskGpu
) -> EngineRequest:
    """Of one graph, as it is."""
    backend, here = choose_backend(settings, gpu), gpu()
    weights = sum((onnx_file.parent / name).stat().st_size for name in weight_files(onnx_file, model))
    shapes = engine_shapes(dims_of_inputs(model), settings)
    layers = int8_layers(model)
    int8 = (report_of(model) or {"layers": list(layers)})["layers"]
    demand_int8(layers, int8, f"{onnx_file}", InputError)
    parts = engine_parts(onnx_file, model, settings, shapes, backend, here, plan)
    if (depth := depth_of(model)) is not None:
        parts["depth"] = depth
    return EngineRequest(onnx_file, settings, backend, plan, parts, weights, int8, here is not None, _layers(model))


def _layers(model: ir.Model) -> frozenset[str] | None:
    """Of a shallow graph, the layers that it has of its model; None of one that has them all."""
    return frozenset(weight_dims(model)) if depth_of(model) is not None else None


def _with_shallow(whole: EngineRequest, gpu: AskGpu) -> EngineRequest:
    """The request, with that of the shallow graph beside its graph, if there is one: for the same shapes and plan."""
    file = shallow_of(whole.onnx_file)
    if file is None:
        return whole
    model, plan = read_graph(file), whole.plan
    if plan is not None:
        demand_plan(compare_dims(weight_dims(model), plan, _layers(model)), f"{file}", InputError)
    shapes = part_shapes(dims_of_inputs(model), whole.parts["shapes"])
    request = _request(file, model, whole.settings.model_copy(update=shapes), plan, gpu)
    return replace(whole, shallow=request, parts={**whole.parts, "shallow": request.key})


def build_engine(
    onnx_file: Path | str,
    folder: Path | str,
    settings: EngineSettings | None = None,
    *,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Build an engine from a graph that `export_unet` wrote, in a process of its own.

    What needs a GPU could not be tried: TensorRT (10 and 11 alike), and reading the finished engine's layers.
    TensorRT-RTX builds are tested for named targets. A schedule that lies beside the graph, or beside the index of its
    pipeline, goes with the engine, which takes the batches that its steps have.

    Args:
        onnx_file: `model.onnx`, its external data beside it.
        folder: gets `model.engine`, `engine.json` and `manifest.json`, or no engine if the build fails.
        plan: what the inner dims are held against: before the build in the graph, after it in the parsed network.

    Returns:
        what `engine.json` has: `backend`, `version`, `targets`, `precision`, `weights` (bytes of the graph's), `bytes`
        (of the engine, which holds kernels and constants as well), `seconds`, `peak_memory` (bytes),
        `inputs` and `outputs` (`name`, `shape`, `dtype`; -1 where profiles leave a dim open), `layers`, `attention`
        (per module: heads, head dims, tokens, product shapes), `int8` (paths of the layers that the parsed network
        quantises), `fused_attention` (`calls`, `kernels`: fp32 never fuses,
        nor do head dims below 16), `sites` (`compare_network`'s rows on the parsed network; None without a plan),
        `engine_sites` (`compare_layers`'s rows on the finished engine; None without a plan or a GPU), and `key` with
        its `parts`. Of a UNet with a shallow graph, bytes, seconds and layers are both's, and `engines` says of each
        its `file`, `sha256`, `key`, `bytes`, `layers`, `sites` and `int8`.

    Raises:
        InputError: see `request_engine` and `branches_of`; also if the build would not fit into memory.
        MissingPackageError: if the backend, or the GPU that it builds on, is not here.
        SlimdiffError: if the build fails, or the network is not the plan's, or not in int8 where the graph
            is.
    """
    onnx_file, folder = Path(onnx_file), Path(folder)
    schedule = schedule_of(onnx_file)
    request = request_engine(onnx_file, settings, plan=plan, branches=branches_of(onnx_file, schedule))
    (folder / FILE).unlink(missing_ok=True)  # of an engine that was there
    report = request.build(folder)
    if schedule is not None:
        manifest.put_file(folder, FILE, schedule.save)
    return report


def _in_process(request: EngineRequest, engine: Path) -> dict[str, Any]:
    settings = request.settings
    with tempfile.TemporaryDirectory(prefix="slimdiff-engine-") as scratch:
        result, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        job = {
            "backend": request.backend,
            "onnx_file": str(request.onnx_file.absolute()),
            "engine_file": str(engine.resolve()),
            "result_file": str(result),
            "targets": [[int(t[2:-1]), int(t[-1])] for t in settings.targets],
            "shapes": request.parts["shapes"],
            "workspace_gib": settings.workspace_gib,
            "tf32": settings.tf32,
            "inspect": request.on_gpu,
        }
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(request.backend == "tensorrt-rtx"))}
        command = worker_command("exporters.engine.worker", str(Path(scratch) / "job.json"))
        with (
            log.open("wb") as out,
            subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as worker,
        ):
            try:
                code = _wait(worker, log)
            finally:
                worker.kill()
        if code == 0:
            return json.loads(result.read_text())
        if result.is_file():
            raise InputError(json.loads(result.read_text())["refused"])
        raise SlimdiffError(explain(code, log.read_text(errors="replace"), request.weights))


def _wait(worker: subprocess.Popen, log: Path) -> int:
    with bar(name="engine", bar_format="{desc} {elapsed}") as shown:
        while True:
            shown.set_description_str(f"engine: {stage_of(log.read_text(errors='replace'))},", refresh=True)
            try:
                return worker.wait(timeout=0.25)
            except subprocess.TimeoutExpired:
                continue
