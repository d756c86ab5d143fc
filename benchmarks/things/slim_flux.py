"""What slimming the small Flux costs: `python -m benchmarks.things.slim_flux [--cuts 10,20,30]`.

Each row takes a share of the transformer's parameters: by all groups under one knapsack, by each group alone, at the
same share of every site, and by the magnitude of weights at those ranks. The error is that of the predicted velocity on
the dense model's trajectories, for captions that calibration did not see. With `--pictures N` the judge also reads that
many pictures of each model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import magnitude_pruning
from benchmarks.things import evaluate, flux_models, judge, models, world
from slimdiff import Budget, CalibrationSettings, PlanSettings
from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.costs import count_parameters
from slimdiff.planning.planner import Planner
from slimdiff.settings import TRANSFORMER_GROUPS, Allocation, Sampling
from slimdiff.slimming.slim import factorise

FLUX = Path(__file__).with_name("flux")
ARGUMENTS = {"negative_prompt": "", "true_cfg_scale": evaluate.GUIDANCE, "max_sequence_length": models.MAX_TOKENS}
SAMPLING = Sampling(steps=10, batch=8, seed=0, height=64, width=64, arguments=ARGUMENTS)
CALLS = {"sensitivity_calls": 4, "fitting_calls": 16}
METHODS: dict[str, tuple[Allocation, tuple[str, ...]]] = {
    "global": ("global", TRANSFORMER_GROUPS),
    "uniform": ("uniform", TRANSFORMER_GROUPS),
    "magnitude": ("uniform", TRANSFORMER_GROUPS),
    "feed_forward": ("global", ("feed_forward",)),
    "values": ("global", ("values",)),
}
"""Allocation and groups of each row; `magnitude` takes the ranks of `uniform`."""


def captions(count: int, seed: int, *, held: bool) -> list[str]:
    return world.captions(world.sample_scenes(count, seed, held=held))


class Bench:
    """The dense pipeline, what calibration saw of it, and the calls that slim models are compared on."""

    def __init__(self, prompts: int) -> None:
        self.pipeline = load_pipeline(str(FLUX))
        self.pipeline.set_progress_bar_config(disable=True)
        self.dense = self.pipeline.transformer
        settings = CalibrationSettings(samples=prompts, sampling=SAMPLING)
        # Calibration sees the first of them, and sensitivities are measured on the others.
        known = captions(prompts + SAMPLING.batch, 1, held=False)
        self.statistics = calibrate(self.pipeline, known, settings)
        self.recorded = Calls(self.pipeline, known, settings, PlanSettings(**CALLS))
        later = SAMPLING.model_copy(update={"seed": 50_000})
        self.calls = record_calls(self.pipeline, captions(8, 2, held=True), later, every=2)
        self.expected = {id(call): predict(self.dense, call) for call in self.calls}
        self.factors = factorise(self.dense, self.statistics, find_sites(self.dense)[0])

    def make(self, method: str, percent: float) -> nn.Module | None:
        """The slim transformer; None where the groups have less than that."""
        allocation, groups = METHODS[method]
        settings = PlanSettings(allocation=allocation, groups=groups, **CALLS)
        planner = Planner(self.dense, self.statistics, settings, calls=self.recorded)
        planner.factors = self.factors
        if allocation == "global":
            planner.remember(self.statistics)
        wanted = round(percent / 100 * count_parameters(self.dense))
        if wanted > sum(site.cost * (site.dense_rank - 8) for site in planner.chosen):
            return None
        plan = planner.plan(Budget(wanted))
        return magnitude_pruning(self.dense, plan) if method == "magnitude" else planner.slim(plan)

    def error(self, transformer: nn.Module) -> float:
        found = noise_error(lambda c: self.expected[id(c)], lambda c: predict(transformer, c), self.calls)
        return float(found["relative_mse"])

    def concepts(self, transformer: Any, pictures: int) -> float:
        """Share of things that the judge reads from pictures of held-out captions."""
        pipeline = self.pipeline

        @torch.no_grad()
        def draw(scenes: Tensor, noise: Tensor) -> Tensor:
            said = [*world.captions(scenes), ""]
            states = pipeline.text_encoder_2(models.tokenize(pipeline.tokenizer_2, said))[0]
            pooled = pipeline.text_encoder(models.tokenize(pipeline.tokenizer, said)).pooler_output
            options: Any = {"steps": SAMPLING.steps, "guidance": evaluate.GUIDANCE}
            return flux_models.sample(transformer, pipeline.vae, (states, pooled), noise, **options)

        reader = judge.load(Path(judge.__file__).with_name("judge.safetensors"))
        return float(evaluate.measure(draw, reader, pictures, batch=16)["concept"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", default="10,20,30", help="percent of the transformer's parameters")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--prompts", type=int, default=16, help="captions of the calibration")
    parser.add_argument("--pictures", type=int, default=0, help="how many the judge reads of each model")
    arguments = parser.parse_args()
    bench = Bench(arguments.prompts)
    print(json.dumps({"parameters": count_parameters(bench.dense), "calls": len(bench.calls)}), flush=True)
    for percent in map(float, arguments.cuts.split(",")):
        for method in arguments.methods.split(","):
            row: dict[str, Any] = {"cut": percent, "method": method}
            slim = bench.make(method, percent)
            if slim is not None:
                row |= {"parameters": count_parameters(slim), "error": float(f"{bench.error(slim):.2e}")}
                if arguments.pictures:
                    row["concepts"] = bench.concepts(slim, arguments.pictures)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
