"""What a plan that knows the schedule is worth: its error against a plan that does not, at the same cost of a picture.

`python -m benchmarks.schedules [--model demo,things] [--cuts 10%,20%,30%]` prints a Markdown table. Both plans are of
the same statistics and sensitivities. One is for a budget of a picture's multiply-adds by the schedule; the other for a
budget of a sample's, the largest model whose picture costs no more than the first one's. With `--runtime`, both are of
measured latencies there, one thread: a picture's by the schedule against a call's with guidance. `--cuts` are then
shares of a picture's time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.things import world
from exporters.graphs.pipeline import example_call
from exporters.latency.steps import measure_picture
from exporters.latency.table import measure_latency
from exporters.machine import machine_name
from exporters.settings import TableSettings
from slimdiff import embedded
from slimdiff.budget import Budget
from slimdiff.compression import Compressor
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.trajectory import sample_batch, with_denoiser
from slimdiff.errors import InputError
from slimdiff.fidelity import image_fidelity
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.plan import Plan
from slimdiff.planning.costs import CostTable
from slimdiff.progress import bar
from slimdiff.schedule import Schedule, ScheduleSettings, levels_of
from slimdiff.settings import TRANSFORMER_GROUPS, CalibrationSettings, PlanSettings, Sampling

STEPS, SEED = 20, 60_000
HALVINGS = 12
"""Of the budget of the plan that does not know the schedule, until it costs the same."""
MOST_OF_A_CALL = 0.9
"""Of a call's time, the most that is tried to remove."""


def _things(count: int, seed: int, held: bool) -> list[str]:
    return world.captions(world.sample_scenes(count, seed, held=held))


def _shapes(count: int, seed: int, held: bool) -> list[str]:
    return embedded.captions(count, seed, held_out=held)


MODELS: dict[str, tuple[str, float, Callable[[int, int, bool], list[str]]]] = {
    "demo": ("demo", 5.0, _shapes),
    "things": (str(Path(__file__).parent / "things" / "model"), 4.0, _things),
}
"""Where a model lies, its guidance, and captions of its world: how many, which, and whether training had none."""


class Bench:
    """A dense model on its way to slim ones, and the pictures that they are compared on."""

    def __init__(
        self,
        name: str,
        asked: ScheduleSettings,
        samples: int,
        images: int,
        groups: tuple[str, ...],
        runtime: str | None = None,
    ) -> None:
        model, guidance, captions = MODELS[name]
        self.pipeline: Any = load_pipeline(model, "fp32")
        self.schedule = asked.make(levels_of(self.pipeline.unet.config) or 1, STEPS)
        sampling = Sampling(steps=STEPS, guidance=guidance, batch=8)
        settings = (CalibrationSettings(samples=samples, sampling=sampling), PlanSettings(groups=groups))
        prompts = captions(samples + 8, 1, False)
        self.blind = Compressor(self.pipeline, prompts, *settings)
        self.aware = Compressor(self.pipeline, prompts, *settings, schedule=self.schedule)
        self.aware.statistics = self.blind.statistics
        self.blind.measure()  # what both plan by
        self.in_ms = runtime is not None
        if runtime is not None:
            self._measure_latencies(TableSettings(runtime=runtime, threads=1), settings[1])
        self.prompts, self.sampling = captions(images, 2, True), sampling.model_copy(update={"seed": SEED})
        self.full = self._latents(self.pipeline.unet, None)
        self.dense = self._latents(self.pipeline.unet, self.schedule)

    def _measure_latencies(self, table: TableSettings, planning: PlanSettings) -> None:
        """Of a call with guidance for the plan that does not know the schedule, and of a picture for the other."""
        picture: Any = self.aware.picture
        sampling = self.aware.calibration.sampling
        self.aware.planner.costs.latency = measure_picture(self.aware.pipeline, picture, sampling, planning, table)
        call = example_call(self.pipeline, guidance=sampling.guidance)
        self.blind.planner.costs.latency = measure_latency(self.blind.denoiser, call, planning, table)

    def table(self) -> CostTable:
        """What a picture costs by the schedule."""
        costs = self.aware.planner.costs
        table = costs.latency if self.in_ms else costs.work
        assert table is not None
        return table

    def plans(self, cut: str) -> tuple[Plan, Plan]:
        """The one that knows the schedule, and the one that does not, whose picture costs no more."""
        if self.in_ms:
            aware = self.aware.plan(Budget(speedup=1 / (1 - float(cut.rstrip("%")) / 100)))
            return aware, at_cost(self._blind_in_ms, 0.0, MOST_OF_A_CALL, self.table(), _cost(self.table(), aware))
        aware = self.aware.plan(Budget(macs=cut))
        macs: Any = self.blind.planner.costs.macs
        return aware, at_cost(self._blind_in_macs, 0.0, macs.dense, self.table(), _cost(self.table(), aware))

    def _blind_in_macs(self, removed: float) -> Plan:
        return self.blind.plan(Budget(macs=str(int(removed))))

    def _blind_in_ms(self, share: float) -> Plan:
        return self.blind.plan(Budget(speedup=1 / (1 - share)))

    def _latents(self, unet: Any, schedule: Schedule | None) -> torch.Tensor:
        pipeline, batch = with_denoiser(self.pipeline, unet), self.sampling.batch
        pipeline = pipeline if schedule is None else schedule_pipeline(pipeline, schedule)
        every = range(len(self.prompts))
        batches = [every[start : start + batch] for start in every[::batch]]
        found: list[Any] = [sample_batch(pipeline, self.prompts, numbers, self.sampling) for numbers in batches]
        return torch.cat([torch.as_tensor(one) for one in found])

    def psnr_db(self, latents: torch.Tensor) -> float:
        """Of the pictures of these latents, to the dense model's at full schedule."""
        pictures = [self._decoded(one) for one in (self.full, latents)]
        return float(image_fidelity(*pictures)["psnr_db"] or torch.inf)

    @torch.no_grad()
    def _decoded(self, latents: torch.Tensor) -> list[Any]:
        vae = self.pipeline.vae
        return self.pipeline.image_processor.postprocess(vae.decode(latents / vae.config.scaling_factor)[0])

    def measure(self, plan: Plan) -> dict[str, float]:
        """Of the slim model: `noise_error` of a call, `latents` against the dense model's by the same schedule, and
        `psnr_db` against its pictures at full schedule."""
        slim = self.blind.slim(plan)
        latents = self._latents(slim, self.schedule)
        return {
            "noise_error": self.blind.held_error.of(slim),
            "latents": float((latents - self.dense).square().sum() / self.dense.square().sum()),
            "psnr_db": self.psnr_db(latents),
        }


