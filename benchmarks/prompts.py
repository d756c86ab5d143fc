"""How many calibration prompts it takes, and whether selecting them pays: noise-prediction error by their number.

`python -m benchmarks.prompts [--counts 4,16,64,256,500] [--seeds 3] [--steps 10]`. The ranks are fixed once, by a plan
from 256 other captions, so that nothing but the statistics varies. Prompts come out of a pool of 2,000 captions of the
embedded model's world, by `slimdiff.prompts.selection` and at random. Rows in `runs/bench` are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics as summary
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import benchmarks
import slimdiff
from benchmarks.embedded.card import transformer_parameters
from benchmarks.quality.bench import CALIBRATION, ERROR_SAMPLING
from deploy.artifacts.hashes import source_hash
from exporters.machine import machine_name
from slimdiff import Budget, CalibrationSettings, PlanSettings, Statistics, embedded, make_plan, slim_denoiser
from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.trajectory import record_calls
from slimdiff.fidelity import HeldError
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.prompts.selection import embed, select
from slimdiff.settings import Forms
from slimdiff.storage import manifest

CUT = 0.25
POOL, PLANNED_ON = 2000, 256
SELECTED, RANDOM = "selected", "random"


class Bench:
    """The dense model, the pool, the ranks, and the calls that errors are measured on."""

    def __init__(self, steps: int) -> None:
        self.sampling = CALIBRATION.sampling.model_copy(update={"steps": steps})
        self.pipeline = load_pipeline("demo")
        self.unet = self.pipeline.unet
        self.pool = list(dict.fromkeys(embedded.captions(POOL, 3)))
        self.embeddings = embed(self.pipeline, self.pool)
        held = record_calls(self.pipeline, embedded.captions(32, 2, held_out=True), ERROR_SAMPLING, every=4)
        self.held_error = HeldError(self.unet, held)
        prompts = embedded.captions(PLANNED_ON, 4)
        self.plan = make_plan(
            self.unet,
            self.calibrated(prompts, 0),
            Budget(round(CUT * transformer_parameters(self.unet))),
            PlanSettings(forms=Forms().local()),  # what is fitted afterwards takes calls, not statistics
            calls=Calls(
                self.pipeline,
                prompts,
                CalibrationSettings(sampling=self.sampling.model_copy(update={"batch": 2})),
            ),
        )

    def calibrated(self, prompts: Sequence[str], first: int) -> Statistics:
        """Statistics of prompts whose noise is that of places `first`, `first + 1`, ... of a longer list."""
        sampling = self.sampling.model_copy(update={"seed": self.sampling.seed + first})
        settings = CalibrationSettings(samples=len(prompts), sampling=sampling, tokens_per_dimension=None)
        return calibrate(self.pipeline, prompts, settings)

    def error(self, statistics: Statistics) -> float:
        return self.held_error.of(slim_denoiser(self.unet, statistics, self.plan))

    def along(self, order: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Errors with the first `count` prompts of an order of the pool: statistics are sums, so they only grow."""
        whole: Statistics | None = None
        for start, stop in zip([0, *counts[:-1]], counts, strict=True):
            part = self.calibrated([self.pool[i] for i in order[start:stop]], start)
            whole = part if whole is None else whole.merge(part)
            yield stop, self.error(whole)


def table(rows: dict[str, float], counts: Sequence[int], seeds: int) -> str:
    lines = [
        f"| calibration prompts | selected | random, mean of {seeds} | random, least to most | selected / random |",
        "| --- " * 5 + "|",
    ]
    for count in counts:
        chosen, picks = rows[f"{SELECTED} {count}"], [rows[f"{RANDOM} {seed} {count}"] for seed in range(seeds)]
        mean, spread = summary.mean(picks), f"{min(picks):.2e} to {max(picks):.2e}"
        lines.append(f"| {count} | {chosen:.2e} | {mean:.2e} | {spread} | {chosen / mean:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="4,16,64,256,500", help="numbers of prompts")
    parser.add_argument("--seeds", type=int, default=3, help="random picks of each number")
    parser.add_argument("--steps", type=int, default=10, help="scheduler steps of each calibration image")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    counts = sorted({int(c) for c in arguments.counts.split(",")})
    bench = Bench(arguments.steps)
    settings = {
        "model": bench.plan.model_hash,
        "code": [source_hash(Path(module.__path__[0])) for module in (slimdiff, benchmarks)],
        "calibration": bench.sampling.model_dump(),
        "pool": manifest.fingerprint(bench.pool),
        "plan": manifest.fingerprint(bench.plan.ranks()),
    }
    file = arguments.out / manifest.fingerprint(settings)[:12] / "prompts.json"
    rows: dict[str, float] = json.loads(file.read_text())["rows"] if file.is_file() else {}

    def keep(name: str, error: float) -> None:
        rows[name] = error
        manifest.write_json(file, {"settings": settings, "machine": machine_name(), "rows": rows})

    picks: dict[str, list[int]] = {SELECTED: select(bench.embeddings, counts[-1])}
    for seed in range(arguments.seeds):
        shuffled = torch.randperm(len(bench.pool), generator=torch.Generator().manual_seed(seed))
        picks[f"{RANDOM} {seed}"] = shuffled.tolist()
    for name, order in picks.items():
        if any(f"{name} {count}" not in rows for count in counts):
            for count, error in bench.along(order, counts):
                keep(f"{name} {count}", error)
    print(table(rows, counts, arguments.seeds))
    print(
        f"\nNoise-prediction error on held-out calls at {CUT:.0%} fewer transformer-block parameters; "
        f"{arguments.steps} steps an image; ranks planned from {PLANNED_ON} other captions; picks out of "
        f"{len(bench.pool)} different captions. {machine_name()}; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
