"""Statistics, planning and slimming at full size: the UNets of SD 1.5, SD 2.1 and SDXL with random weights.

`python -m benchmarks.full_size [--model sd15,sd21,sdxl] [--dtype float32]` prints a Markdown table of time and memory.
Random weights say nothing of quality. Sensitivities are set to 1, for measuring them takes a part of a forward pass per
site and call; `--sensitivities` measures them all on two calls. Projections are not solved again, which takes two
forward passes per call.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from exporters.machine import machine_name, peak_memory
from slimdiff import Budget, PlanSettings, Statistics, slim_denoiser
from slimdiff.calibration.calibrate import calibrate_on_calls
from slimdiff.calibration.observer import Observer
from slimdiff.calibration.turns import split_into_turns
from slimdiff.denoising.torch_state import own_threads
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.groups import GROUPS, find_sites
from slimdiff.planning.costs import count_bytes, count_parameters
from slimdiff.planning.planner import Planner, chosen_sites
from slimdiff.planning.sensitivity import PORTION, measure_sensitivities
from slimdiff.settings import Forms, StatisticsSettings
from slimdiff.slimming.slim import factorise

PLANNED_CALLS = 64 * 20
"""The calibration that the share of tokens is taken from: 64 prompts in 20 steps, one guided image per call."""


@dataclass(frozen=True)
class Model:
    """A public configuration, what its calls look like, and what is to go out of it."""

    config: dict[str, Any]
    parameters: int
    latents: int
    text: int
    budget: str
    batch: int = 2
    conditions: dict[str, tuple[int, ...]] = field(default_factory=dict)


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
MODELS = {
    "sd15": Model({"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964, 64, 768, "100M"),
    "sd21": Model(
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        865_910_724,
        64,
        1024,
        "100M",
    ),
    "sdxl": Model(XL, 2_567_463_684, 64, 2048, "25%", 1, {"text_embeds": (1280,), "time_ids": (6,)}),
    "tiny": Model(TINY, 792_964, 8, 32, "10%"),
}
LATENTS = {"sdxl": 128}
"""Height and width of the latents, where they are not the model's in `MODELS`: SDXL's own images have 1024 pixels."""


def random_calls(model: Model, count: int) -> list[Call]:
    """Calls of the right shapes, with noise for latents and texts, from a late timestep to an early one."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(model.batch, *shape, generator=generator)

    calls = []
    for step in range(count):
        timestep = 1 + 999 * (count - step) // (count + 1)
        arguments: dict[str, Any] = {
            "sample": noise(4, model.latents, model.latents),
            "timestep": torch.tensor(timestep),
            "encoder_hidden_states": noise(77, model.text),
        }
        if model.conditions:
            arguments["added_cond_kwargs"] = {name: noise(*shape) for name, shape in model.conditions.items()}
        calls.append(Call(step, timestep, arguments))
    return calls


