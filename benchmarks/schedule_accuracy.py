"""Caption accuracy and PSNR of slim models that make their pictures by schedules, in torch: on the CPU or on a GPU.

`python -m benchmarks.schedule_accuracy --model things --schedules none 0:0.5/3 2.0 --macs 0 30% --device cuda` prints a
Markdown table: a row for each schedule and each share of a picture's multiply-adds that the plan takes out by that
schedule. A schedule is a file, an interval of guidance and how often the whole UNet runs (0:0.5/3), or a speedup that
it is chosen for, as `slimdiff schedule` does. All plans are of the same statistics and sensitivities. Points lost are
against the dense model at its full schedule, on the same captions and noise, with an interval of 95 % by resampling
captions. Nothing is timed: what the settings save is measured by `benchmarks.together`.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.quality.worlds import WORLDS, World
from benchmarks.together import GROUPS
from slimdiff.budget import Budget
from slimdiff.compression import Compressor
from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.trajectory import sample_images, with_denoiser
from slimdiff.errors import InputError
from slimdiff.fidelity import image_fidelity
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.pictures import StepCosts
from slimdiff.planning.schedules import Images, choose_schedule, measure_changes
from slimdiff.schedule import Schedule, ScheduleSettings, levels_of
from slimdiff.settings import CalibrationSettings, PlanSettings, Sampling
from slimdiff.storage import manifest

CHOSEN_BY = 16
"""Pictures that a schedule is chosen by."""
RESAMPLINGS = 2000
Hits = np.ndarray
"""What each picture shows of what its caption names, and how much that is `[N, 2]`."""


class Bench:
    """A dense model, what its slim ones are planned by, and the captions that all make pictures of.

    Args:
        times: what steps take, where a speedup is of the whole picture; multiply-adds count without.
    """

    def __init__(
        self, name: str, captions: int, samples: int, batch: int, device: str, times: StepCosts | None = None
    ) -> None:
        self.world: World = WORLDS[name]()
        self.times = times
        self.pipeline: Any = in_float32(load_pipeline(self.world.model)).to(device)
        self.captions = self.world.choose(captions, device)
        self.sampling = self.world.evaluation.model_copy(update={"batch": batch})
        sampling = Sampling(steps=self.sampling.steps, guidance=self.world.guidance, batch=min(batch, samples))
        self.calibration = CalibrationSettings(samples=samples, sampling=sampling)
        self.prompts = self.world.captions(samples + 16, 0)
        self.blind = self._compressor(None)
        self.images, self.hits = self.judge(self.pipeline.unet, None)

    def _compressor(self, schedule: Schedule | None) -> Compressor:
        planning = PlanSettings(groups=tuple(GROUPS.split(",")))
        return Compressor(self.pipeline, self.prompts, self.calibration, planning, schedule=schedule)

    def compressor(self, schedule: Schedule | None) -> Compressor:
        """For plans of pictures by this schedule."""
        self.blind.measure()
        own = self._compressor(schedule)
        own.statistics = self.blind.statistics
        vars(own)["calls"] = self.blind.calls
        return own

    def schedule(self, text: str) -> Schedule | None:
        """Of a file, by hand, or chosen for a speedup; None for the full one."""
        if text == "none" or text.endswith(".json"):
            return None if text == "none" else Schedule.load(text)
        if "/" not in text:
            return choose_schedule(*self.changes, speedup=float(text))
        interval, _, every = text.partition("/")
        asked = ScheduleSettings(guidance_interval=interval, deep_every=int(every))
        return asked.make(levels_of(self.pipeline.unet.config) or 1, self.sampling.steps)

    @cached_property
    def changes(self) -> tuple[Images, Any]:
        """What schedules are chosen by: measured once, on captions of training's kind."""
        sampling = self.calibration.sampling.model_copy(update={"batch": CHOSEN_BY})
        images = Images(self.pipeline, self.world.captions(CHOSEN_BY, 3), sampling)
        depths = images.depths()[-1:] if self.times else None
        return images, measure_changes(
            images, depths, dict.fromkeys(images.depths(), self.times) if self.times else None
        )

    def judge(self, unet: nn.Module, schedule: Schedule | None) -> tuple[list[Any], Hits]:
        """Pictures of the captions, and what they show."""
        pipeline = with_denoiser(self.pipeline, unet)
        pipeline = pipeline if schedule is None else schedule_pipeline(pipeline, schedule)
        images = sample_images(pipeline, self.captions, self.sampling)
        hits = self.world.hits(np.stack([np.asarray(image) for image in images]))
        return images, np.sum(list(hits.values()), axis=0)

    def row(self, unet: nn.Module, schedule: Schedule | None) -> dict[str, Any]:
        """What a model's pictures by a schedule are, held against the dense model's at full schedule."""
        images, hits = self.judge(unet, schedule)
        low, high = lost_interval(self.hits, hits)
        lost = accuracy(self.hits) - accuracy(hits)
        psnr = image_fidelity(self.images, images)["psnr_db"]
        return {"accuracy": accuracy(hits), "lost": lost, "low": low, "high": high, "psnr_db": psnr}


