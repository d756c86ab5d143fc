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
from exporters.graphs.scheduled import export_scheduled
from exporters.registry import runtime_of
from exporters.settings import EngineSettings
from slimdiff.denoising.tasks import samples_per_image
from slimdiff.planning.costs import batch_of
from slimdiff.schedule import FILE

log = logging.getLogger("slimdiff")


def run(shop: Workshop, folder: Path) -> dict[str, Any]:
    if (reason := _why_none(shop)) is not None:
        log.info("engine: skipped, %s", reason)
        return {"skipped": reason}
    graph = graph_of(str(shop.folder / "export" / "slim"), verified=False)
    if shop.recipe.export.precision not in (shop.engine_precision, "int8"):
        log.info("engine: exporting the slim denoiser in %s", shop.engine_precision)
        half = shop.of_unet.model_copy(update={"precision": shop.engine_precision, "dynamic_batch": False})
        unet, call, schedule = denoiser_of(shop.slim), shop.trajectory[0], shop.schedule
        to = folder / "onnx-fp16"
        graph = export_scheduled(unet, to, call, schedule, half, scheduler=shop.slim.scheduler)[0]
        graph = graph_of(str(to), verified=False)
    request = request_engine(graph, _settings(shop), plan=shop.plan, branches=_branches(shop))
    if shop.schedule is not None:
        shop.schedule.of_slim().save(folder / FILE)
    before = shop.folder / "engine"
    why = "it was asked for" if "engine" in shop.forced else request.why_build(before)
    if why is None:
        log.info("engine: the one from before is the same")
        return request.reuse(before, folder)
    log.info("engine: built, because %s", why)
    return request.build(folder)


def _settings(shop: Workshop) -> EngineSettings:
    """The recipe's; of graphs that a schedule opens in the batch, for that of the calls if the recipe names none."""
    settings = EngineSettings(**shop.recipe.engine.model_dump(exclude={"enabled"}))
    said = settings.batch or settings.shapes or settings.profiles
    if said or shop.schedule is None or shop.schedule.guides_always():
        return settings
    return settings.model_copy(update={"batch": batch_of(shop.trajectory[0])})


def _branches(shop: Workshop) -> int:
    """Of guidance, where steps of the schedule go without."""
    unguided = shop.schedule is not None and not shop.schedule.guides_always()
    return samples_per_image(shop.slim, shop.sampling) if unguided else 1


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
    settings=lambda shop: shop.recipe.engine.model_dump() | shop.scheduled,
    inputs=_inputs,
    kind="engine",
    runs_on=lambda report: {} if "skipped" in report else runs_on(report),
    packages=_packages,
)
