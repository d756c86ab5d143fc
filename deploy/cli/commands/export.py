"""`slimdiff export`: ONNX of every pipeline component."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """examples:
  slimdiff export demo --out demo-onnx
  slimdiff export slim --out slim-onnx --precision fp16 --height 512 --width 512 --batch 2
  slimdiff export slim --out slim-onnx --dynamic batch,size"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "export",
        help="ONNX of every pipeline component, in optimum's directory layout",
        description="Write a pipeline's components as ONNX with fixed shapes, for optimum's ORTDiffusionPipeline.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="'demo', a diffusers pipeline directory (dense or slim), or a hub id"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the ONNX folder goes")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of weights, inputs and outputs")
    parser.add_argument(
        "--keep-fp32",
        nargs="+",
        default=[],
        metavar="PATH",
        help="UNet modules, or patterns such as '*.attn1', that an fp16 graph computes in fp32 because they overflow",
    )
    parser.add_argument("--height", type=int, metavar="N", help="of the image, pixels (default: the model's)")
    parser.add_argument("--width", type=int, metavar="N", help="of the image, pixels (default: the model's)")
    parser.add_argument(
        "--batch",
        type=int,
        default=2,
        metavar="N",
        help="samples in a denoiser call; two per image with guidance (default: 2)",
    )
    parser.add_argument(
        "--dynamic",
        metavar="batch,size",
        help="leave the batch, the size (height and width), or both open instead of fixed",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.cli.outputs import artifact_folder, check_artifact
    from slimdiff.errors import InputError, require
    from slimdiff.storage import manifest

    out = Path(args.out)
    check_artifact(out)
    if args.batch < 1:
        raise InputError(f"--batch must be at least 1, got {args.batch}")
    wanted = args.dynamic.split(",") if args.dynamic else []
    if not set(wanted) <= {"batch", "size"}:
        raise InputError(f"--dynamic takes batch, size or batch,size, got {args.dynamic!r}")
    require("onnx", "onnx")
    require("onnxscript", "onnx")

    from deploy.cli.console import calm_libraries, in_bytes, log, result

    calm_libraries()
    from deploy.artifacts.files import copy_licenses
    from deploy.artifacts.hashes import model_hash
    from deploy.build import shapes
    from exporters.graphs.pipeline import example_call, export_pipeline
    from exporters.graphs.precision import fp32_islands
    from exporters.settings import ExportSettings
    from slimdiff.loading.pipelines import load_pipeline

    settings = ExportSettings(
        precision=args.precision,
        keep_fp32=args.keep_fp32,
        dynamic_batch="batch" in wanted,
        dynamic_size="size" in wanted,
    )
    pipeline = load_pipeline(args.model)
    call = example_call(pipeline, height=args.height, width=args.width, batch=args.batch)
    log.info("export: %s, %s", args.model, args.precision)
    with artifact_folder(out) as temporary:
        progress = None if args.quiet else "export"
        files = export_pipeline(pipeline, temporary, settings, call=call, progress=progress)
        copy_licenses(args.model, temporary)
        names = [file.relative_to(temporary).as_posix() for file in files]
        inputs = shapes(call)
        wide = fp32_islands(temporary / "unet" / "model.onnx")
        runs_on = {
            "runtime": "onnxruntime",
            "precision": args.precision,
            "unet": inputs,
            "dynamic": args.dynamic,
            "fp32_islands": wide,
        }
        manifest.write_manifest(temporary, "onnx", {"model": model_hash(args.model), **settings.model_dump()}, runs_on)
        size = sum(file.stat().st_size for file in temporary.rglob("*.onnx*"))
    value = {
        "out": str(out),
        "precision": args.precision,
        "graphs": names,
        "unet_inputs": inputs,
        "dynamic": args.dynamic,
        "fp32_islands": wide,
        "bytes": size,
    }
    text = "\n".join(
        [f"{out}: {len(names)} graphs, {args.precision}, {in_bytes(size)}", *(f"  {name}" for name in names)]
    )
    result(value, text, args.json)
    return 0
