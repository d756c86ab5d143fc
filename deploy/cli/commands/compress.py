"""`slimdiff compress`: calibrate, plan, slim."""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.artifacts.schedules import find_schedule
from deploy.artifacts.usage import said_of
from deploy.cli import flags
from deploy.cli.console import calm_libraries, figures, log, result
from deploy.cli.outputs import artifact_folder, check_artifact, check_file
from deploy.recipe.material import hash_of
from deploy.recipe.prompts import described
from exporters.settings import TableSettings
from slimdiff.budget import Budget
from slimdiff.errors import InputError
from slimdiff.schedule import FILE
from slimdiff.settings import OffloadSettings, PlanSettings, WeightSettings
from slimdiff.storage import manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from slimdiff import Compression, Compressor, Statistics
    from slimdiff.planning.costs import CostTable
    from slimdiff.planning.together import Pair
    from slimdiff.schedule import Schedule

DESCRIPTION = "Make a slim model out of a dense one, without training: a diffusers pipeline directory."
EXAMPLE = """examples:
  slimdiff compress demo --out demo-slim --reduce 12%
  slimdiff compress my-checkpoint --out slim --reduce 100M
  slimdiff compress my-checkpoint --out slim --macs 20% --prompts prompts.txt --samples 256
  slimdiff compress my-checkpoint --out slim --speedup 1.35 --runtime onnxruntime
  slimdiff compress my-checkpoint --out slim --speedup 1.2 --schedule schedule.json     # of a whole image by it
  slimdiff compress my-checkpoint --out slim --speedup 2 --of image     # ranks and a schedule, chosen together
  slimdiff compress my-checkpoint --out slim --max-error 1e-3
  slimdiff compress my-checkpoint --out slim --speedup 1.6 --runtime openvino --precision int8
  slimdiff compress my-checkpoint --out slim --reduce 12% --lora style.safetensors:0.8
  slimdiff compress my-checkpoint --out slim --plan edited-plan.json
  slimdiff compress my-flux --out slim --reduce 10% --offload     # larger than memory
  slimdiff compress finetuned/unet --pipeline my-checkpoint --out slim --reduce 12%"""

