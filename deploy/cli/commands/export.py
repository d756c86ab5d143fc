"""`slimdiff export`: ONNX of every pipeline component."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.artifacts.numbers import size as in_bytes
from deploy.artifacts.schedules import find_schedule
from deploy.artifacts.usage import said_of
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import artifact_folder, check_artifact
from exporters.settings import ExportSettings
from slimdiff.errors import InputError, require
from slimdiff.loading.naming import find_component, find_model
from slimdiff.schedule import FILE, Schedule
from slimdiff.settings import MOST_AT_ONCE, Sampling, SteeringSettings, WeightSettings
from slimdiff.storage import manifest

DESCRIPTION = """Write a pipeline's components as ONNX with fixed shapes, for optimum's ORTDiffusionPipeline; of the
folder of a UNet alone, its graph."""
EXAMPLE = """examples:
  slimdiff export demo --out demo-onnx
  slimdiff export slim --out slim-onnx --precision fp16 --height 512 --width 512 --batch 2
  slimdiff export slim --out slim-int8 --precision int8 --prompts prompts.txt
  slimdiff export slim --out slim-onnx --dynamic batch,size
  slimdiff export slim --out slim-onnx --precision fp16 --height 2048 --width 2048 --vae-tile 512
  slimdiff export slim --out slim-parts --split
  slimdiff export my-checkpoint/unet --out unet-onnx
  slimdiff export slim --out canny-onnx --controlnet sd-controlnet-canny
  slimdiff generate canny-onnx --control-image edges.png --prompt "a barn" --out barn.png"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "model", "MODEL", flags.MODEL)
    whole = "the whole pipeline with a denoiser alone in it (default: a graph of the UNet alone)"
    flags.text(parser, "--pipeline", "MODEL", f"whose other components go with a denoiser alone: {whole}")
    flags.text(parser, "--out", "DIR", "where the ONNX folder goes", required=True)
    flags.add(parser, ExportSettings, "precision")
    flags.add(parser, ExportSettings, "keep_fp32", nargs="+", metavar="PATH")
    flags.add(parser, ExportSettings, "int8_error", "int8_calls")
    calibrated = "prompts that int8 is calibrated on, one a line (default: 'general', the built-in ones; demo's own)"
    flags.text(parser, "--prompts", "FILE", calibrated)
    flags.add(parser, Sampling, "height", "width")
    flags.add_schedule(parser)
    flags.add_lora(parser)
    flags.add_steering(parser)
    flags.add(parser, WeightSettings, "variant")
    flags.add_usage(parser, "guidance")
    flags.add(parser, Sampling, "scheduler")
    flags.add_argument(parser, "of the pipeline's call that graphs are for, such as max_sequence_length=256")
    samples = "samples in a denoiser call (default: what one image takes: two with guidance above 1, one without)"
    flags.whole(parser, "--batch", samples, most=MOST_AT_ONCE)
    dynamic = "leave the batch, the size (height and width), or both open instead of fixed"
    flags.text(parser, "--dynamic", "batch,size", dynamic)
    flags.add(parser, ExportSettings, "split")
    tile = "side in pixels of the VAE's graphs, which make larger images by tiles of that size, for less memory"
    flags.whole(parser, "--vae-tile", tile)
    unchecked = "leave the safety checker out, where the pipeline has one: no image is checked"
    flags.add(parser, ExportSettings, "safety_checker", flag="--no-safety-checker", const=False, help=unchecked)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_artifact(out, "onnx")
    open_dims = args.dynamic.split(",") if args.dynamic else []
    if not set(open_dims) <= {"batch", "size"}:
        raise InputError(f"--dynamic takes batch, size or batch,size, got {args.dynamic!r}")
    dynamic = {f"dynamic_{name}": True for name in open_dims}
    image = flags.read_usage(args, args.model)
    arguments = {"arguments": image.arguments} if image.arguments else {}
    settings = flags.read(args, ExportSettings, **dynamic, **arguments)
    weights, steering = flags.read(args, WeightSettings), flags.read(args, SteeringSettings)
    alone = args.pipeline is None and find_component(args.model) is not None
    if not alone:
        find_model(args.model, args.pipeline)
    for flag, asked in (("--vae-tile", args.vae_tile), ("what steers it", steering)):
        if alone and asked:
            raise InputError(f"{flag}: {args.model} is a denoiser alone: say with --pipeline which model it goes with")
    schedule = find_schedule(args.model, args.schedule)
    if schedule is not None and not schedule.guides_always():  # half a batch goes through in some steps
        settings = settings.model_copy(update={"dynamic_batch": True})
        args.dynamic = args.dynamic or "batch"
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    settings = _as_planned(args.model, settings)
    prompts = _prompts(args, settings, image, alone)

    calm_libraries()
    from deploy.artifacts.files import copy_licenses
    from deploy.artifacts.hashes import model_hash, steering_hashes
    from deploy.build import shapes
    from deploy.recipe.rounding import record_for_int8
    from exporters.graphs.int8_layers import report_of
    from exporters.graphs.precision import fp32_islands
    from exporters.graphs.reading import graph_files, read_graph
    from slimdiff.adapters import fused_files

    pipeline, unet, call = _open(args, image, weights.variant, steering)
    calibration = record_for_int8(pipeline, prompts, image, settings) if prompts else []
    log.info("export: %s, %s", args.model, settings.precision)
    with artifact_folder(out, "onnx") as temporary:
        how: Any = {"call": call, "vae_tile": args.vae_tile, "calibration": calibration}
        files = _write(pipeline, unet if alone else None, temporary, settings, schedule, **how)
        for source in filter(None, (args.pipeline, args.model)):
            copy_licenses(source, temporary)
        names = [file.relative_to(temporary).as_posix() for each in files for file in graph_files(each)]
        islands = fp32_islands(files[0])  # the denoiser's
        about = {"precision": settings.precision, "dynamic": args.dynamic, "fp32_islands": islands}
        if report := report_of(read_graph(temporary / names[0])):
            about["int8"] = report
        runs_on = {"runtime": "onnxruntime", "unet": shapes(call), **about}
        fused = {"lora": fused} if pipeline is not None and (fused := fused_files(pipeline)) else {}
        made_from = {
            "model": model_hash(args.model, args.pipeline),
            **said_of(image),
            **fused,
            **steering_hashes(steering),
            **settings.model_dump(),
            **({"schedule": schedule.model_dump(exclude_none=True)} if schedule else {}),
        }
        manifest.write_manifest(temporary, "onnx", made_from, runs_on)
        written = sum(file.stat().st_size for file in temporary.rglob("*.onnx*"))
    value = {"out": str(out), "graphs": names, "unet_inputs": shapes(call), **about, "bytes": written}
    graphs = "1 graph" if alone else f"{len(names)} graphs"
    lines = [f"{out}: {graphs}, {settings.precision}, {in_bytes(written)}", *(f"  {name}" for name in names)]
    lines += _of_int8(value.get("int8"))
    return result(args, value, "\n".join(lines))


