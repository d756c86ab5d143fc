"""`slimdiff generate`: an image from an artifact."""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path

from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_new_file, check_runnable
from exporters.registry import names
from slimdiff.errors import InputError
from slimdiff.prompts import check_inputs
from slimdiff.settings import Sampling
from slimdiff.storage import manifest

DESCRIPTION = "Make one image. The same seed gives the same starting noise, whatever the artifact."
EXAMPLE = """examples:
  slimdiff generate demo --prompt "a large red circle top left, on a gray background" --out circle.png
  slimdiff generate demo-onnx --runtime openvino --prompt "..." --out openvino.png
  slimdiff generate demo-build/export/slim --pipeline demo --prompt "..." --out onnx.png --seed 3"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "artifact", "ARTIFACT", "a model (dense or slim), an ONNX folder, an engine, or a bundle")
    flags.sentence(parser, "--prompt", "what to show", required=True)
    flags.text(parser, "--out", "PNG", "the image file to write", required=True)
    flags.add(parser, Sampling, "seed", "steps", "guidance", "height", "width")
    runs_in = "what runs ONNX (default: onnxruntime, or the best for a bundle)"
    parser.add_argument("--runtime", choices=names(), help=runs_in)
    flags.text(parser, "--pipeline", "MODEL", "whose other components go with a denoiser alone")
    flags.add_variant(parser)
    flags.add_lora(parser)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: name a file that ends in .png")
    check_new_file(out, "PNG image")
    check_inputs(args.prompt, where="--prompt")
    asked = flags.read(args, Sampling, batch=1)
    check_runnable(args.artifact, args.pipeline)
    variants = flags.read_variants(args, args.artifact, args.pipeline)
    calm_libraries()
    from PIL.Image import Image

    from deploy.opening.openers import open_denoiser, whole_pipeline
    from slimdiff.denoising.trajectory import sample_images

    size = {"height": asked.height, "width": asked.width}
    opened = open_denoiser(args.artifact, args.runtime, **size, variant=variants[args.artifact], lora=args.lora)
    pipeline = whole_pipeline(opened, args.artifact, args.pipeline, variants[args.pipeline])
    if {"num_frames", "video_length"} & inspect.signature(pipeline.__call__).parameters.keys():
        raise InputError(f"{args.artifact} makes videos, and generate writes one image: call the pipeline from Python")
    fixed = opened.pixels(pipeline)
    if any(size[side] not in (None, pixels) for side, pixels in fixed.items()):
        sides = " x ".join(map(str, fixed.values()))
        raise InputError(f"{args.artifact} makes images of {sides} alone: leave out --height and --width")
    sampling = opened.sampling(asked).model_copy(update=fixed)
    log.info("generate: %d steps", sampling.steps)
    start = time.perf_counter()
    image = sample_images(pipeline, [args.prompt] * sampling.batch, sampling)[0]
    seconds = round(time.perf_counter() - start, 3)
    if not isinstance(image, Image):
        raise InputError(f"{args.artifact} makes a {type(image).__name__} and no image: call the pipeline from Python")
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
    return result(args, value, f"{out}: {image.width} x {image.height}, {sampling.steps} steps in {seconds:.1f} s")