IMAGES = 4
"""That a schedule is chosen by, together with the ranks."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "model", "MODEL", flags.MODEL)
    flags.add_pipeline(parser)
    flags.text(parser, "--out", "DIR", "where the slim model goes", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    flags.add_budget(what)
    flags.text(what, "--plan", "FILE", "the ranks themselves: a plan.json, perhaps edited")
    flags.add(parser, TableSettings, "runtime", "threads")
    of = "what --speedup is of: a call, or image: the whole one, by a schedule chosen with the ranks (default: call)"
    parser.add_argument("--of", choices=("call", "image"), default="call", help=of)
    flags.whole(
        parser, "--schedule-images", f"images that the schedule is chosen by, with --of image (default: {IMAGES})"
    )
    flags.add_schedule(parser)
    flags.add_calibration(parser)
    flags.add(parser, PlanSettings, *flags.PLANNING)
    flags.text(parser, "--statistics", "FILE", "statistics of this model, instead of calibrating")
    flags.add_lora(parser)
    unkept = "leave out the file by which slimdiff lora converts LoRA of the dense model"
    parser.add_argument("--no-maps", dest="maps", action="store_false", help=unkept)
    flags.add(parser, WeightSettings, *WeightSettings.model_fields)
    flags.add(parser, OffloadSettings, "offload")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_artifact(out, "slim-model")
    budget, table, weights = flags.read_budget(args), flags.read(args, TableSettings), flags.read(args, WeightSettings)
    _check_files(args)
    images = _images(args, budget, table)
    schedule = None if images else find_schedule(args.model, args.schedule)
    calibration = flags.read_calibration(args)
    source, material = flags.read_material(args, calibration.samples, max(calibration.sampling.batch, images))
    offload = flags.read(args, OffloadSettings).offload
    planning = _planning(args, offload, weights)
    calm_libraries()
    from deploy.artifacts.figures import compression_result, costs, denoiser_of
    from deploy.opening.distilled import warn_of_steps
    from exporters.graphs.pipeline import example_call
    from slimdiff import Compressor, Plan, Statistics, compress
    from slimdiff.adapters import fused_files
    from slimdiff.calibration import distributed
    from slimdiff.denoising.precision import in_dtype
    from slimdiff.denoising.tasks import for_task, make_inputs
    from slimdiff.denoising.trajectory import with_denoiser
    from slimdiff.loading.pipelines import load_pipeline, read_dtype

    plan = Plan.load(Path(args.plan)) if args.plan else None
    statistics = Statistics.load(Path(args.statistics)) if args.statistics else None
    held = load_pipeline(args.model, variant=weights.variant, lora=args.lora, rest=args.pipeline, offload=offload)
    pipeline = for_task(held, material)
    prompts, sampling = make_inputs(pipeline, material, calibration.sampling)
    calibration = calibration.model_copy(update={"sampling": sampling})
    warn_of_steps(pipeline, args.model, sampling)
    one_call = cache(partial(example_call, pipeline, **sampling.model_dump(include={"height", "width", "guidance"})))
    work = Compressor(pipeline, prompts, calibration, planning, schedule=schedule)
    latency, together = _prepare(work, budget, table, one_call, images, statistics)
    if together is not None:
        plan, schedule, budget, statistics = together.plan, together.schedule, None, work.statistics
    del work  # what it holds in float32 is not needed twice
    dense_costs = costs(denoiser_of(pipeline), one_call())
    watched = min(len(prompts), calibration.samples)
    log.info("compress: %d prompts %s, %d steps each", watched, described(source), sampling.steps)
    slim = compress(
        pipeline,
        prompts,
        budget,
        plan=plan,
        latency=latency,
        calibration=calibration,
        planning=planning,
        statistics=statistics,
        schedule=schedule,
        release_dense=True,  # its costs are known
    )
    if distributed.world()[0] > 0:  # every process has made the same model
        return 0
    written = with_denoiser(held, denoiser_of(slim.pipeline))  # which may run in the pipeline of another task
    written = in_dtype(written, dtype) if (dtype := read_dtype(weights.dtype)) else written
    slim_costs = costs(denoiser_of(written), one_call())
    measured = compression_result(slim.plan, dense_costs, slim_costs, slim.seconds)
    value = {"out": str(out), **measured, "int8": _int8(slim.plan), "image": together and together.described()}
    made_from = {
        "latency": dict(latency.made_from) if latency else None,
        "prompts": hash_of(material, calibration.samples),
        "calibration": calibration.model_dump(),
        "plan": planning.model_dump(),
        "lora": fused_files(held),
        "schedule": schedule and schedule.model_dump(exclude_none=True),
        "image": value["image"],
        **said_of(sampling),
    }
    _write(args, written, slim, weights, made_from, schedule)
    return result(args, value | {"schedule": made_from["schedule"]}, _text(value))


def _planning(args: argparse.Namespace, offload: bool, weights: WeightSettings) -> PlanSettings:
    """How ranks are chosen: with weights that stay in their files, without a forward pass of a slim model.

    Raises:
        InputError: if weights are to be written in another dtype.
    """
    planning = flags.read_planning(args)
    if not offload:
        return planning
    if weights.dtype is not None:
        raise InputError("--dtype is of weights in memory, and with --offload they keep their files': leave one out")
    args.maps = False
    changed: dict[str, Any] = {"forms": planning.forms.local()}
    if "allocation" not in planning.model_fields_set:
        changed["allocation"] = "local"
    planning = planning.model_copy(update=changed)
    log.info(
        "offload: ranks by the %s allocation, nothing is solved again on the slim model, and no maps are written for "
        "slimdiff lora",
        planning.allocation,
    )
    return planning


def _by_latency(budget: Budget | None) -> bool:
    return budget is not None and budget.kind == "speedup"


def _images(args: argparse.Namespace, budget: Budget | None, table: TableSettings) -> int:
    """How many images a schedule is chosen by, together with the ranks; 0 if none is."""
    if table.model_fields_set and not _by_latency(budget):
        raise InputError("--runtime and --threads say where --speedup is measured: give --speedup with them")
    if args.of == "call":
        if args.schedule_images is not None:
            raise InputError("--schedule-images are what a schedule is chosen by, with the ranks: give --of image")
        return 0
    if not _by_latency(budget):
        raise InputError("--of image says what --speedup is of: give --speedup with it")
    if args.schedule is not None:
        raise InputError("--of image chooses a schedule together with the ranks: leave out --schedule, or --of image")
    return args.schedule_images or IMAGES


def _prepare(
    work: Compressor,
    budget: Budget | None,
    table: TableSettings,
    call: Callable[[], Any],
    images: int,
    statistics: Statistics | None,
) -> tuple[CostTable | None, Pair | None]:
    """Refuse what cannot be, and measure what a speedup is planned on: latencies of a call, or of an image by the
    schedule; none for other budgets. If it is of an image by a schedule that is chosen, the pair of that and a plan."""
    if statistics is not None:
        work.statistics = statistics
    work.check([budget] if budget and not images else [], call=call)
    if not _by_latency(budget):
        return None, None
    if images:
        from exporters.latency.together import choose_together

        own = work.prompts[work.calibration.samples :][:images] or work.prompts[:images]
        assert budget is not None
        choosing = choose_together(work, own, float(budget.value), table)
        pair = choosing.best()
        work.planner.remember(work.statistics)
        return choosing.table(pair), pair
    if work.picture is not None:
        from exporters.latency.steps import measure_picture

        return measure_picture(work.pipeline, work.picture, work.calibration.sampling, work.planning, table), None
    from exporters.latency.table import measure_latency

    return measure_latency(work.denoiser, call(), work.planning, table), None


def _check_files(args: argparse.Namespace) -> None:
    for flag in ("plan", "statistics"):
        if getattr(args, flag):
            check_file(getattr(args, flag), f"--{flag}")


def _write(
    args: argparse.Namespace,
    pipeline: Any,
    slim: Compression,
    weights: WeightSettings,
    made_from: dict[str, Any],
    schedule: Schedule | None,
) -> None:
    """Write the slim model with its plan, maps and schedule; `made_from` is what the manifest says beside the plan."""
    from deploy.artifacts.figures import denoiser_of
    from deploy.artifacts.files import copy_licenses, save_pipeline
    from slimdiff import save_maps

    out, plan = Path(args.out), slim.plan
    with artifact_folder(out, "slim-model") as temporary:
        save_pipeline(pipeline, temporary, weights)
        for source in filter(None, (args.pipeline, args.model)):
            copy_licenses(source, temporary)
        plan.save(temporary / "plan.json")
        if schedule is not None:
            schedule.of_slim().save(temporary / FILE)
        if args.maps:
            save_maps(temporary, slim.maps, denoiser_of(pipeline))
        planned = {"model_hash": plan.model_hash, "budget": plan.budget}
        manifest.write_manifest(temporary, "slim-model", planned | made_from)
    log.info("compress: written to %s", out)


def _text(value: dict[str, Any]) -> str:
    costs = value["predicted"]
    of_image = {name: cost for name, cost in costs.items() if name.endswith("_per_image")}
    predicted = {"latency_ms": costs.get("latency_ms"), **of_image}
    lines = [f"{value['out']}: {value['sites']} sites slimmed", *figures(value)]
    lines += [f"{line} (predicted)" for line in figures(predicted)]
    if of_image:
        lines.append("an image is one by the schedule, of the dense and of the slim model")
    if (image := value["image"]) is not None:
        lines += _of_image(image)
    if value["noise_error"] is not None:
        lines.append(f"noise error {value['noise_error']:12.3g}    measured on unseen calls")
    lines += [f"left dense: {row['site']} ({row['reason']})" for row in value["left_dense"]]
    lines += _of_int8(value["int8"])
    return "\n".join(lines)


def _of_image(value: dict[str, Any]) -> list[str]:
    """What was chosen for a speedup of an image."""
    full, slim = value["full_ms"], value["slim_ms"]
    predicted = "" if value["predicted"] is None else f" ({value['predicted']:.3g} predicted)"
    return [
        f"schedule     {value['schedule']}",
        f"whole image  {full:.4g} ms dense at full schedule, {slim:.4g} ms slim by this one, {full / slim:.2f} times"
        " as fast (predicted)",
        f"final latents change by {value['measured']:.3g}{predicted}, by the schedule alone {value['scheduled']:.3g}",
    ]


def _int8(plan: Any) -> dict[str, Any] | None:
    """What a plan puts into int8, and what it keeps for its cost; None where it says nothing of precision."""
    if not plan.layers:
        return None
    kept = {path: layer for path, layer in plan.layers.items() if layer.precision == "own"}
    wide = [{"layer": path, "reason": k.reason, "noise_error": k.noise_error} for path, k in kept.items()]
    errors = [plan.layers[path].noise_error or 0.0 for path in plan.int8()]
    return {"layers": plan.int8(), "wide": wide, "noise_error": sum(errors)}


def _of_int8(value: dict[str, Any] | None) -> list[str]:
    if value is None:
        return []
    lines = [f"int8: {len(value['layers'])} layers, which cost {value['noise_error']:.2g} in all; export puts them so"]
    dear = [row for row in value["wide"] if row["noise_error"] is not None]
    return lines + [f"wide: {row['layer']} ({row['reason']}: alone {row['noise_error']:.2g})" for row in dear]
