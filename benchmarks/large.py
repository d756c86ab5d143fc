"""Slimming a transformer that is larger than memory: a random one of Flux's kind, its weights in their files.

`python -m benchmarks.large --work DIR` writes a random bf16 model of 6 B parameters, shard by shard, slims it, prints
a Markdown table of time and memory by step, and removes what it wrote. Every site is calibrated; of each group
`--sites` are slimmed, for each takes what the next one does. Random weights say nothing of quality.

`python -m benchmarks.large --paper` computes from the public configurations of Flux.1 and Qwen-Image what slimming them
holds and reads; no weights are needed.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from exporters.machine import machine_name, peak_memory
from slimdiff.calibration.calibrate import calibrate_on_calls, weights_hash
from slimdiff.calibration.turns import split_into_turns
from slimdiff.denoising.precision import cast
from slimdiff.denoising.torch_state import own_threads
from slimdiff.denoising.trajectory import Call
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Site
from slimdiff.loading.pipelines import load_denoiser
from slimdiff.plan import Plan, site_plan
from slimdiff.planning.costs import count_parameters
from slimdiff.settings import CalibrationSettings, Forms, StatisticsSettings
from slimdiff.slimming.offloaded import slim_offloaded
from slimdiff.slimming.slim import Factors, factorise
from slimdiff.storage.manifest import replacing, write_json
from slimdiff.storage.tensors import write_tensors

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "6b": {"num_layers": 66, "num_single_layers": 13, "num_attention_heads": 12, "attention_head_dim": 128},
    "tiny": {
        "num_layers": 2,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
}
"""Flux's blocks, fewer heads and more blocks: the work on a site grows with the cube of its width."""
TEXT = {"joint_attention_dim": 512, "pooled_projection_dim": 256, "guidance_embeds": True}
TOKENS, TEXT_TOKENS = 32, 16
KEPT = 0.75
"""Share of the rank that slim sites keep."""
PAPER = {"Flux.1": "FluxTransformer2DModel", "Qwen-Image": "QwenImageTransformer2DModel"}


def on_meta(kind: Any, **config: Any) -> nn.Module:
    with no_init_weights(), init_empty_weights():
        return kind(**config)


