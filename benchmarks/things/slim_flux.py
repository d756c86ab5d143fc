"""What slimming the small Flux costs: `python -m benchmarks.things.slim_flux [--cuts 10,20,30]`.

Each row takes a share of the transformer's parameters: by all groups under one knapsack, by each group alone, at the
same share of every site, and by the magnitude of weights at those ranks. `depth` takes one block or more whole, those
whose absence changes least, keeps the mean of what each added, and takes the rest by the knapsack; before it, what each
block and layer carries alone. The error is that of the predicted velocity on the dense model's trajectories, for
captions that calibration did not see. With `--pictures N` the judge also reads that many pictures of each model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import magnitude_pruning
from benchmarks.depth import Depth, blocks, leave_out
from benchmarks.things import evaluate, flux_models, judge, models, world
from slimdiff import Budget, CalibrationSettings, PlanSettings
from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.costs import count_parameters
from slimdiff.planning.planner import Planner
from slimdiff.settings import TRANSFORMER_GROUPS, Allocation, Forms, Sampling
from slimdiff.slimming.compensation import compensate, stages
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
    "depth": ("global", TRANSFORMER_GROUPS),
}
"""Allocation and groups of each row; `magnitude` takes the ranks of `uniform`."""
MOST_BLOCKS = 3
"""That `depth` takes."""


def captions(count: int, seed: int, *, held: bool) -> list[str]:
    return world.captions(world.sample_scenes(count, seed, held=held))


class Bench:
    """The dense pipeline, what calibration saw of it, and the calls that slim models are compared on."""

    def __init__(self, prompts: int) -> None:
        self.pipeline = in_float32(load_pipeline(str(FLUX)))
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

    def planner(self, method: str) -> Planner:
        allocation, groups = METHODS[method]
        settings = PlanSettings(allocation=allocation, groups=groups, **CALLS)
        planner = Planner(self.dense, self.statistics, settings, calls=self.recorded)
        planner.factors = self.factors
        if allocation == "global":
            planner.remember(self.statistics)
        return planner

    def make(self, method: str, percent: float) -> Iterator[tuple[dict[str, Any], nn.Module]]:
        """What is to be said of each slim transformer, and it; none where the groups have less than that."""
        planner, wanted = self.planner(method), round(percent / 100 * count_parameters(self.dense))
        if method == "depth":
            for count in range(1, MOST_BLOCKS + 1):
                gone = self.order[:count]
                saved = sum(self.saved(path) for path in gone)
                planner.chosen = [site for site in planner.chosen if not _lies_in(site.path, gone)]
                planner.layers = [layer for layer in planner.layers if not _lies_in(layer.path, gone)]
                if 0 < wanted - saved <= _removable(planner):
                    slim = self.without(planner, gone, wanted - saved)
                    yield {"without": gone, "parameters": count_parameters(slim) - saved}, slim
        elif wanted <= _removable(planner):
            plan = planner.plan(Budget(wanted))
            slim = magnitude_pruning(self.dense, plan) if method == "magnitude" else planner.slim(plan)
            yield {"parameters": count_parameters(slim)}, slim

    @cached_property
    def depth(self) -> Depth:
        """By the calls that sensitivities are measured on."""
        return Depth(self.dense, self.recorded.fitting, self.recorded.sensitivity)

    @cached_property
    def order(self) -> list[str]:
        """Blocks in the order in which they go."""
        return self.depth.least(MOST_BLOCKS, blocks(self.dense))

    def saved(self, path: str) -> int:
        """Parameters that go with a block, less its biases."""
        kept = sum(stream.mean.numel() for stream in self.depth.changes[path])
        return count_parameters(self.dense.get_submodule(path)) - kept

    def without(self, planner: Planner, gone: Sequence[str], wanted: int) -> nn.Module:
        """Without blocks, and with ranks of the planner's sites by which so many parameters go beside them."""
        plan = planner.plan(Budget(wanted))
        local = plan.model_copy(update={"forms": Forms(compensate="none")})
        slim = planner.slim(local)
        for path in gone:
            leave_out(slim.get_submodule(path), self.depth.changes[path])
        # The last projection is solved for what it receives without the blocks.
        calls = self.recorded.fitting
        mended = stages(self.dense, plan, calls)
        compensate(slim, mended, planner.dense_outputs(tuple(layer for stage in mended for layer in stage)), calls)
        return slim

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


def _removable(planner: Planner) -> int:
    return sum(site.cost * (site.dense_rank - 8) for site in planner.chosen)


def _lies_in(path: str, paths: Sequence[str]) -> bool:
    return any(f"{path}.".startswith(f"{block}.") for block in paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", default="10,20,30", help="percent of the transformer's parameters")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--prompts", type=int, default=16, help="captions of the calibration")
    parser.add_argument("--pictures", type=int, default=0, help="how many the judge reads of each model")
    arguments = parser.parse_args()
    bench = Bench(arguments.prompts)
    dense, most = count_parameters(bench.dense), _removable(bench.planner("uniform"))
    row: dict[str, Any] = {"parameters": dense, "percent by ranks at most": round(100 * most / dense, 1)}
    print(json.dumps(row | {"calls": len(bench.calls)}), flush=True)
    methods = arguments.methods.split(",")
    if "depth" in methods:
        with_mean, without = bench.depth.alone(), bench.depth.alone(mean=False)
        for path, error in without.items():
            found = {"error": float(f"{error:.2e}"), "mean kept": float(f"{with_mean[path]:.2e}")}
            print(json.dumps({"left out": path, **found}), flush=True)
    for percent in map(float, arguments.cuts.split(",")):
        for method in methods:
            for said, slim in bench.make(method, percent):
                row = {"cut": percent, "method": method, **said, "error": float(f"{bench.error(slim):.2e}")}
                if arguments.pictures:
                    row["concepts"] = bench.concepts(slim, arguments.pictures)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
