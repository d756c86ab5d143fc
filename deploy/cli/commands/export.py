"""`slimdiff export`: ONNX of every pipeline component."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.artifacts.numbers import size as in_bytes
from deploy.artifacts.usage import said_of
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import artifact_folder, check_artifact
from exporters.settings import ExportSettings
from slimdiff.errors import InputError, require
from slimdiff.loading.naming import find_model
from slimdiff.settings import MOST_AT_ONCE, Sampling, SteeringSettings, WeightSettings
from slimdiff.storage import manifest

DESCRIPTION = "Write a pipeline's components as ONNX with fixed shapes, for optimum's ORTDiffusionPipeline."
EXAMPLE = """examples:
  slimdiff export demo --out demo-onnx
  slimdiff export slim --out slim-onnx --precision fp16 --height 512 --width 512 --batch 2
  slimdiff export slim --out slim-onnx --dynamic batch,size
  slimdiff export slim --out canny-onnx --controlnet sd-controlnet-canny
  slimdiff generate canny-onnx --control-image edges.png --prompt "a barn" --out barn.png"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "model", "MODEL", flags.MODEL)
    flags.text(parser, "--out", "DIR", "where the ONNX folder goes", required=True)
    flags.add(parser, ExportSettings, "precision")
    flags.add(parser, ExportSettings, "keep_fp32", nargs="+", metavar="PATH")
    flags.add(parser, Sampling, "height", "width")
    flags.add_lora(parser)
    flags.add_steering(parser)
    flags.add(parser, WeightSettings, "variant")
    flags.add_usage(parser, "guidance")
    flags.add(parser, Sampling, "scheduler")
    samples = "samples in a denoiser call (default: what one image takes: two with guidance above 1, one without)"
    flags.whole(parser, "--batch", samples, most=MOST_AT_ONCE)
    dynamic = "leave the batch, the size (height and width), or both open instead of fixed"
    flags.text(parser, "--dynamic", "batch,size", dynamic)
    unchecked = "leave the safety checker out, where the pipeline has one: no image is checked"
    flags.add(parser, ExportSettings, "safety_checker", flag="--no-safety-checker", const=False, help=unchecked)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_artifact(out, "onnx")
    open_dims = args.dynamic.split(",") if args.dynamic else []
    if not set(open_dims) <= {"batch", "size"}:
        raise InputError(f"--dynamic takes batch, size or batch,size, got {args.dynamic!r}")
    dynamic = {f"dynamic_{name}": True for name in open_dims}
    settings, image = flags.read(args, ExportSettings, **dynamic), flags.read_usage(args, args.model)
    weights, steering = flags.read(args, WeightSettings), flags.read(args, SteeringSettings)
    find_model(args.model)
    require("onnx", "onnx")
    require("onnxscript", "onnx")

    calm_libraries()
    from deploy.artifacts.files import copy_licenses
    from deploy.artifacts.hashes import model_hash, steering_hashes
    from deploy.build import shapes
    from exporters.graphs.pipeline import example_call, export_pipeline
    from exporters.graphs.precision import fp32_islands
    from slimdiff.adapters import fused_files
    from slimdiff.denoising.trajectory import with_scheduler
    from slimdiff.loading.pipelines import load_pipeline

    pipeline = load_pipeline(args.model, "fp32", variant=weights.variant, lora=args.lora, steering=steering)
    pipeline = with_scheduler(pipeline, image)
    size = {"height": image.height, "width": image.width}
    call = example_call(pipeline, **size, batch=args.batch, guidance=image.guidance)
    log.info("export: %s, %s", args.model, settings.precision)
    with artifact_folder(out, "onnx") as temporary:
        files = export_pipeline(pipeline, temporary, settings, call=call)
        copy_licenses(args.model, temporary)
        names = [file.relative_to(temporary).as_posix() for file in files]
        islands = fp32_islands(temporary / "unet" / "model.onnx")
        about = {"precision": settings.precision, "dynamic": args.dynamic, "fp32_islands": islands}
        runs_on = {"runtime": "onnxruntime", "unet": shapes(call), **about}
        fused = {"lora": fused} if (fused := fused_files(pipeline)) else {}
        made_from = {
            "model": model_hash(args.model),
            **said_of(image),
            **fused,
            **steering_hashes(steering),
            **settings.model_dump(),
        }
        manifest.write_manifest(temporary, "onnx", made_from, runs_on)
        written = sum(file.stat().st_size for file in temporary.rglob("*.onnx*"))
    value = {"out": str(out), "graphs": names, "unet_inputs": shapes(call), **about, "bytes": written}
    lines = [f"{out}: {len(names)} graphs, {settings.precision}, {in_bytes(written)}", *(f"  {name}" for name in names)]
    return result(args, value, "\n".join(lines))
