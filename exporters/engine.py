"""TensorRT and TensorRT-RTX engines with fixed shapes, and what of them can be checked where no GPU is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from tqdm import tqdm

from exporters.onnx_graph import check_reduced_dims, compare_dims, read_graph, site_row
from slimdiff.artifacts import replacing, write_json
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError

if TYPE_CHECKING:
    from slimdiff import Plan

Backend = Literal["tensorrt", "tensorrt-rtx"]
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "tensorrt-rtx"}
ENGINE = "model.engine"
REPORT = "engine.json"


class EngineSettings(BaseModel):
    """What an engine is built with, and for which GPUs."""

    model_config = ConfigDict(extra="forbid")

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """`auto` takes what is installed; TensorRT-RTX where there is no GPU, as TensorRT builds on none but its own."""
    targets: list[str] = []
    """Compute capabilities to build for (`sm89`, `sm120`), TensorRT-RTX only; none: the GPU that is here."""
    batch: int | None = Field(default=None, ge=1)
    """Batch of the engine, for graphs that leave it open; with guidance, twice the images."""
    workspace_gib: float | None = Field(default=None, gt=0)
    """Most memory that a layer may use while it runs, GiB; TensorRT's own default if not given."""

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: list[str]) -> list[str]:
        for target in targets:
            if not re.fullmatch(r"sm\d{2,3}", target):
                raise ValueError(f"a target is named like sm89, not {target!r}")
        return targets


def available_backend() -> Backend | None:
    """The backend that `auto` takes here; None if neither is installed."""
    installed = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    if "tensorrt" in installed and (has_gpu() or len(installed) == 1):
        return "tensorrt"
    return "tensorrt-rtx" if "tensorrt-rtx" in installed else None


def has_gpu() -> bool:
    """Whether an NVIDIA driver runs here; asks the kernel, since torch may be a build for CPUs."""
    return Path("/proc/driver/nvidia/version").exists()