@dataclass
class Clock:
    """Seconds of wall clock and of processor time, which other processes disturb less."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Clock:
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def overhead(denoiser: nn.Module, calls: list[Call], settings: StatisticsSettings, pairs: int) -> dict[str, float]:
    """Plain seconds per call, and the share of processor time that collecting adds, from calls in turn."""
    groups = split_into_turns(find_sites(denoiser)[0], settings)
    plain, shares = [], []
    for number, group in enumerate(groups):
        calls_like_it = PLANNED_CALLS / len(groups)
        observer = Observer(Statistics(""), settings.tokens_per_dimension, lambda _time: 1.0, calls_like_it)
        with observer.watching(denoiser, group):  # allocates the moments, which is done once in a calibration
            predict(denoiser, calls[number])
        for pair in range(pairs):
            call = calls[pair % len(calls)]
            with Clock() as without:
                predict(denoiser, call)
            with observer.watching(denoiser, group), Clock() as watched:
                predict(denoiser, call)
            plain.append(without.wall)
            shares.append(watched.cpu / without.cpu - 1)
    return {"plain": median(plain), "overhead": median(shares), "turns": len(groups)}


def peak_bytes(reset: bool = False) -> int:
    """Peak resident memory since the last reset, or of the process where the system cannot tell."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(name: str, dtype: torch.dtype = torch.float32, pairs: int = 2, sensitivities: bool = False) -> dict:
    """One model's row, in this process."""
    model = MODELS[name]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        denoiser = UNet2DConditionModel(**model.config).eval()
    finally:
        torch.set_default_dtype(before)
    if count_parameters(denoiser) != model.parameters:
        raise RuntimeError(f"{name} has {count_parameters(denoiser):,} parameters, not {model.parameters:,}")
    weights = count_bytes(denoiser)
    settings = StatisticsSettings()
    sites, _ = find_sites(denoiser)
    groups = split_into_turns(sites, settings)
    calls = random_calls(model, max(2, len(groups)))
    row: dict[str, Any] = {"model": name, "dtype": str(dtype).removeprefix("torch."), "parameters": model.parameters}
    row |= {"weights": weights, "sites": len(sites), "latents": model.latents, "batch": model.batch}
    row |= overhead(denoiser, calls, settings, pairs)
    row["at_a_time"] = max(sum(GROUPS[site.group].moment_bytes(site) for site in group) for group in groups)
    row["statistics"] = sum(GROUPS[site.group].moment_bytes(site) for site in sites)
    statistics = calibrate_on_calls(denoiser, calls, settings)
    row["peak_collecting"] = peak_bytes() / weights
    peak_bytes(reset=True)
    statistics.sensitivities = {site.name: 1.0 for site in sites}
    planning = PlanSettings(forms=Forms().local())
    clocks: dict[str, Clock] = {}
    with clocks.setdefault("factorise", Clock()):
        chosen = chosen_sites(sites, planning)
        factors = factorise(denoiser, statistics, chosen, planning.forms)
    if sensitivities:
        few, row["sensitivity_sites"] = calls[:PORTION], len(chosen)
        with clocks.setdefault("sensitivity", Clock()):
            measured = measure_sensitivities(denoiser, statistics, chosen, factors, few, forms=planning.forms)
        statistics.sensitivities = measured
    budget = Budget(model.budget)
    with clocks.setdefault("knapsack", Clock()):
        planner = Planner(denoiser, statistics, planning)
        planner.factors = factors
        plan = planner.plan(budget)
    with clocks.setdefault("slim", Clock()):
        slim = slim_denoiser(denoiser, statistics, plan, factors, release_dense=True)
    row |= {step: clock.wall for step, clock in clocks.items()}
    row["cpu"] = {step: clock.cpu for step, clock in clocks.items()}
    row["peak_slimming"] = peak_bytes() / weights
    wanted = budget.removed(model.parameters)
    row["budget"] = model.budget
    row["over"] = (model.parameters - count_parameters(slim) - wanted) / wanted
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| UNet | parameters | weights | a call | statistics add | statistics in memory (in all) | peak, collecting "
        "| budget | factorise | knapsack | slim | together | peak, slimming | budget exceeded by |",
        "| --- | " + "--- | " * 13,
    ]
    for r in rows:
        together = r["factorise"] + r["knapsack"] + r["slim"]
        lines.append(
            f"| {r['model']}, {r['dtype']} | {r['parameters'] / 1e6:,.1f} M | {r['weights'] / 2**30:.2f} GiB "
            f"| {r['plain']:.2f} s | {100 * r['overhead']:+.1f} % "
            f"| {r['at_a_time'] / 2**30:.2f} GiB ({r['statistics'] / 2**30:.2f}) | {r['peak_collecting']:.2f}x "
            f"| -{r['budget']} | {r['factorise']:.0f} s | {r['knapsack']:.0f} s | {r['slim']:.0f} s | {together:.0f} s "
            f"| {r['peak_slimming']:.2f}x | {100 * r['over']:.2f} % |"
        )
    lines.append("")
    for r in rows:
        lines.append(
            f"{r['model']}: calls of batch {r['batch']} at {r['latents']}x{r['latents']} latents; {r['sites']} sites, "
            f"in {r['turns']} turns; sensitivities {'measured' if 'sensitivity' in r else 'set to 1'}, projections not "
            "solved again."
        )
        if "sensitivity" in r:
            most = PlanSettings().fitting_calls
            lines.append(
                f"Sensitivities of {r['sensitivity_sites']} sites take {r['sensitivity'] / 60:.1f} min for {PORTION} "
                f"calls, and plans need {2 * PORTION} or more. "
                f"Solving projections again takes {2 * r['plain'] * most / 60:.0f} min on {most} calls."
            )
    return "\n".join([*lines, f"{machine_name()}; {own_threads()} threads; torch {torch.__version__}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15,sd21,sdxl", help=f"of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    parser.add_argument("--pairs", type=int, default=2, help="of plain and watched calls (default: %(default)s)")
    parser.add_argument("--sensitivities", action="store_true", help="measure sensitivities, too")
    parser.add_argument("--row", action="store_true", help="measure one model here and print its row as JSON")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.model, getattr(torch, args.dtype), args.pairs, args.sensitivities)))
        return
    rows = []
    for name in args.model.split(","):
        # A process of its own, for its peak memory.
        command = [sys.executable, "-m", "benchmarks.full_size", "--row", "--model", name]
        command += ["--dtype", args.dtype, "--pairs", str(args.pairs)] + ["--sensitivities"] * args.sensitivities
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
    print(table(rows))


if __name__ == "__main__":
    main()