def _write(
    pipeline: Any, unet: Any, folder: Path, settings: ExportSettings, schedule: Schedule | None, **how: Any
) -> list[Path]:
    """Export a pipeline, or a UNet alone if there is one; by a schedule, with that beside it.

    Args:
        how: `call`, and `vae_tile` of a pipeline.
    """
    from exporters.graphs.pipeline import export_pipeline
    from exporters.graphs.scheduled import export_scheduled, export_scheduled_pipeline

    if schedule is not None:
        schedule.save(folder / FILE)
    if unet is None:
        if schedule is None:
            return export_pipeline(pipeline, folder, settings, **how)
        return export_scheduled_pipeline(pipeline, folder, schedule, settings, **how)
    scheduler = getattr(pipeline, "scheduler", None)
    return export_scheduled(unet, folder, how["call"], schedule, settings, scheduler=scheduler)


def _as_planned(model: str, settings: ExportSettings) -> ExportSettings:
    """In int8, if the model's plan says so and no other precision is asked for."""
    file = Path(model) / "plan.json"
    if "precision" in settings.model_fields_set or not file.is_file():
        return settings
    from slimdiff.plan import Plan

    if not (int8 := Plan.load(file).int8()):
        return settings
    log.info("export: %s puts %d layers into int8 (--precision fp32 leaves them out)", file, len(int8))
    return ExportSettings(**settings.model_dump(exclude_unset=True), precision="int8")


def _prompts(args: argparse.Namespace, settings: ExportSettings, image: Sampling, alone: bool) -> list[str]:
    """What int8 is calibrated on images of; none in another precision."""
    if settings.precision != "int8":
        if args.prompts is not None:
            raise InputError(f"--prompts are what int8 is calibrated on: leave them out of {settings.precision}")
        return []
    if alone:
        raise InputError(
            f"int8 is calibrated on images, and {args.model} is a UNet alone: say with --pipeline which model it goes "
            "with"
        )
    require("nncf", "int8")
    from deploy.recipe.rounding import prompts_for_int8

    return prompts_for_int8(args.pipeline or args.model, args.prompts, image, settings)


def _of_int8(report: dict[str, Any] | None) -> list[str]:
    if report is None:
        return []
    share = "" if report["share"] is None else f", {100 * report['share']:.1f} % of the multiply-adds"
    cost = "" if report["noise_error"] is None else f", noise error {report['noise_error']:.2g} in all"
    layers = f"int8: {len(report['layers'])} layers{share}{cost}"
    lines = [f"  {row['layer']} stays in fp32: {row['reason']}" for row in report["wide"]]
    costs = [f" (alone {row['noise_error']:.2g})" if row["noise_error"] else "" for row in report["wide"]]
    return [layers, *map(str.__add__, lines, costs)]


def _open(
    args: argparse.Namespace, image: Sampling, variant: str | None, steering: SteeringSettings
) -> tuple[Any, Any, Any]:
    """The pipeline, its denoiser, and a call of it that graphs are for; no pipeline for a UNet that lies in none."""
    from deploy.artifacts.figures import denoiser_of
    from exporters.graphs.alone import call_of_unet, check_alone
    from exporters.graphs.pipeline import example_call
    from slimdiff.denoising.schedulers import with_scheduler
    from slimdiff.loading.pipelines import load_denoiser, load_pipeline

    shapes: dict[str, Any] = {"batch": args.batch, "guidance": image.guidance, "arguments": image.arguments}
    component = find_component(args.model)
    if component is None or component.pipeline or args.pipeline or args.lora:
        more: Any = {"lora": args.lora, "rest": args.pipeline, "steering": steering}
        pipeline = load_pipeline(args.model, "fp32", variant=variant, **more)
        pipeline = with_scheduler(pipeline, image)
        return pipeline, denoiser_of(pipeline), example_call(pipeline, height=image.height, width=image.width, **shapes)
    check_alone(component.kind)
    asked = {
        "--height and --width": image.height,
        "--scheduler": image.scheduler,
        "--argument": shapes.pop("arguments"),
    }
    for flag, value in asked.items():
        if value:
            raise InputError(f"{flag}: {args.model} is a UNet alone: say with --pipeline which model it goes with")
    unet = load_denoiser(args.model, "fp32", variant)
    return None, unet, call_of_unet(unet, **shapes)