def write_model(folder: Path, config: dict[str, Any], shard: str) -> None:
    """A random model in bf16, shard by shard, in diffusers' layout."""
    model: Any = on_meta(diffusers.FluxTransformer2DModel, **config, **TEXT)
    like = {name: tensor.to("meta", torch.bfloat16) for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> Tensor:
        shape = like[name].shape
        if len(shape) == 1:
            return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
        weight = torch.empty(shape, dtype=torch.bfloat16)
        return weight.normal_(0, shape[-1] ** -0.5, generator=generator)

    model.save_config(folder)
    parts = split_torch_state_dict_into_shards(
        like, max_shard_size=shard, filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    for file, names in parts.filename_to_tensors.items():
        write_tensors(folder / file, {name: like[name] for name in names}, read)
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def random_calls(model: Any, count: int) -> list[Call]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Call(
            step,
            step / count,
            {
                "hidden_states": noise(1, TOKENS, model.config.in_channels),
                "encoder_hidden_states": noise(1, TEXT_TOKENS, TEXT["joint_attention_dim"]),
                "pooled_projections": noise(1, TEXT["pooled_projection_dim"]),
                "timestep": torch.tensor([(step + 1) / (count + 1)]),
                "guidance": torch.tensor([3.5]),
                "img_ids": torch.stack([torch.arange(TOKENS) * k for k in (0, 1, 1)], 1).float(),
                "txt_ids": torch.zeros(TEXT_TOKENS, 3),
            },
        )
        for step in range(count)
    ]


def plan_of(denoiser: nn.Module, model_hash: str, chosen: list[Site]) -> Plan:
    total = count_parameters(denoiser)
    sites, left_dense = find_sites(denoiser)
    ranks = {site.name: int(site.dense_rank * KEPT) // 8 * 8 for site in chosen}
    return Plan(
        model_class=type(denoiser).__name__,
        model_hash=model_hash,
        allocation="none",
        forms=Forms().local(),
        align=8,
        parameters={"dense": total, "slim": total},
        sites={s.name: site_plan(s, ranks.get(s.name, s.dense_rank)) for s in sites},
        left_dense=left_dense,
    ).recount()


def choose(sites: list[Site], most: int) -> list[Site]:
    """So many sites of each group at most, spread over the model, first and last among them."""
    picked: list[Site] = []
    for group in dict.fromkeys(site.group for site in sites):
        own = [site for site in sites if site.group == group]
        count = min(most, len(own))
        picked += [own[i * (len(own) - 1) // max(1, count - 1)] for i in range(count)]
    return picked


def measure(work: Path, shape: str, most: int, limit: float, shard: str) -> str:
    """The table of one run."""
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name], peaks[name] = time.perf_counter() - start, peak_memory() or 0
        print(f"{name}: {seconds[name]:.0f} s, peak {peaks[name] / GIB:.1f} GiB", flush=True)

    if not (work / "dense").exists():
        with step("write a random model"), replacing(work / "dense") as temporary:
            write_model(temporary, SHAPES[shape], shard)
    held = load_denoiser(work / "dense", offload=True)
    denoiser = cast(held, lambda _: torch.float32)
    sites, _ = find_sites(denoiser)
    settings = StatisticsSettings(memory_limit=limit)
    turns = len(split_into_turns(sites, settings))
    with step("hash the weights"):
        weights_hash(denoiser)
    with step(f"calibrate, {turns} calls"):
        statistics = calibrate_on_calls(denoiser, random_calls(held, turns), settings)
    chosen = choose(sites, most)
    plan = plan_of(denoiser, statistics.model_hash, chosen)
    factors: Factors = {}
    for group in dict.fromkeys(site.group for site in chosen):
        own = [site for site in chosen if site.group == group]
        widest = max(max(site.widths) for site in own)
        every = sum(site.group == group for site in sites)
        with step(f"factorise, {len(own)} of {every} sites of {group}, up to {widest} wide"):
            factors |= factorise(denoiser, statistics, own, plan.forms)
    with step("slim and write"):
        slim: Any = slim_offloaded(denoiser, statistics, plan, factors)
        slim.save_pretrained(work / "slim", max_shard_size=shard)
    with step("open the slim model"):
        opened = load_denoiser(work / "slim", offload=True)
    assert count_parameters(opened) == plan.parameters["slim"]
    size = sum(tensor.nbytes for tensor in held.parameters())
    moments = sum(GROUPS[site.group].moment_bytes(site) for site in sites)
    lines = ["| step | seconds | peak resident so far |", "| --- | --- | --- |"]
    lines += [f"| {name} | {taken:.0f} | {peaks[name] / GIB:.1f} GiB |" for name, taken in seconds.items()]
    lines += [
        "",
        f"{count_parameters(held) / 1e9:.2f} B parameters of bf16, {size / GIB:.1f} GiB; {2 * size / GIB:.1f} GiB in "
        f"float32, which is computed in. {len(sites)} sites, whose moments are {moments / GIB:.1f} GiB; {limit:g} GiB "
        f"at a time. {TOKENS} + {TEXT_TOKENS} tokens. Slim: {plan.parameters['slim'] / 1e9:.2f} B.",
        f"{machine_name()}; {own_threads()} threads; torch {torch.__version__}",
    ]
    return "\n".join(lines)


def on_paper(limit: float, speed: float) -> str:
    """What slimming published models holds and reads."""
    sampling = CalibrationSettings().sampling
    passes = -(-CalibrationSettings().samples // sampling.batch) * sampling.steps
    lines = [
        "| model | parameters | bf16 | float32 | largest layer, float32 | sites | widest moment | moments in all "
        f"| turns of {limit:g} GiB | read in a pass | at {speed:g} GB/s | {passes} passes |",
        "| --- | " + "--- | " * 11,
    ]
    for name, kind in PAPER.items():
        model = on_meta(getattr(diffusers, kind))
        count, sites = count_parameters(model), find_sites(model)[0]
        layer = max(sum(p.numel() for p in part.parameters(recurse=False)) for part in model.modules())
        moments = sum(GROUPS[site.group].moment_bytes(site) for site in sites)
        widest = max(max(site.widths) for site in sites)
        turns = len(split_into_turns(sites, StatisticsSettings(memory_limit=limit)))
        once = 2 * count / (speed * 1e9)
        lines.append(
            f"| {name} | {count / 1e9:.1f} B | {2 * count / GIB:.1f} GiB | {4 * count / GIB:.1f} GiB "
            f"| {4 * layer / GIB:.2f} GiB | {len(sites)} | {widest} (float64: {8 * widest**2 / GIB:.1f} GiB) "
            f"| {moments / GIB:.1f} GiB | {turns} | {2 * count / GIB:.1f} GiB | {once:.0f} s "
            f"| {passes * once / 3600:.1f} h |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("large"), help="a folder for what is written: two models")
    parser.add_argument("--keep", action="store_true", help="leave the models there; a dense one is used again")
    parser.add_argument("--shape", default="6b", choices=SHAPES, help="(default: %(default)s)")
    parser.add_argument("--sites", type=int, default=4, help="of a group that are slimmed (default: %(default)s)")
    parser.add_argument("--memory-limit", type=float, default=6.0, help="GiB of moments (default: %(default)s)")
    parser.add_argument("--shard", default="5GB", help="size of a file (default: %(default)s)")
    parser.add_argument("--paper", action="store_true", help="compute the figures of published models")
    parser.add_argument("--speed", type=float, default=3.0, help="GB/s that files are read at (default: %(default)s)")
    args = parser.parse_args()
    if args.paper:
        print(on_paper(args.memory_limit, args.speed))
        return
    try:
        print(measure(args.work, args.shape, args.sites, args.memory_limit, args.shard))
    finally:
        if not args.keep:
            for name in ("dense", "slim"):
                shutil.rmtree(args.work / name, ignore_errors=True)


if __name__ == "__main__":
    main()
