"""The frontier of a model: slim models at several budgets, each measured, drawn together.

sweep.json      the dense model's figures and every point's
sweep.html      the same, drawn; one self-contained file
calibrate/      statistics
sensitivity/    what planning measures by forward passes, whatever the budget
point-.../      one per budget: plan.json and point.json
manifest.json   what it was made from
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import exporters
import slimdiff
from deploy.artifacts import build_folder
from deploy.artifacts.figures import costs
from deploy.build.sensitivity import deciding, measured, write_sensitivity
from deploy.build.stages import Stage, run_stages
from deploy.build.workshop import denoiser_of, model_hash, public_name, source_hash
from deploy.cli.console import log
from deploy.recipe.prompts import calibration_prompts, comparison_prompts, described
from deploy.recipe.recipe import point_budget
from exporters.graphs.pipeline import example_call
from exporters.latency.paired import paired_latency
from exporters.latency.table import measure_latency, whole_run
from exporters.machine import machine_name
from exporters.settings import LatencySettings, TableSettings
from slimdiff import CalibrationSettings, PlanSettings, Statistics, calibrate
from slimdiff.compression import fitting_calls, held_calls, sensitivity_calls, with_denoiser
from slimdiff.denoising.trajectory import sample_images
from slimdiff.errors import InputError
from slimdiff.fidelity import image_fidelity
from slimdiff.groups import is_fitted
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.planner import Planner, check_budgets
from slimdiff.planning.search import Judge
from slimdiff.storage import manifest
from slimdiff.storage.lock import locked

JSON, PAGE = "sweep.json", "sweep.html"
_UNSEEN_CAPTIONS = 1  # the seed of the embedded model's captions that its images are compared on


@dataclass
class Sweep:
    """What a sweep is of, and what its points share, made when first needed."""

    model: str
    prompts_from: str | Sequence[str]
    by: str
    points: list[str]
    calibration: CalibrationSettings
    planning: PlanSettings
    runtime: TableSettings
    bench: LatencySettings
    images: int
    folder: Path
    opened: Callable[[str], Any] = load_pipeline
    """Gives the dense pipeline; a build has it open already."""

    @cached_property
    def pipeline(self) -> Any:
        return self.opened(self.model)

    @cached_property
    def prompts(self) -> list[str]:
        """What calibration sees, and after it a batch that it does not."""
        count = self.calibration.samples + self.calibration.sampling.batch
        return calibration_prompts(self.prompts_from, count)

    @cached_property
    def captions(self) -> list[str]:
        return comparison_prompts(self.prompts_from, self.calibration.samples, self.images, _UNSEEN_CAPTIONS)

    @cached_property
    def call(self) -> Any:
        """The call that MACs and latency are counted on: one image, both branches of guidance."""
        sampling = self.calibration.sampling
        return example_call(self.pipeline, height=sampling.height, width=sampling.width)

    def refuse_impossible(self) -> None:
        """Before the long work.

        Raises:
            InputError: if a point's budget cannot be met.
        """
        budgets = [point_budget(self.by, text) for text in self.points]
        check_budgets(denoiser_of(self.pipeline), budgets, self.planning, call=lambda: self.call)

    @cached_property
    def planner(self) -> Planner:
        statistics = measured(self.folder)
        calls, fitted_on = [], []
        if not statistics.sensitivities:
            calls = sensitivity_calls(self.pipeline, self.prompts, self.calibration.sampling, self.planning)
        if is_fitted(self.planning):
            fitted_on = fitting_calls(self.pipeline, self.prompts, self.calibration, self.planning)
        latency = None
        if self.by == "speedup":
            denoiser = denoiser_of(self.pipeline)
            latency = measure_latency(denoiser, self.call, self.planning, self.runtime, progress="latency")
        return Planner(
            denoiser_of(self.pipeline), statistics, self.planning, calls=calls, fitting_calls=fitted_on, latency=latency
        )

    @cached_property
    def judge(self) -> Judge:
        held = held_calls(self.pipeline, self.prompts, self.calibration, self.planning)
        return Judge(denoiser_of(self.pipeline), held)

    @cached_property
    def dense_images(self) -> list[Any]:
        return self._images(self.pipeline, "sweep: dense images")

    def _images(self, pipeline: Any, name: str) -> list[Any]:
        sampling = self.calibration.sampling
        unseen = sampling.model_copy(update={"seed": sampling.seed + 10_000})
        return sample_images(pipeline, self.captions, unseen, progress=name)

    def fidelity(self, slim: Any, name: str) -> dict[str, Any] | None:
        """Images of the slim denoiser against the dense one's; None if none were asked for."""
        if not self.images:
            return None
        made = self._images(with_denoiser(self.pipeline, slim), f"{name}: images")
        return image_fidelity(self.dense_images, made)