def build_engine(
    onnx_file: Path | str,
    folder: Path | str,
    settings: EngineSettings | None = None,
    *,
    plan: Plan | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Build an engine from a graph that `export_unet` wrote, in a process of its own.

    Args:
        onnx_file: `model.onnx`, its external data beside it.
        folder: gets `model.engine` and `engine.json`, or nothing if the build fails.
        settings: backend, targets, batch, workspace.
        plan: what the inner dims are held against: before the build in the graph, after it in the parsed network.
        progress: what to call the build on stderr, with the stage and the time that it has taken; None: say nothing.

    Returns:
        what `engine.json` has: `backend`, `version`, `targets`, `bytes`, `seconds`, `inputs` and `outputs` (`name`,
        `shape`, `dtype`), `layers`, `attention` (per module: heads, head dims, tokens, product shapes),
        `fused_attention` (`calls`, `kernels`: fp32 never fuses, nor do head dims below 16) and `sites`
        (`compare_dims`'s rows on the parsed network; None without a plan).

    Raises:
        InputError: for a graph or target that the backend does not take, or a plan that the graph does not follow.
        MissingPackageError: if the backend, or the GPU that it builds on, is not here.
        SlimdiffError: if the build fails, or the network is not the plan's.
    """
    settings, onnx_file, folder = settings or EngineSettings(), Path(onnx_file), Path(folder)
    backend = _backend(settings)
    weights = _weight_bytes(onnx_file)
    if plan is not None:
        _demand_plan(check_reduced_dims(onnx_file, plan), f"{onnx_file}", InputError)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ENGINE, is_file=True) as temporary:
        found = _in_process(backend, onnx_file, temporary, settings, weights, progress)
        dims = {module: tuple(shape) for module, shape in found.pop("dims").items()}
        sites = None if plan is None else compare_dims(dims, plan) + _compare_products(found["attention"], plan)
        _demand_plan(sites or [], "the parsed network", SlimdiffError)
    report = {"backend": backend, "targets": settings.targets, **found, "sites": sites}
    write_json(folder / REPORT, report)
    return report


def _backend(settings: EngineSettings) -> Backend:
    backend = available_backend() if settings.backend == "auto" else settings.backend
    if backend is None:
        raise MissingPackageError(
            "neither tensorrt nor tensorrt_rtx is installed: pip install 'slimdiff[tensorrt-rtx]', which also builds "
            "without a GPU, or 'slimdiff[gpu]'"
        )
    for module in (MODULES[backend], "polygraphy"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"{module} is not installed: pip install 'slimdiff[{EXTRAS[backend]}]'")
    if backend == "tensorrt" and settings.targets:
        raise InputError("TensorRT builds for the GPU that it runs on: targets are for the backend tensorrt-rtx")
    if backend == "tensorrt" and not has_gpu():
        raise MissingPackageError("TensorRT builds on a GPU, and there is none here; tensorrt-rtx needs none")
    if not settings.targets and not has_gpu():
        raise InputError("there is no GPU here to build for: name targets, e.g. sm89")
    return backend


def _in_process(
    backend: Backend, onnx_file: Path, engine: Path, settings: EngineSettings, weights: int, progress: str | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="slimdiff-engine-") as scratch:
        result, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        job = {
            "backend": backend,
            "onnx_file": str(onnx_file.resolve()),
            "engine_file": str(engine.resolve()),
            "result_file": str(result),
            "targets": [[int(t[2:-1]), int(t[-1])] for t in settings.targets],
            "batch": settings.batch,
            "workspace_gib": settings.workspace_gib,
        }
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        search = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "POLYGRAPHY_USE_TENSORRT_RTX": str(int(backend == "tensorrt-rtx")),
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
        }
        command = [sys.executable, "-m", "exporters.engine_worker", str(Path(scratch) / "job.json")]
        with log.open("wb") as out:
            worker = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
            try:
                code = _wait(worker, log, progress)
            finally:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
        if code == 0:
            return json.loads(result.read_text())
        if result.is_file():
            raise InputError(json.loads(result.read_text())["refused"])
        raise SlimdiffError(explain(code, log.read_text(errors="replace"), weights))


def _wait(worker: subprocess.Popen, log: Path, progress: str | None) -> int:
    with tqdm(bar_format="{desc} {elapsed}", desc=progress, disable=progress is None) as bar:
        while True:
            bar.set_description_str(f"{progress}: {_stage(log.read_text(errors='replace'))},", refresh=True)
            try:
                return worker.wait(timeout=0.25)
            except subprocess.TimeoutExpired:
                continue


def _stage(log: str) -> str:
    stages = [line.removeprefix("stage: ") for line in log.splitlines() if line.startswith("stage: ")]
    return stages[-1] if stages else "starting"


def explain(code: int, log: str, weights: int) -> str:
    """Why a build failed and what to do, in one line.

    Args:
        code: exit status of the worker, negative for a signal.
        log: what it wrote.
        weights: bytes of the graph's weights.
    """
    stage = _stage(log)
    errors = [line.strip() for line in log.splitlines() if "[E]" in line or "[!]" in line or "Error" in line]
    last = errors[0].removeprefix("[E]").strip() if errors else f"exit status {code}"
    if code == -9 or re.search(r"out of memory|bad_alloc|OutOfMemory|MemoryError", log):
        need = 3.2 * weights / 1e9  # measured on SD 1.5 in fp16
        return f"out of memory while {stage}: {weights / 1e9:.1f} GB of weights take about {need:.1f} GB to build"
    if found := re.search(r"[Cc]ould not find any implementation for node ([^\n]*)", log):
        return (
            f"no kernel was found for {found[1].strip()}: give more workspace (workspace_gib), export in fp16, "
            "or build for fewer targets"
        )
    if code < 0:
        return f"the builder was ended by signal {-code} while {stage}: {last}"
    return f"the engine build failed while {stage}: {last}"


def _compare_products(attention: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Hold the head dims of the attention products against the plan, in `compare_dims`'s form."""
    by_module = {row["module"]: row for row in attention}
    rows = []
    for name, site in plan.sites.items():
        if site.group in ("query_key", "value_output"):
            row = by_module.get(site.path, {})
            key = "query_key_dim" if site.group == "query_key" else "value_dim"
            rows.append(site_row(name, site.path, {key: site.rank}, {key: row.get(key)}))
    return rows


def _demand_plan(rows: list[dict[str, Any]], where: str, error: type[SlimdiffError]) -> None:
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        first = wrong[0]
        raise error(
            f"{where} is not what the plan says at {len(wrong)} of {len(rows)} places, first at {first['site']}: "
            f"the plan has {first['expected']}, found {first['found']}"
        )


def _weight_bytes(onnx_file: Path) -> int:
    """Bytes of the external data files that the graph names.

    Raises:
        InputError: if there is no graph, or a file that it names is not beside it.
    """
    graph = read_graph(onnx_file).graph
    names = {e.value for i in graph.initializer for e in i.external_data if e.key == "location"}
    missing = sorted(name for name in names if not (onnx_file.parent / name).is_file())
    if missing:
        raise InputError(f"{onnx_file} keeps its weights in {', '.join(missing)}, which is not beside it")
    return sum((onnx_file.parent / name).stat().st_size for name in names)
