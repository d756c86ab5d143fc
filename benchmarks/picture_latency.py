"""A picture's latency as predicted, against the same measured: its kinds of steps added up, with what is beside them.

`python -m benchmarks.picture_latency [--model sd15] [--latents 64] [--steps 4] [--runtime torch]` prints a Markdown
table: a row for each schedule. The prediction is of `exporters.latency.steps`, which times every kind of step in turn,
in pictures of another schedule; what is measured is whole pictures, each timed as one. Random weights at full size:
nothing is said of what pictures show. One thread, processor time: other work on the machine counts in neither.
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
from deploy.opening.picture import Picture
from exporters.graphs.pipeline import example_call
from exporters.graphs.scheduled import export_scheduled_pipeline
from exporters.latency.steps import measure_steps
from exporters.machine import machine_name
from exporters.settings import ExportSettings, TableSettings
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.denoising.torch_state import on_threads
from slimdiff.denoising.trajectory import sample_images
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.progress import bar
from slimdiff.schedule import FILE, Schedule, ScheduleSettings, levels_of
from slimdiff.settings import Sampling

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
    asked = parser.parse_args()
    known = asked.model in WORLDS
    model = WORLDS[asked.model]().model if known else ""
    pipeline: Any = load_pipeline(model, "fp32") if known else random_pipeline(asked.model, asked.latents)
    sampling = Sampling(steps=asked.steps, guidance=5.0, batch=1)
    levels = levels_of(pipeline.unet.config) or 1
    with TemporaryDirectory(prefix="slimdiff-pictures-") as scratch:
        settings = TableSettings(runtime=asked.runtime, threads=1, rounds=max(3, asked.pictures))
        depth, cache = f"up_blocks.{levels - 1}", Path(scratch) / "cache"
        costs = measure_steps(pipeline, sampling, depth=depth, unguided=True, settings=settings, cache=cache)
        lines = [
            "| guidance / whole every | predicted | measured | measured over predicted | speedup predicted | measured |"
        ]
        lines += ["| --- " * 6 + "|"]
        first: tuple[float, float] | None = None
        for number, text in enumerate(bar(asked.schedules, "pictures", "schedule")):
            interval, _, every = text.partition("/")
            by_hand = ScheduleSettings(guidance_interval=interval, deep_every=int(every))
            schedule = by_hand.make(levels, asked.steps)
            make = runs_of(pipeline, schedule, sampling, asked.runtime, Path(scratch) / str(number))
            predicted, measured = costs.of(schedule), median_ms(make, asked.pictures)
            first = first or (predicted, measured)
            speedups = f"{first[0] / predicted:.2f} | {first[1] / measured:.2f}"
            ms = f"{predicted:,.0f} ms | {measured:,.0f} ms | {measured / predicted:.3f}"
            lines.append(f"| {text} | {ms} | {speedups} |")
    print("\n".join(lines))
    share = costs.rest / costs.full(asked.steps)
    print(f"\n{asked.model}, {asked.steps} steps, {asked.runtime}, beside the steps {share:.1%}; {machine_name()}")


if __name__ == "__main__":
    main()
