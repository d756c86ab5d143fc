"""Caption accuracy on combinations never trained: `python -m benchmarks.things.evaluate MODEL --judge FILE`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

from benchmarks.things import flux_models, models, world
from benchmarks.things import judge as judges

STEPS = 25
GUIDANCE = 4.0
SEED = 7  # of the scenes, and of the noise


@torch.no_grad()
def sample(unet: Any, vae: Any, states: Tensor, empty: Tensor, noise: Tensor, *, steps: int, guidance: float) -> Tensor:
    """Pictures by DDIM, as StableDiffusionPipeline makes them.

    Args:
        states: the captions' hidden states `[B, 40, 160]`; `empty` those of the empty caption `[1, 40, 160]`.
        noise: `[B, 4, 16, 16]`.

    Returns:
        float32 `[B, 3, 64, 64]` in [-1, 1].
    """
    scheduler = DDIMScheduler(**models.SCHEDULER)
    scheduler.set_timesteps(steps, device=noise.device)
    latents, both = noise, torch.cat([empty.expand(len(states), -1, -1), states])
    for t in scheduler.timesteps:
        out = unet(torch.cat([latents, latents]), t.expand(2 * len(latents)), both, return_dict=False)[0].float()
        without, told = out.chunk(2)
        latents = scheduler.step(without + guidance * (told - without), t, latents).prev_sample
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].float().clamp(-1, 1)


def noise_for(count: int, first: int) -> Tensor:
    """Noise of pictures `first` to `first + count`, each of its own seed, the same on every machine."""
    side = world.IMAGE_SIZE // 4
    seeds = range(SEED + 1_000_000 + first, SEED + 1_000_000 + first + count)
    return torch.stack([torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def measure(
    draw: Callable[[Tensor, Tensor], Tensor], judge: judges.Judge, count: int, *, batch: int, seconds: float = 1e9,
    names: int = len(world.NAMES),
) -> dict:  # fmt: skip
    """Accuracy over `count` held-out scenes, or as many as the time allows; `draw` takes scenes and noise."""
    device = next(judge.parameters()).device
    scenes = world.sample_scenes(count, SEED, held=True, names=names)
    hits: list[dict[str, Tensor]] = []
    began, done = time.time(), 0
    while done < count and (not hits or time.time() - began < seconds):
        some = scenes[done : done + batch].to(device)
        hits.append(judges.attribute_hits(judge, draw(some, noise_for(len(some), done).to(device)), some))
        done += len(some)
    return {"pictures": done, "seconds": round(time.time() - began, 1), **judges.accuracy(hits)}


def save_grid(pictures: Tensor, path: Path, columns: int = 8, enlarge: int = 3) -> None:
    """Write pictures side by side as one PNG, in one step."""
    pictures = pictures[: len(pictures) // columns * columns] if len(pictures) >= columns else pictures
    columns = min(columns, len(pictures))
    count, _, height, width = pictures.shape
    tiles = ((pictures.cpu() + 1) * 127.5).round().byte().reshape(-1, columns, 3, height, width)
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3).numpy()
    image = Image.fromarray(np.ascontiguousarray(sheet))
    partial = path.with_suffix(".partial")
    image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST).save(partial, format="PNG")
    partial.rename(path)


def painter(model: Path, device: str, *, steps: int, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes pictures `[B, 3, 64, 64]` of scenes and noise with a saved pipeline, the UNet's or Flux's."""
    # The files are fp16, and transformers would leave the text encoders so.
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32).to(device)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()

    def ids(tokenizer: Any, scenes: Tensor) -> Tensor:
        return models.tokenize(tokenizer, [*world.captions(scenes), ""]).to(device)

    @torch.no_grad()
    def by_unet(scenes: Tensor, noise: Tensor) -> Tensor:
        states = pipeline.text_encoder(ids(pipeline.tokenizer, scenes))[0]
        return sample(pipeline.unet, pipeline.vae, states[:-1], states[-1:], noise, steps=steps, guidance=guidance)

    @torch.no_grad()
    def by_flux(scenes: Tensor, noise: Tensor) -> Tensor:
        states = pipeline.text_encoder_2(ids(pipeline.tokenizer_2, scenes))[0]
        pooled = pipeline.text_encoder(ids(pipeline.tokenizer, scenes)).pooler_output
        made = flux_models.sample(
            pipeline.transformer, pipeline.vae, (states, pooled), noise, steps=steps, guidance=guidance
        )
        return made

    return by_flux if hasattr(pipeline, "transformer") else by_unet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the pipeline's folder")
    parser.add_argument("--judge", type=Path, help="the judge's weights (default: judge.safetensors beside the model)")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grid", type=Path, help="also write the first pictures as a PNG")
    arguments = parser.parse_args()
    weights = arguments.judge or arguments.model.parent / "judge.safetensors"
    for path in (arguments.model / "model_index.json", weights):
        if not path.exists():
            print(f"error: {path} is missing; train the model with python -m benchmarks.things.train", file=sys.stderr)
            return 2
    judge = judges.load(weights).to(arguments.device)
    kept: list[Tensor] = []
    paint = painter(arguments.model, arguments.device, steps=arguments.steps, guidance=arguments.guidance)

    def draw(scenes: Tensor, noise: Tensor) -> Tensor:
        kept.append(paint(scenes, noise))
        return kept[-1]

    report = measure(draw, judge, arguments.count, batch=arguments.batch)
    if arguments.grid:
        save_grid(torch.cat(kept)[:48], arguments.grid)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
