"""The frontier: slim models at several budgets, each planned and measured, and their figures put together."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploy.artifacts import build_folder
from deploy.artifacts.figures import costs, denoiser_of
from deploy.artifacts.hashes import public_name
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of, write_result
from deploy.recipe.prompts import comparison_prompts
from deploy.recipe.recipe import Recipe, SweepStage, point_budget
from exporters.graphs.pipeline import example_call
from exporters.latency.jobs import write_job
from exporters.latency.measure import bench
from exporters.latency.table import measure_latency
from exporters.machine import machine_name
from exporters.settings import TableSettings
from slimdiff.compression import Compressor, with_denoiser
from slimdiff.denoising.trajectory import sample_images
from slimdiff.fidelity import image_fidelity
from slimdiff.planning.costs import CostTable
from slimdiff.storage import manifest

log = logging.getLogger("slimdiff")
_UNSEEN_CAPTIONS = 1  # the seed of the embedded model's captions that its images are compared on


class Sweep:
    """What the points of a sweep share, made when first needed."""

    def __init__(self, shop: Workshop) -> None:
        assert shop.recipe.sweep is not None
        self.shop, self.settings = shop, shop.recipe.sweep
        self.calibration, self.planning = shop.recipe.calibration, shop.recipe.plan
        self.runtime = TableSettings(runtime=self.settings.runtime, threads=self.settings.threads)

    @property
    def pipeline(self) -> Any:
        return self.shop.dense

    @cached_property
    def call(self) -> Any:
        """The call that MACs and latency are counted on: one image, both branches of guidance."""
        sampling = self.calibration.sampling
        return example_call(self.pipeline, height=sampling.height, width=sampling.width)

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
        return measure_latency(denoiser_of(self.pipeline), self.call, self.planning, self.runtime)

    @cached_property
    def dense_images(self) -> list[Any]:
        return self._images(self.pipeline)

    def _images(self, pipeline: Any) -> list[Any]:
        sampling = self.calibration.sampling
        unseen = sampling.model_copy(update={"seed": sampling.seed + 10_000})
        return sample_images(pipeline, captions(self.shop), unseen)

    def fidelity(self, slim: Any) -> dict[str, Any] | None:
        """Images of the slim denoiser against the dense one's; None if the recipe asks for none."""
        if not self.settings.images:
            return None
        return image_fidelity(self.dense_images, self._images(with_denoiser(self.pipeline, slim)))


def captions(shop: Workshop) -> list[str]:
    """What the images of all points are made of."""
    settings: Any = shop.recipe.sweep
    return comparison_prompts(shop.prompts_from, shop.recipe.calibration.samples, settings.images, _UNSEEN_CAPTIONS)


def _measure_point(work: Sweep, text: str, folder: Path) -> None:
    """Plan, slim and measure the model of one budget."""
    work.shop.refuse_impossible()
    plan = work.compressor.plan(point_budget(work.settings.by, text), work.latency)
    dense = denoiser_of(work.pipeline)
    slim = work.compressor.slim(plan)
    log.info("sweep: %s is planned, measuring it", text)
    with TemporaryDirectory(prefix="slimdiff-sweep-") as scratch:
        before, after = (
            write_job(name, model, work.call, work.runtime.runtime, Path(scratch) / name)
            for name, model in (("dense", dense), ("slim", slim))
        )
        paired = bench(before, after, work.shop.recipe.bench, name=f"{text}: bench")
    plan.save(folder / "plan.json")
    value = {
        "budget": text,
        **costs(slim, work.call),
        "latency_ms": paired["candidate"]["median_ms"],
        "dense_latency_ms": paired["baseline"]["median_ms"],
        "speedup": paired["speedup"],
        "predicted": plan.costs,
        "noise_error": work.compressor.held_error.of(slim),
        "images": work.fidelity(slim),
        "dense": costs(dense, work.call),
        "runtime": paired["runtime"],
        "machine": paired["machine"],
    }
    manifest.write_json(folder / "point.json", build_folder.strict(value))


def frontier(shop: Workshop, points: Sequence[Stage]) -> dict[str, Any]:
    """What the finished `points` measured: the content of `sweep.json`.

    Returns:
        `dense` and `points` (largest model first) with `parameters`, `macs`, `bytes`, and for points `budget`,
        `speedup` (dense and slim in turn), `latency_ms`, `dense_latency_ms`, `noise_error` and `images`; `runtime` and
        `machine`.
    """
    settings: Any = shop.recipe.sweep
    found = [json.loads((shop.folder / p.name / "point.json").read_text(encoding="utf-8")) for p in points]
    found.sort(key=lambda point: -point["parameters"])
    return build_folder.strict(
        {
            "model": public_name(shop.recipe.model),
            "by": settings.by,
            "runtime": found[0]["runtime"],
            "machine": found[0]["machine"],
            "dense": found[0]["dense"],
            "points": [{k: v for k, v in p.items() if k not in ("runtime", "machine", "dense")} for p in found],
        }
    )


def point_stages(settings: SweepStage) -> list[Stage]:
    """A stage for each point."""
    sweep_in = cache(Sweep)

    def point(text: str) -> Stage:
        def run(shop: Workshop, folder: Path) -> None:
            _measure_point(sweep_in(shop), text, folder)

        return Stage(
            f"point-{re.sub('[^0-9A-Za-z.]', '', text.replace('%', 'pct'))}-{settings.by}",
            run,
            needs=("calibrate", "sensitivity"),
            settings=lambda shop: {**_settings(shop), "point": text},
            inputs=lambda shop: shop.exporting | {"captions": manifest.fingerprint(captions(shop))},
            kind="sweep-point",
            packages=lambda _: packages_of(settings.runtime),
        )

    return [point(text) for text in settings.budgets()]


def _settings(shop: Workshop) -> dict[str, Any]:
    settings: Any = shop.recipe.sweep
    return {
        "by": settings.by,
        "plan": shop.recipe.plan.model_dump(),
        "runtime": TableSettings(runtime=settings.runtime, threads=settings.threads).model_dump(),
        "bench": shop.recipe.bench.model_dump(),
        "images": settings.images,
        "machine": machine_name(),
    }


def stages(recipe: Recipe) -> list[Stage]:
    """A stage for each point and one that puts them together; none if the recipe asks for no sweep."""
    if recipe.sweep is None:
        return []
    points = point_stages(recipe.sweep)

    def run(shop: Workshop, folder: Path) -> None:
        write_result(folder, build_folder.SWEEP, frontier(shop, points))

    return [*points, Stage(build_folder.SWEEP, run, needs=tuple(p.name for p in points), kind="sweep")]