def accuracy(hits: Hits) -> float:
    """In percent."""
    shown, named = hits.sum(0)
    return 100 * float(shown / named)


def lost_interval(dense: Hits, slim: Hits) -> tuple[float, float]:
    """Of the points lost, by resampling captions: both models' pictures of a caption stay together."""
    random = np.random.default_rng(0)
    lost = []
    for _ in range(RESAMPLINGS):
        some = random.integers(len(dense), size=len(dense))
        lost.append(accuracy(dense[some]) - accuracy(slim[some]))
    return float(np.quantile(lost, 0.025)), float(np.quantile(lost, 0.975))


def rows_of(bench: Bench, schedules: dict[str, Schedule | None], shares: list[str], minutes: float) -> Any:
    """Rows one by one, the least slim first, as long as there is time."""
    began = time.time()
    compressors: dict[str, Compressor] = {}
    for share in shares:
        for name, schedule in schedules.items():
            if time.time() - began > 60 * minutes:
                return
            row = {"schedule": name, "says": _says(schedule), "macs": share, "captions": len(bench.captions)}
            unet, start = bench.pipeline.unet, time.time()
            if share not in ("0", "0%"):
                own = compressors.setdefault(name, bench.compressor(schedule))
                unet = own.slim(own.plan(Budget(macs=share)))
            yield {**row, **bench.row(unet, schedule), "seconds": time.time() - start}


def _says(schedule: Schedule | None) -> str:
    """Which steps are guided and whole, in full: a row is enough to make the schedule again."""
    if schedule is None:
        return "full"
    guided, whole = (",".join(map(str, steps)) for steps in (schedule.guided, schedule.whole))
    return f"guided {guided}; whole {whole}; {schedule.depth}"


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| schedule | | of a picture's MACs out | PSNR to dense | accuracy | points lost (95 %) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        lost = f"{row['lost']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        what = f"{row['schedule']} | {row['says']} | {row['macs']}"
        lines.append(f"| {what} | {psnr} | {row['accuracy']:.2f} % | {lost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WORLDS), default="things")
    parser.add_argument("--schedules", nargs="+", default=["none"], help="none: every step guided and whole")
    parser.add_argument("--macs", nargs="+", default=["0"], help="shares that slim models lose; 0: the dense model")
    parser.add_argument("--captions", type=int, default=200, help="pictures that are judged (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="prompts of the calibration (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=10, help="pictures at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e3, help="after which no row is begun")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    what = "ms of a step: guided and whole, guided, whole, neither; and beside the steps (default: MACs count)"
    parser.add_argument("--step-ms", type=float, nargs=5, help=what)
    parser.add_argument("--out", type=Path, help="JSON of the rows, written after each")
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {asked.device}: torch sees no GPU here; leave it out for the CPU")
    times = None
    if asked.step_ms:
        kinds = ((True, True), (True, False), (False, True), (False, False))
        times = StepCosts(dict(zip(kinds, asked.step_ms, strict=False)), asked.step_ms[-1])
    bench = Bench(asked.model, asked.captions, asked.samples, asked.batch, asked.device, times)
    schedules = {name: bench.schedule(name) for name in asked.schedules}
    rows: list[dict[str, Any]] = []
    for row in rows_of(bench, schedules, asked.macs, asked.minutes):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if asked.out is not None:
            manifest.write_json(asked.out, {"dense": accuracy(bench.hits), "rows": rows})
    print(f"\n{asked.model}: dense {accuracy(bench.hits):.2f} %, {asked.captions} captions, {asked.samples} prompts\n")
    print(table_of(rows))


if __name__ == "__main__":
    main()