def write_sweep(work: Sweep) -> dict[str, Any]:
    """Measure every point that is not there yet, and write `sweep.json` and `sweep.html`.

    Returns:
        the content of `sweep.json`: `dense` and `points` (largest model first) with `parameters`, `macs`, `bytes`, and
        for points `budget`, `speedup` (dense and slim in turn), `latency_ms`, `dense_latency_ms`, `noise_error` and
        `images`; `runtime` and `machine`.

    Raises:
        InputError: if there is no point, or one cannot be a budget or be met; a speedup that cannot be met shows when
            its point is planned, and points before it are kept.
    """
    from deploy.report.sweep import write_page

    if not work.points:
        raise InputError("--points is empty: name budgets such as 5%,10%,20%")
    for text in work.points:  # refuse before the long work, not after
        point_budget(work.by, text)
    with locked(work.folder, "sweep"):
        inputs = _inputs(work)
        first = [
            Stage("calibrate", partial(_calibrate, work), (), work.calibration.model_dump(), inputs, "statistics"),
            Stage(
                "sensitivity",
                partial(_sensitivity, work),
                ("calibrate",),
                deciding(work.planning),
                inputs,
                "sensitivity",
            ),
        ]
        points = point_stages(work)
        for _ in run_stages(work.folder, [*first, *points]):
            pass
        value = frontier(work, points)
        manifest.write_json(work.folder / JSON, value)
        write_page(value, work.folder / PAGE)
        made_from = {"model": inputs["model"], "prompts": inputs["prompts"], "points": work.points}
        manifest.write_manifest(work.folder, "sweep", made_from, {"runtime": value["runtime"]})
    return value


def frontier(work: Sweep, points: Sequence[Stage]) -> dict[str, Any]:
    """What the finished `points` measured, as `write_sweep` says it."""
    found = [json.loads((work.folder / p.name / "point.json").read_text(encoding="utf-8")) for p in points]
    found.sort(key=lambda point: -point["parameters"])
    return build_folder.strict(
        {
            "model": public_name(work.model),
            "by": work.by,
            "runtime": found[0]["runtime"],
            "machine": found[0]["machine"],
            "dense": found[0]["dense"],
            "points": [{k: v for k, v in p.items() if k not in ("runtime", "machine", "dense")} for p in found],
        }
    )


def _inputs(work: Sweep) -> dict[str, str]:
    return {
        "slimdiff": source_hash(Path(slimdiff.__file__).parent),
        "exporters": source_hash(Path(exporters.__file__).parent),
        "sweep": manifest.sha256_of(Path(__file__)),
        "versions": manifest.fingerprint(manifest.versions()),
        "model": model_hash(work.model),
        "prompts": manifest.fingerprint([work.prompts, work.captions]),
    }


def point_stages(work: Sweep) -> list[Stage]:
    """One stage for each point; they need the stages `calibrate` and `sensitivity` of the same folder."""
    shared = {
        "by": work.by,
        "plan": work.planning.model_dump(),
        "runtime": work.runtime.model_dump(),
        "bench": work.bench.model_dump(),
        "images": work.images,
        "machine": machine_name(),
    }
    names = {text: f"point-{re.sub('[^0-9A-Za-z.]', '', text.replace('%', 'pct'))}-{work.by}" for text in work.points}
    inputs, needs = _inputs(work), ("calibrate", "sensitivity")
    return [
        Stage(name, partial(_point, work, text), needs, {**shared, "point": text}, inputs, "sweep-point")
        for text, name in names.items()
    ]


def _calibrate(work: Sweep, folder: Path) -> None:
    work.refuse_impossible()
    used = work.prompts[: work.calibration.samples]
    log.info(
        "sweep: %d prompts %s, %d steps each", len(used), described(work.prompts_from), work.calibration.sampling.steps
    )
    calibrate(work.pipeline, used, work.calibration).save(folder / Path(build_folder.STATISTICS).name)


def _sensitivity(work: Sweep, folder: Path) -> None:
    statistics = Statistics.load(work.folder / build_folder.STATISTICS)
    write_sensitivity(work.pipeline, work.prompts, work.calibration, work.planning, statistics, folder)


def _point(work: Sweep, text: str, folder: Path) -> None:
    work.refuse_impossible()
    plan = work.planner.plan(point_budget(work.by, text))
    dense = denoiser_of(work.pipeline)
    slim = work.planner.slim(plan)
    log.info("sweep: %s is planned, measuring it", text)
    with TemporaryDirectory(prefix="slimdiff-sweep-") as scratch:
        runs: list[Callable[[], Any]] = [
            whole_run(model, work.call, Path(scratch) / name, work.runtime)
            for name, model in (("dense", dense), ("slim", slim))
        ]
        paired = paired_latency(runs[0], runs[1], work.bench, runtime=work.runtime.runtime, progress=f"{text}: bench")
    plan.save(folder / "plan.json")
    value = {
        "budget": text,
        **costs(slim, work.call),
        "latency_ms": paired["candidate"]["median_ms"],
        "dense_latency_ms": paired["baseline"]["median_ms"],
        "speedup": paired["speedup"],
        "predicted": plan.costs,
        "noise_error": work.judge.error(slim),
        "images": work.fidelity(slim, text),
        "dense": costs(dense, work.call),
        "runtime": paired["runtime"],
        "machine": paired["machine"],
    }
    manifest.write_json(folder / "point.json", build_folder.strict(value))
