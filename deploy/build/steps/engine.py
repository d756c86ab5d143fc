"""The engine of the slim graph in fp16, or the reason why there is none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from deploy.artifacts.figures import denoiser_of
from deploy.artifacts.kinds import graph_of
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of, versions
from exporters.engine.backends import BACKENDS, available_backend
from exporters.engine.build import request_engine
from exporters.engine.check import runs_on
from exporters.engine.gpu import gpu_here
from exporters.graphs.export import export_unet
from exporters.registry import runtime_of
from exporters.settings import EngineSettings

log = logging.getLogger("slimdiff")


def run(shop: Workshop, folder: Path) -> dict[str, Any]:
    if (reason := _why_none(shop)) is not None:
        log.info("engine: skipped, %s", reason)
        return {"skipped": reason}
    graph = graph_of(str(shop.folder / "export" / "slim"), verified=False)
    if shop.recipe.export.precision not in (shop.engine_precision, "int8"):
        log.info("engine: exporting the slim denoiser in %s", shop.engine_precision)
        half = shop.of_unet.model_copy(update={"precision": shop.engine_precision, "dynamic_batch": False})
        graph = export_unet(
            denoiser_of(shop.slim), folder / "onnx-fp16", shop.trajectory[0], half, scheduler=shop.slim.scheduler
        )
    settings = EngineSettings(**shop.recipe.engine.model_dump(exclude={"enabled"}))
    request = request_engine(graph, settings, plan=shop.plan)
    before = shop.folder / "engine"
    why = "it was asked for" if "engine" in shop.forced else request.why_build(before)
    if why is None:
        log.info("engine: the one from before is the same")
        return request.reuse(before, folder)
    log.info("engine: built, because %s", why)
    return request.build(folder)


def _why_none(shop: Workshop) -> str | None:
    """Why there will be no engine; None if there will be one."""
    settings = shop.recipe.engine
    if not settings.enabled:
        return "the recipe says so (engine.enabled: false)"
    if settings.backend != "auto":
        return None
    if available_backend() is None:
        modules = " or ".join(runtime_of(name).module for name in BACKENDS)
        return f"no backend is installed ({modules}): pip install 'slimdiff[tensorrt-rtx]'"
    if not settings.targets and gpu_here() is None:
        return "there is no GPU here to build for, and the recipe names no engine.targets, such as sm89"
    return None


def _inputs(shop: Workshop) -> dict[str, str]:
    settings = shop.recipe.engine
    gpu = None if settings.targets or not settings.enabled else gpu_here()
    return {
        **shop.exporting,
        "skipped": str(_why_none(shop)),
        "gpu": "" if gpu is None else f"{gpu.name} {gpu.capability} {gpu.driver}",
        **versions(("tensorrt", "tensorrt-rtx-cu13", "polygraphy")),
    }


def _packages(shop: Workshop) -> tuple[tuple[str, str], ...]:
    settings = shop.recipe.engine
    return packages_of(settings.backend) if settings.enabled and settings.backend != "auto" else ()


STAGE = Stage(
    "engine",
    run,
    needs=("export",),
    settings=lambda shop: shop.recipe.engine.model_dump(),
    inputs=_inputs,
    kind="engine",
    runs_on=lambda report: {} if "skipped" in report else runs_on(report),
    packages=_packages,
)