def at_cost(make: Callable[[float], Plan], low: float, high: float, table: CostTable, most: float) -> Plan:
    """The plan that removes least, of those whose picture costs at most so much.

    Args:
        make: the plan that removes an amount between `low` and `high`.
    """
    best: Plan | None = None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            plan = make(middle)
        except InputError:  # more than can go
            high = middle
            continue
        if _cost(table, plan) <= most:
            best, high = plan, middle
        else:
            low = middle
    assert best is not None
    return best


def _cost(table: CostTable, plan: Plan) -> float:
    return table.of({path: rank for path, rank in plan.ranks().items() if path in table.layers})


def rows_of(name: str, bench: Bench, cuts: Sequence[str]) -> list[dict[str, Any]]:
    """Both plans' rows at each cut."""
    table = bench.table()
    rows = [{"model": name, "cut": "dense", "plan": "", "picture": 1.0, "sample": 1.0}]
    rows[0] |= {"noise_error": 0.0, "latents": 0.0, "psnr_db": bench.psnr_db(bench.dense)}
    for cut in bar(cuts, f"plans of {name}", "cut"):
        aware, blind = bench.plans(cut)
        for what, plan in (("knows the schedule", aware), ("does not", blind)):
            macs = plan.costs["macs"]
            shares = {"picture": _cost(table, plan) / table.dense, "sample": macs["slim"] / macs["dense"]}
            rows.append({"model": name, "cut": cut, "plan": what, **shares, **bench.measure(plan)})
    return rows


def table_of(rows: Sequence[dict[str, Any]], unit: str = "MACs") -> str:
    lines = [
        f"| model | cut of a picture's {unit} | plan | {unit} of a picture by the schedule | MACs of a sample "
        "| noise error | final latents | PSNR to dense at full schedule |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        shares = " | ".join(f"{row[key]:.1%}" for key in ("picture", "sample"))
        errors = " | ".join(f"{row[key]:.2e}" for key in ("noise_error", "latents"))
        lines.append(
            f"| {row['model']} | {row['cut']} | {row['plan']} | {shares} | {errors} | {row['psnr_db']:.2f} dB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo,things", help="(default: %(default)s)")
    parser.add_argument("--cuts", default="10%,20%,30%", help="of a picture's MACs")
    parser.add_argument("--guidance-interval", default="0:0.5", help="(default: %(default)s)")
    parser.add_argument("--deep-every", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--depth", help="up block whose input is reused (default: the last)")
    parser.add_argument("--samples", type=int, default=32, help="of the calibration (default: %(default)s)")
    parser.add_argument("--images", type=int, default=32, help="that are compared (default: %(default)s)")
    parser.add_argument("--runtime", help="in which latencies count (default: multiply-adds do)")
    parser.add_argument("--groups", default=",".join(TRANSFORMER_GROUPS), help="(default: %(default)s)")
    args = parser.parse_args()
    asked = ScheduleSettings(guidance_interval=args.guidance_interval, deep_every=args.deep_every, depth=args.depth)
    rows: list[dict[str, Any]] = []
    for name in args.model.split(","):
        bench = Bench(name, asked, args.samples, args.images, tuple(args.groups.split(",")), args.runtime)
        rows += rows_of(name, bench, args.cuts.split(","))
    print(table_of(rows, f"time in {args.runtime}" if args.runtime else "MACs"))
    print(f"\n{bench.schedule}; {args.samples} prompts, {args.images} images; {machine_name()}")


if __name__ == "__main__":
    main()
