"""The frontier: slim models at several budgets, each planned and measured, and their figures put together."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploy.artifacts import build_folder
from deploy.artifacts.figures import costs, denoiser_of, made_now
from deploy.artifacts.hashes import public_name
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of
from deploy.opening.picture import picture_job
from deploy.recipe.material import hash_of
from deploy.recipe.recipe import Recipe, SweepStage, parse_budget
from exporters.graphs.pipeline import example_call
from exporters.latency.measure import bench
from exporters.latency.pair import Job, write_job
from exporters.latency.steps import measure_picture
from exporters.latency.table import measure_latency
from exporters.machine import machine_name
from exporters.settings import ExportSettings, TableSettings
from slimdiff import Plan
from slimdiff.compression import Compressor, with_denoiser
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.tasks import make_inputs
from slimdiff.denoising.trajectory import sample_images
from slimdiff.errors import InputError
from slimdiff.fidelity import image_fidelity
from slimdiff.planning.costs import CostTable
from slimdiff.prompts.material import Material
from slimdiff.storage import manifest

log = logging.getLogger("slimdiff")
_UNSEEN_CAPTIONS = 1  # the seed of the embedded model's captions that its images are compared on


class Sweep:
    """What the points of a sweep share, made when first needed."""

    def __init__(self, shop: Workshop) -> None:
        assert shop.recipe.sweep is not None
        self.shop, self.settings, self.sampling = shop, shop.recipe.sweep, shop.calibration.sampling
        self.runtime = _table(self.settings)
        if shop.recipe.plan.precision == "int8" and self.settings.by == "speedup" and shop.schedule is not None:
            raise InputError("an image by a schedule is not timed in int8 yet: leave out int8, or say schedule none")

    @cached_property
    def call(self) -> Any:
        """The call whose latency is measured: one image at calibration's guidance. MACs are of one sample."""
        size: dict[str, Any] = {"height": self.sampling.height, "width": self.sampling.width}
        return example_call(self.shop.dense, **size, guidance=self.sampling.guidance)

    @cached_property
    def compressor(self) -> Compressor:
        """What plans and slims every point."""
        compressor = self.shop.measured_compressor()
        compressor.measure()  # MACs, where the stage `sensitivity` keeps nothing
        return compressor

    @cached_property
    def latency(self) -> CostTable | None:
        """What points by speedup are planned on."""
        if self.settings.by != "speedup":
            return None
        if (picture := self.compressor.picture) is not None:
            return measure_picture(self.shop.dense, picture, self.sampling, self.shop.recipe.plan, self.runtime)
        return measure_latency(denoiser_of(self.shop.dense), self.call, self.shop.recipe.plan, self.runtime)

    @cached_property
    def dense_images(self) -> list[Any]:
        return self._images(self.shop.dense)

    def _images(self, pipeline: Any) -> list[Any]:
        unseen = self.shop.recipe.calibration.sampling
        inputs, sampling = make_inputs(pipeline, compared(self.shop), unseen)
        sampling = sampling.model_copy(update={"seed": unseen.seed + 10_000})
        return sample_images(pipeline, inputs, sampling, checked=False)

    def fidelity(self, slim: Any) -> dict[str, Any] | None:
        """Images of the slim denoiser against the dense one's; None if the recipe asks for none."""
        if not self.settings.images:
            return None
        pipeline = with_denoiser(self.shop.dense, slim)
        if self.shop.schedule is not None:
            pipeline = schedule_pipeline(pipeline, self.shop.schedule)
        return image_fidelity(self.dense_images, self._images(pipeline))

    def job(self, name: str, model: Any, folder: Path, plan: Plan) -> Job:
        """A denoiser whose call is timed; where points are of a whole image by a schedule, that image.

        The slim one is in the plan's precision.
        """
        if self.shop.schedule is None or self.settings.by != "speedup":
            how: Any = {"settings": ExportSettings(precision="int8"), "calibration": self.compressor.calls.sensitivity}
            more = how if name == "slim" and plan.int8() else {}
            return write_job(name, model, self.call, self.runtime.runtime, folder, **more)
        with_denoiser(self.shop.dense, model).save_pretrained(folder / "model")
        one = self.sampling.model_copy(update={"batch": 1})
        job = picture_job(str(folder / "model"), self.runtime.runtime, one, self.shop.schedule, folder / "onnx")
        return replace(job, name=name)


