"""A picture's latency as predicted, against the same measured: its kinds of steps added up, with what is beside them.

`python -m benchmarks.picture_latency [--model sd15] [--latents 64] [--steps 4] [--runtime torch] [--slim]` prints a
Markdown table: a row for each schedule. The prediction is of `exporters.latency.steps`, which times every kind of step
in turn, in pictures of another schedule; what is measured is whole pictures, each timed as one. Random weights at full
size: nothing is said of what pictures show. One thread, processor time: other work on the machine counts in neither.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.full_size import MODELS
from benchmarks.quality.worlds import WORLDS
from benchmarks.random_models import random_pipeline
from benchmarks.ranks import uniform_ranks
from deploy.opening.picture import Picture
from exporters.graphs.pipeline import example_call
from exporters.graphs.scheduled import export_scheduled_pipeline
from exporters.latency.steps import measure_steps
from exporters.machine import machine_name
from exporters.settings import ExportSettings, TableSettings
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.torch_state import on_threads
from slimdiff.denoising.trajectory import sample_images, with_denoiser
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.pictures import StepCosts
from slimdiff.progress import bar
from slimdiff.schedule import FILE, Schedule, ScheduleSettings, levels_of
from slimdiff.settings import Sampling
from slimdiff.slimming.skeleton import skeleton

BY_HAND = ("0:1/1", "0:0.5/1", "0:1/2", "0:0.5/2", "0:0.5/4")


def runs_of(
    pipeline: Any, schedule: Schedule, sampling: Sampling, runtime: str, folder: Path
) -> Callable[[], Any]:  # fmt: skip
    """What makes one picture by a schedule, on one thread."""
    if runtime == "torch":
        inputs, own = neutral_inputs(pipeline, 1, sampling)
        scheduled = pipeline if schedule.is_full() else schedule_pipeline(pipeline, schedule)

        def make() -> None:
            with on_threads(1):
                sample_images(scheduled, inputs, own)

        return make
    size: Any = {"height": sampling.height, "width": sampling.width}
    folder.mkdir()
    schedule.save(folder / FILE)
    call = example_call(pipeline, **size, guidance=sampling.guidance)
    export_scheduled_pipeline(pipeline, folder, schedule, ExportSettings(), call=call)
    own_schedule = schedule.model_dump(exclude_none=True)
    return Picture(str(folder), 1, runtime=runtime, sampling=sampling.model_dump(), schedule=own_schedule).run


def median_ms(make: Callable[[], Any], pictures: int) -> float:
    """Processor time of a picture, behind one that is not counted."""
    make()
    found = []
    for _ in range(pictures):
        start = time.process_time()
        make()
        found.append(1e3 * (time.process_time() - start))
    return float(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, *WORLDS], default="sd15", help="(default: %(default)s)")
    parser.add_argument("--latents", type=int, help="height and width, of a model of random weights (default: its own)")
    parser.add_argument("--steps", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--runtime", default="torch", help="(default: %(default)s)")
    parser.add_argument("--schedules", nargs="+", default=BY_HAND, help="guidance interval / deep every (%(default)s)")
    parser.add_argument("--pictures", type=int, default=3, help="timed of each schedule (default: %(default)s)")
    parser.add_argument("--slim", action="store_true", help="rows of the model cut by its budget of parameters, too")
    asked = parser.parse_args()
    known = asked.model in WORLDS
    if known and asked.slim:
        parser.error("--slim is of models of random weights: what trained ones lose depends on their plans")
    model = WORLDS[asked.model]().model if known else ""
    dense: Any = load_pipeline(model, "fp32") if known else random_pipeline(asked.model, asked.latents)
    pipelines = {"dense": dense}
    if asked.slim:
        budget = MODELS[asked.model].budget
        pipelines[f"-{budget}"] = with_denoiser(dense, skeleton(dense.unet, uniform_ranks(dense.unet, budget)))
    sampling = Sampling(steps=asked.steps, guidance=5.0, batch=1)
    lines = ["| model | guidance / whole every | predicted | measured | measured over predicted | speedup measured |"]
    lines += ["| --- " * 6 + "|"]
    first: float | None = None
    beside = []
    for name, pipeline in pipelines.items():
        with TemporaryDirectory(prefix="slimdiff-pictures-") as scratch:
            costs, rows = rows_of(pipeline, sampling, asked, Path(scratch))
        beside.append(f"{name} {costs.rest / costs.full(asked.steps):.1%}")
        for text, predicted, measured in rows:
            first = first or measured
            ms = f"{predicted:,.0f} ms | {measured:,.0f} ms | {measured / predicted:.3f}"
            lines.append(f"| {name} | {text} | {ms} | {first / measured:.2f} |")
    print("\n".join(lines))
    print(
        f"\n{asked.model}, {asked.steps} steps, {asked.runtime}, beside the steps {', '.join(beside)}; {machine_name()}"
    )


def rows_of(
    pipeline: Any, sampling: Sampling, asked: argparse.Namespace, scratch: Path
) -> tuple[StepCosts, list[tuple[str, float, float]]]:
    """What kinds of steps cost, and of each schedule the predicted and the measured milliseconds of a picture."""
    levels = levels_of(pipeline.unet.config) or 1
    settings = TableSettings(runtime=asked.runtime, threads=1, rounds=max(3, asked.pictures))
    depth, cache = f"up_blocks.{levels - 1}", scratch / "cache"
    costs = measure_steps(pipeline, sampling, depth=depth, unguided=True, settings=settings, cache=cache)
    rows = []
    for number, text in enumerate(bar(asked.schedules, "pictures", "schedule")):
        interval, _, every = text.partition("/")
        by_hand = ScheduleSettings(guidance_interval=interval, deep_every=int(every))
        schedule = by_hand.make(levels, asked.steps)
        make = runs_of(pipeline, schedule, sampling, asked.runtime, scratch / str(number))
        rows.append((text, costs.of(schedule), median_ms(make, asked.pictures)))
    return costs, rows


if __name__ == "__main__":
    main()
