"""`slimdiff compare`: how close a slim model is to its dense one."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from deploy.cli import flags
from deploy.cli.console import calm_libraries, result
from deploy.recipe.material import comparison_material
from deploy.recipe.prompts import EMBEDDED, default_source
from slimdiff.loading.naming import find_model
from slimdiff.settings import Sampling

DESCRIPTION = """Hold a slim model against the dense one on the dense model's trajectories, and their images of the
same captions and seeds against each other. The embedded model's images are also judged by its evaluator."""
EXAMPLE = """examples:
  slimdiff compare demo demo-slim
  slimdiff compare my-checkpoint slim --images 8
  slimdiff compare my-checkpoint slim --prompts prompts.txt --json"""

STEPS = 25
CAPTIONS_SEED = 1
"""Which of the embedded model's held-out captions."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "dense", "DENSE", "a model")
    flags.text(parser, "slim", "SLIM", "a model")
    flags.add_variant(parser)
    flags.add_lora(parser, into="DENSE")
    flags.add_lora(parser, "--slim-lora", into="SLIM")
    by_default = "'general', the built-in ones from the back; for demo, captions held out of its training"
    flags.text(parser, "--prompts", "FILE", f"one prompt a line (default: {by_default})")
    flags.add_material(parser, "input-")
    flags.whole(parser, "--images", "images of each", default=16)
    flags.whole(parser, "--trajectories", "prompts for the noise error", default=2)
    flags.add_usage(parser, "steps", "guidance", steps=STEPS)
    flags.add(parser, Sampling, "batch", "height", "width", "scheduler")
    flags.add_arguments(parser)
    flags.add(parser, Sampling, "seed", default=10_000)


def run(args: argparse.Namespace) -> int:
    for model in (args.dense, args.slim):
        find_model(model)
    sampling, variants = (
        flags.read_usage(args, args.slim, args.dense, steps=STEPS),
        flags.read_variants(args, args.dense, args.slim),
    )
    source = args.prompts or default_source(args.dense)
    folders = {"images": args.input_images, "masks": args.input_masks, "classes": args.classes}
    count = max(args.images, args.trajectories)
    material = comparison_material(source, 0, count, CAPTIONS_SEED, **folders, default=args.prompts is None)

    calm_libraries()
    from deploy.build import quality
    from slimdiff import compare, load_pipeline
    from slimdiff.denoising.tasks import for_task, make_inputs

    dense, slim = (
        for_task(load_pipeline(name, "fp32", variant=variants[name], lora=lora), material)
        for name, lora in ((args.dense, args.lora), (args.slim, args.slim_lora))
    )
    inputs, sampling = make_inputs(dense, material, sampling)
    value = compare(
        dense,
        slim,
        inputs,
        sampling,
        images=args.images,
        trajectories=args.trajectories,
        quality=partial(quality, seed=CAPTIONS_SEED) if source == EMBEDDED else None,
    )
    return result(args, value, _text(value))


def _text(value: dict[str, Any]) -> str:
    images = value["images"]
    lines = [
        f"noise-prediction error: {value['noise_error']['relative_mse']:.3g} relative mean squared",
        f"images: PSNR {images['psnr_db']:.1f} dB, SSIM {images['ssim']:.4f}, {images['count']} pairs",
    ]
    lines += [f"{name}: {q['dense']:.4g} dense, {q['slim']:.4g} slim" for name, q in value["quality"].items()]
    return "\n".join(lines)