def compared(shop: Workshop) -> Material:
    """What the images of all points are made from."""
    settings: Any = shop.recipe.sweep
    return shop.unseen(settings.images, _UNSEEN_CAPTIONS)


def _measure_point(work: Sweep, text: str, folder: Path) -> None:
    """Plan, slim and measure the model of one budget."""
    work.shop.refuse_impossible()
    plan = work.compressor.plan(parse_budget(work.settings.by, text), work.latency)
    dense = denoiser_of(work.shop.dense)
    slim = work.compressor.slim(plan)
    with work.compressor.planner.as_planned(plan, slim):
        error, images = work.compressor.held_error.of(slim), work.fidelity(slim)
    log.info("sweep: %s is planned, measuring it", text)
    with TemporaryDirectory(prefix="slimdiff-sweep-") as scratch:
        before, after = (
            work.job(name, model, Path(scratch) / name, plan) for name, model in (("dense", dense), ("slim", slim))
        )
        paired = bench(before, after, work.shop.recipe.bench)
    plan.save(folder / "plan.json")
    value = {
        "budget": text,
        **costs(slim, work.call),
        "latency_ms": paired["candidate"]["median_ms"],
        "dense_latency_ms": paired["baseline"]["median_ms"],
        "speedup": paired["speedup"],
        "predicted": plan.costs,
        "noise_error": error,
        "images": images,
        "dense": costs(dense, work.call),
        "runtime": paired["runtime"],
        "machine": paired["machine"],
    }
    manifest.write_json(folder / "point.json", build_folder.strict(value))


def frontier(shop: Workshop, points: Sequence[Stage]) -> dict[str, Any]:
    """What the finished `points` measured: the content of `sweep.json`.

    Returns:
        `dense` and `points` (largest model first) with `parameters`, `macs`, `bytes`, and for points `budget`,
        `speedup` (dense and slim in turn), `latency_ms`, `dense_latency_ms`, `noise_error` and `images`; `runtime`,
        `machine` and what `made_now` has.
    """
    settings: Any = shop.recipe.sweep
    measured = [manifest.read_json(shop.folder / stage.name / "point.json") for stage in points]
    measured.sort(key=lambda point: -point["parameters"])
    shared = {key: measured[0][key] for key in ("runtime", "machine", "dense")}
    rows = [{key: value for key, value in point.items() if key not in shared} for point in measured]
    return {"model": public_name(shop.recipe.model), "by": settings.by, **shared, **made_now(), "points": rows}


def point_stages(settings: SweepStage) -> list[Stage]:
    """A stage for each point."""
    sweep_in = cache(Sweep)

    def point(text: str) -> Stage:
        return Stage(
            f"point-{re.sub('[^0-9A-Za-z.]', '', text.replace('%', 'pct'))}-{settings.by}",
            lambda shop, folder: _measure_point(sweep_in(shop), text, folder),
            needs=("calibrate", "sensitivity"),
            settings=lambda shop: {**_settings(shop), "point": text},
            inputs=lambda shop: shop.exporting | {"captions": hash_of(compared(shop))},
            kind="sweep-point",
            packages=lambda _: packages_of(settings.runtime),
        )

    return [point(text) for text in settings.texts]


def _table(settings: SweepStage) -> TableSettings:
    return TableSettings(runtime=settings.runtime, threads=settings.threads)


def _settings(shop: Workshop) -> dict[str, Any]:
    settings: Any = shop.recipe.sweep
    return {
        "by": settings.by,
        "plan": shop.recipe.plan.model_dump(),
        "runtime": _table(settings).model_dump(),
        "bench": shop.recipe.bench.model_dump(),
        "images": settings.images,
        **shop.scheduled,
        "machine": machine_name(),
    }


def stages(recipe: Recipe) -> list[Stage]:
    """A stage for each point and one that puts them together; none if the recipe asks for no sweep."""
    if recipe.sweep is None:
        return []
    points = point_stages(recipe.sweep)
    needs = tuple(point.name for point in points)
    return [*points, Stage(build_folder.SWEEP, lambda shop, _: frontier(shop, points), needs, kind="sweep")]
