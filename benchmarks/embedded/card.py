"""Measure the embedded model and write its card.

`python -m benchmarks.embedded.card [--model DIR] [--captions 500]`.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from slimdiff import embedded
from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.trajectory import predict, record_calls, sample_images
from slimdiff.embedded import evaluator, scenes
from slimdiff.fidelity import noise_error
from slimdiff.groups import find_sites
from slimdiff.plan import Plan, site_plan
from slimdiff.planning.costs import count_parameters
from slimdiff.settings import TRANSFORMER_GROUPS, CalibrationSettings, Sampling
from slimdiff.slimming.slim import factorise, slim_denoiser

EVALUATION = Sampling(steps=25, guidance=5.0, batch=10, seed=1_000_000)
EVALUATION_SCENES = 7
LEAST_EFFECT = 1e-5


def measure(pipeline: DiffusionPipeline, judge: evaluator.Evaluator, count: int) -> dict[str, Any]:
    """Every figure of the card."""
    told = scenes.sample_scenes(count, EVALUATION_SCENES, held_out=True)
    rendered = scenes.render(told, 1)
    real = evaluator.caption_accuracy(evaluator.attribute_hits(judge, rendered, told))
    images = sample_images(pipeline, [s.caption() for s in told], EVALUATION)
    pictures = evaluator.to_tensor(images)
    accuracy = evaluator.caption_accuracy(evaluator.attribute_hits(judge, pictures, told))
    return {
        "captions": count,
        "evaluator_on_rendered": real,
        "caption_accuracy": accuracy,
        "frechet_distance": evaluator.frechet_distance(judge, pictures, rendered),
        "parameters": {name: count_parameters(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")},
        "transformer_share": transformer_parameters(pipeline.unet) / count_parameters(pipeline.unet),
        "half_rank": half_rank_effects(pipeline),
    }


def transformer_parameters(unet: torch.nn.Module) -> int:
    """Parameters inside transformer blocks (without their input and output projections)."""
    return sum(p.numel() for name, p in unet.named_parameters() if ".transformer_blocks." in name)


def half_rank_effects(pipeline: DiffusionPipeline) -> dict[str, float]:
    """Relative mean squared change of the noise prediction when one transformer block alone goes to half rank."""
    prompts = embedded.captions(32, 11)
    sampling = Sampling(steps=20, batch=16, seed=5)
    statistics = calibrate(pipeline, prompts, CalibrationSettings(samples=32, sampling=sampling))
    calls = record_calls(pipeline, prompts[:16], sampling, every=3)
    found, left_dense = find_sites(pipeline.unet)
    sites = [s for s in found if s.group in TRANSFORMER_GROUPS]
    factors = factorise(pipeline.unet, statistics, sites)
    total = count_parameters(pipeline.unet)
    effects = {}
    for block in dict.fromkeys(s.path.rpartition(".")[0] for s in sites):
        ranks = {s.name: s.dense_rank // 2 if s.path.startswith(block + ".") else s.dense_rank for s in sites}
        plan = Plan(
            model_class=type(pipeline.unet).__name__,
            model_hash=statistics.model_hash,
            allocation="one block at half rank",
            align=1,
            parameters={"dense": total, "slim": total, "budget": total},
            sites={s.name: site_plan(s, ranks[s.name]) for s in sites},
            left_dense=left_dense,
        )
        slim = slim_denoiser(pipeline.unet, statistics, plan, factors)
        error = noise_error(partial(predict, pipeline.unet), partial(predict, slim), calls)
        effects[block] = error["relative_mse"]
    return effects


def write_card(figures: dict[str, Any], training: str, file: Path) -> None:
    accuracy, real = figures["caption_accuracy"], figures["evaluator_on_rendered"]
    attributes = "\n".join(f"| {name} | {accuracy[name]:.1%} | {real[name]:.1%} |" for name in accuracy)
    effects = "\n".join(f"| `{block}` | {value:.1e} |" for block, value in figures["half_rank"].items())
    parameters = ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in figures["parameters"].items())
    file.write_text(
        f"""# The embedded model

A small text-to-image model in Stable Diffusion's own classes (`StableDiffusionPipeline`, `CLIPTokenizer`,
`CLIPTextModel`, `AutoencoderKL`, `UNet2DConditionModel`, `DDIMScheduler`), for demonstration and measurement: it draws
coloured shapes, 64x64.
Every figure below is printed by `python -m benchmarks.embedded.card`.

**Parameters:** {parameters}; transformer blocks hold {figures["transformer_share"]:.1%} of the UNet's.

**Data:** scenes drawn by `scenes.py`: one to four objects (6 shapes, 8 colours, 2 sizes, 4 places) on 4
backgrounds, with captions such as "{embedded.captions(1, 3)[0]}". One scene in 16, by a hash of the scene, is held out.

**Training:** `python -m benchmarks.embedded.train`, seed fixed. {training}

**Evaluator:** a convolutional classifier that ships beside the model and reads the attributes back from a picture.

## Caption accuracy
{figures["captions"]} held-out captions, {EVALUATION.steps} DDIM steps, guidance {EVALUATION.guidance:g}.
Fréchet distance to as many rendered scenes in the evaluator's features: {figures["frechet_distance"]:.3f}.

| attribute | generated images | rendered images |
| --- | --- | --- |
{attributes}

## No dead depth
Relative mean squared change of the noise prediction when one transformer block alone goes to half rank (no block
may be below {LEAST_EFFECT:g}, or slimming it would flatter every method):

| transformer block | change |
| --- | --- |
{effects}

## Limits
It knows the words of its captions and nothing else, and says nothing about how photographs fare. Licence:
Apache-2.0, as the code; the data is generated, and holds no one's pictures.
""",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(embedded.__file__).parent
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--evaluator", type=Path, default=here / "evaluator.safetensors")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--training", help="a sentence on how it was trained; the card is written only if given")
    arguments = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    started = time.perf_counter()
    figures = measure(pipeline, evaluator.load(arguments.evaluator), arguments.captions)
    print(json.dumps(figures, indent=1))
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.training:
        write_card(figures, arguments.training, here / "MODEL_CARD.md")


if __name__ == "__main__":
    main()
