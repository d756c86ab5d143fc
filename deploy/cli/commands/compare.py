"""`slimdiff compare`: how close a slim model is to its dense one."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLE = """examples:
  slimdiff compare demo demo-slim
  slimdiff compare my-checkpoint slim --images 8
  slimdiff compare my-checkpoint slim --prompts prompts.txt --json"""

CAPTIONS_SEED = 1
"""Which of the embedded model's held-out captions."""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "compare",
        help="fidelity of slim against dense: noise-prediction error per timestep, image PSNR and SSIM, quality",
        description="Hold a slim model against the dense one on the dense model's trajectories, and their images of "
        "the same captions and seeds against each other. The embedded model's images are also judged by its evaluator.",
        epilog=EXAMPLE,
    )
    parser.add_argument("dense", metavar="DENSE", help="a model")
    parser.add_argument("slim", metavar="SLIM", help="a model")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line (default: 'general', the built-in ones from the back; for demo, captions held out of "
        "its training)",
    )
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images of each (default: 16)")
    parser.add_argument(
        "--trajectories", type=int, default=2, metavar="N", help="prompts for the noise error (default: 2)"
    )
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="scheduler steps per image (default: 25)")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: 5)")
    parser.add_argument("--batch", type=int, metavar="N", help="images at a time (default: 8)")
    parser.add_argument(
        "--seed", type=int, default=10_000, metavar="N", help="of the first image's noise (default: 10000)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.cli.arguments import settings
    from deploy.cli.console import calm_libraries, result
    from deploy.recipe.prompts import EMBEDDED, comparison_prompts, default_source
    from slimdiff.denoising.trajectory import sample_images
    from slimdiff.errors import InputError
    from slimdiff.settings import Sampling

    if args.images < 1 or args.trajectories < 1:
        raise InputError("--images and --trajectories must be at least 1")
    sampling = settings(Sampling, args, "steps", "guidance", "batch", "seed")
    source = args.prompts or default_source(args.dense)
    prompts = comparison_prompts(source, 0, max(args.images, args.trajectories), CAPTIONS_SEED)

    calm_libraries()
    from deploy.build import fidelity_of_noise, quality
    from slimdiff.fidelity import image_fidelity
    from slimdiff.loading.pipelines import load_pipeline

    dense, slim = load_pipeline(args.dense), load_pipeline(args.slim)
    captions = prompts[: args.images]
    noise = fidelity_of_noise(dense, slim, prompts[: args.trajectories], sampling)
    progress = [None if args.quiet else f"compare: {name}" for name in ("dense", "slim")]
    seen = sample_images(dense, captions, sampling, progress=progress[0])
    made = sample_images(slim, captions, sampling, progress=progress[1])
    value = {
        "noise_error": noise,
        "images": image_fidelity(seen, made),
        "quality": quality(seen, made, CAPTIONS_SEED) if source == EMBEDDED else {},
        "sampling": sampling.model_dump(),
    }
    result(value, _text(value), args.json)
    return 0


def _text(value: dict[str, Any]) -> str:
    images = value["images"]
    lines = [
        f"noise-prediction error: {value['noise_error']['relative_mse']:.3g} relative mean squared",
        f"images: PSNR {images['psnr_db']:.1f} dB, SSIM {images['ssim']:.4f}, {images['count']} pairs",
    ]
    lines += [f"{name}: {q['dense']:.4g} dense, {q['slim']:.4g} slim" for name, q in value["quality"].items()]
    return "\n".join(lines)
