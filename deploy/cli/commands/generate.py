"""`slimdiff generate`: an image from an artifact."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from exporters.settings import RUNTIMES

EXAMPLE = """examples:
  slimdiff generate demo --prompt "a large red circle top left, on a gray background" --out circle.png
  slimdiff generate demo-onnx --runtime openvino --prompt "..." --out openvino.png
  slimdiff generate demo-build/export/slim --pipeline demo --prompt "..." --out onnx.png --seed 3"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "generate",
        help="an image from an artifact: dense, slim, ONNX, engine, bundle",
        description="Make one image. The same seed gives the same starting noise, whatever the artifact.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT", help="a model (dense or slim), an ONNX folder, an engine, or a bundle"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to show")
    parser.add_argument("--out", required=True, metavar="PNG", help="the image file to write")
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="scheduler steps (default: 20)")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: 5)")
    parser.add_argument("--height", type=int, metavar="N", help="pixels (default: the model's)")
    parser.add_argument("--width", type=int, metavar="N", help="pixels (default: the model's)")
    parser.add_argument(
        "--runtime", choices=RUNTIMES, help="what runs ONNX (default: onnxruntime, or the best for a bundle)"
    )
    parser.add_argument("--pipeline", metavar="MODEL", help="whose other components go with a denoiser alone")
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.cli.arguments import settings
    from deploy.cli.console import calm_libraries, log, result
    from slimdiff.denoising.trajectory import sample_images
    from slimdiff.errors import InputError
    from slimdiff.settings import Sampling
    from slimdiff.storage import manifest

    out = Path(args.out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"--out {out}: name a file that ends in .png")
    if not args.prompt.strip():
        raise InputError("--prompt is empty: say what to show")
    sampling = settings(Sampling, args, "seed", "steps", "guidance", "height", "width", batch=1)
    calm_libraries()
    from deploy.opening.openers import open_denoiser, whole_pipeline

    opened = open_denoiser(args.artifact, args.runtime, height=args.height, width=args.width)
    pipeline = whole_pipeline(opened, args.artifact, args.pipeline)
    sampling = opened.sampling(sampling).model_copy(update=opened.pixels(pipeline))
    log.info("generate: %d steps", sampling.steps)
    start = time.perf_counter()
    progress = None if args.quiet else "generate"
    image = sample_images(pipeline, [args.prompt] * sampling.batch, sampling, progress=progress)[0]
    seconds = round(time.perf_counter() - start, 3)
    with manifest.replacing(out.absolute(), is_file=True) as temporary:
        image.save(temporary, format="PNG")
    value = {
        "out": str(out),
        "artifact": args.artifact,
        "kind": opened.kind,
        "runtime": opened.runtime,
        "prompt": args.prompt,
        **{k: getattr(sampling, k) for k in ("seed", "steps", "guidance")},
        "width": image.width,
        "height": image.height,
        "seconds": seconds,
        "why": getattr(getattr(pipeline, "chosen", None), "why", None),
    }
    result(value, f"{out}: {image.width} x {image.height}, {sampling.steps} steps in {seconds:.1f} s", args.json)
    return 0
