"""`slimdiff generate`: an image from an artifact."""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path
from typing import Any

from deploy.artifacts.schedules import find_schedule
from deploy.artifacts.usage import usage_of, use
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_apart, check_new_file, check_runnable
from deploy.recipe.material import parse_classes
from exporters.registry import names
from slimdiff.errors import InputError
from slimdiff.prompts import check_inputs
from slimdiff.prompts.material import Material, find_pictures
from slimdiff.settings import Sampling, SteeringSettings
from slimdiff.storage import manifest

DESCRIPTION = """Make images. The same seed gives the same starting noise, whatever the artifact. A text-to-image model
makes them from an image, too (image to image), or paints what a mask says of it (inpainting)."""
EXAMPLE = """examples:
  slimdiff generate demo --prompt "a large red circle top left, on a gray background" --out circle.png
  slimdiff generate demo --prompt "a blue star" --count 4 --scheduler euler --negative-prompt "red" --out stars.png
  slimdiff generate demo-onnx --runtime openvino --prompt "..." --out openvino.png
  slimdiff generate my-checkpoint --image photo.png --mask sky.png --prompt "..." --strength 0.8 --out new.png
  slimdiff generate demo-build/export/slim --pipeline demo --prompt "..." --out onnx.png --seed 3"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "artifact", "ARTIFACT", "a model (dense or slim), an ONNX folder, an engine, or a bundle")
    flags.sentence(parser, "--prompt", "what to show, of any length where the text encoder is CLIP")
    flags.sentence(parser, "--negative-prompt", "what not to show; without guidance it says nothing")
    flags.text(parser, "--image", "FILE", "that the image is made from", dest="input_images")
    flags.text(parser, "--mask", "FILE", "what of it is painted: white", dest="input_masks")
    control = "that steers it, of a model with a ControlNet or a T2I-Adapter; of several ControlNets, one each in turn"
    flags.text(parser, "--control-image", "FILE", control, dest="control_images", action="append", default=[])
    flags.text(
        parser,
        "--class",
        "CLASS",
        "the number of a class, of a class-conditional model",
        dest="classes",
        type=flags.classes,
    )
    flags.text(parser, "--out", "PNG", "the image file to write; of several, out-0.png and on", required=True)
    flags.whole(parser, "--count", "images, of the seeds from --seed on", default=1)
    flags.add_usage(parser, "steps", "guidance")
    flags.add(parser, Sampling, "seed", "height", "width", "scheduler")
    flags.add_arguments(parser)
    runs_in = "what runs ONNX (default: onnxruntime, or the best for a bundle)"
    parser.add_argument("--runtime", choices=names(), help=runs_in)
    tiled = "make large images by tiles, for less memory; of ONNX, where the VAE's graph is open in size"
    parser.add_argument("--tiled", action="store_true", help=tiled)
    flags.text(parser, "--pipeline", "MODEL", "whose other components go with a denoiser alone")
    flags.add_schedule(parser)
    flags.add_variant(parser)
    flags.add_lora(parser)
    flags.add_steering(parser)
    flags.add_ip_adapter_image(parser)


def run(args: argparse.Namespace) -> int:
    outs = _outs(args)
    material = _material(args)
    asked = flags.read_sampling(args, batch=1, whole_prompts=True)
    if args.negative_prompt is not None:
        check_inputs(args.negative_prompt, blank=True, where="--negative-prompt")
        asked = asked.model_copy(update={"arguments": {"negative_prompt": args.negative_prompt, **asked.arguments}})
    check_runnable(args.artifact, args.pipeline)
    variants = flags.read_variants(args, args.artifact, args.pipeline)
    calm_libraries()

    from deploy.opening.openers import open_denoiser, whole_pipeline
    from deploy.opening.schedules import as_followed, with_schedule
    from slimdiff.denoising.steering import nets_of
    from slimdiff.denoising.tasks import for_task, make_inputs
    from slimdiff.denoising.trajectory import sample_images

    schedule = find_schedule(args.artifact, args.schedule)
    size = {"height": asked.height, "width": asked.width}
    how: dict[str, Any] = {**size, "variant": variants[args.artifact], "lora": args.lora, "rest": args.pipeline}
    opened = open_denoiser(args.artifact, args.runtime, **how, steering=flags.read(args, SteeringSettings))
    pipeline = for_task(whole_pipeline(opened, args.artifact, args.pipeline, variants[args.pipeline]), material)
    if material.controls and len(material.controls) != (nets := max(1, len(nets_of(pipeline)))):
        raise InputError(
            f"--control-image is there {len(material.controls)} times for {nets}: give one for each in turn"
        )
    if {"num_frames", "video_length"} & inspect.signature(pipeline.__call__).parameters.keys():
        raise InputError(f"{args.artifact} makes videos, and generate writes images: call the pipeline from Python")
    asked = use(asked, opened.usage or usage_of(args.pipeline))
    sampling = opened.fitted(asked, pipeline, args.artifact)
    if args.tiled:
        from exporters.runtimes.tiles import enable_tiling

        enable_tiling(pipeline)
    inputs, sampling = make_inputs(pipeline, material, sampling)
    pipeline, schedule = with_schedule(pipeline, opened, schedule, args.schedule)
    schedule = as_followed(schedule, pipeline, sampling)
    log.info("generate: %d steps%s", sampling.steps, f", by the schedule of {schedule}" if schedule else "")
    start = time.perf_counter()
    filled = -(-len(inputs) // sampling.batch) * sampling.batch  # a graph's batch is fixed
    images = sample_images(pipeline, [inputs[i % len(inputs)] for i in range(filled)], sampling)[: len(inputs)]
    seconds = round(time.perf_counter() - start, 3)
    _write(outs, images, args.artifact)
    value = {
        "out": str(outs[0]),
        "outs": [str(out) for out in outs],
        "artifact": args.artifact,
        "kind": opened.kind,
        "runtime": opened.runtime,
        "pipeline": type(pipeline).__name__,
        "prompt": args.prompt,
        **{k: getattr(sampling, k) for k in ("seed", "steps", "guidance", "scheduler")},
        "width": images[0].width,
        "height": images[0].height,
        "tiled": args.tiled,
        "schedule": schedule and schedule.model_dump(exclude_none=True),
        "seconds": seconds,
        "why": getattr(getattr(pipeline, "chosen", None), "why", None),
    }
    made = f"{outs[0]}" if len(outs) == 1 else f"{outs[0]} to {outs[-1].name}"
    return result(
        args, value, f"{made}: {value['width']} x {value['height']}, {sampling.steps} steps in {seconds:.1f} s"
    )


def _write(outs: list[Path], images: list[Any], artifact: str) -> None:
    from PIL.Image import Image

    for out, image in zip(outs, images, strict=True):
        if not isinstance(image, Image):
            kind = type(image).__name__
            raise InputError(f"{artifact} makes a {kind} and no image: call the pipeline from Python")
        with manifest.replacing(out.absolute(), is_file=True) as temporary:
            image.save(temporary, format="PNG")


def _outs(args: argparse.Namespace) -> list[Path]:
    """The files to write."""
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: name a file that ends in .png")
    outs = [out] if args.count == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(args.count)]
    named = (
        args.artifact,
        args.pipeline,
        args.input_images,
        args.input_masks,
        *args.control_images,
        args.ip_adapter_image,
    )
    read = [path for path in named if path is not None]
    for one in outs:
        check_new_file(one, "PNG image")
        check_apart({"--out": one}, read)
    return outs


def _material(args: argparse.Namespace) -> Material:
    """What the images are made from."""
    prompts = [] if args.prompt is None else [args.prompt]
    for prompt in prompts:
        check_inputs(prompt, where="--prompt")
    if args.input_masks is not None and args.input_images is None:
        raise InputError("--mask says what of an image is painted: give --image with it")
    images, masks = (
        find_pictures(file, what) if file is not None else []
        for file, what in ((args.input_images, "images"), (args.input_masks, "masks"))
    )
    if len(images) > 1 or len(masks) > 1:
        raise InputError("--image and --mask name one file each")
    classes = parse_classes(args.classes) if args.classes is not None else []
    if len(classes) > args.count:
        raise InputError(f"--class names {len(classes)} classes for {args.count} images: say --count {len(classes)}")
    controls = [picture for file in args.control_images for picture in find_pictures(file, "control images")]
    shown = flags.find_ip_adapter_image(args)
    return Material(prompts, images, masks, classes, args.count, controls=controls, ip_adapter_image=shown)
