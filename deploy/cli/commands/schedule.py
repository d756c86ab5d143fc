"""`slimdiff schedule`: which steps of an image are guided, and which run the whole network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.artifacts.kinds import kind_of, not_runnable
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_new_file, check_writable
from exporters.settings import TableSettings
from slimdiff.errors import InputError
from slimdiff.loading.naming import places_of
from slimdiff.schedule import FILE, ChoiceSettings, Schedule, ScheduleSettings, levels_of
from slimdiff.settings import Sampling
from slimdiff.storage import manifest

DESCRIPTION = """Say which steps of an image are guided and which run the whole UNet, and which reuse what the last
whole one left; or have it chosen by what leaving that out changes in the final images. generate and compare make their
images by it. Speeds are of the UNet's counted multiply-adds per image or, with --runtime, of the whole image as each
kind of step takes there, measured."""
EXAMPLE = """examples:
  slimdiff schedule my-slim --guidance-interval 0.0:0.5 --deep-every 3      # into my-slim/schedule.json
  slimdiff schedule my-slim --speedup 2 --prompts prompts.txt --samples 4
  slimdiff schedule my-slim --speedup 2 --runtime onnxruntime --samples 4      # text encoder and VAE counted
  slimdiff schedule demo --max-error 1e-3 --samples 4 --batch 4 --out schedule.json
  slimdiff generate demo --schedule schedule.json --prompt "a large red circle" --out circle.png"""
SAMPLES = 8
CHOSEN = ("speedup", "max_error")


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "model", "MODEL", flags.MODEL)
    flags.text(parser, "--out", "FILE", f"the JSON file to write (default: {FILE} in the model's directory)")
    by_hand = parser.add_argument_group("by hand")
    flags.add(by_hand, ScheduleSettings, "guidance_interval", "deep_every", "depth")
    chosen = parser.add_argument_group("chosen").add_mutually_exclusive_group()
    flags.add(chosen, ChoiceSettings, *CHOSEN)
    where = "where latency counts: the whole image's is then what a speed is of (default: multiply-adds are counted)"
    flags.add(parser, TableSettings, "runtime", help=where)
    flags.add(parser, TableSettings, "threads")
    measured = parser.add_argument_group("what is measured, where it is chosen")
    by_default = "'general', the 500 built-in ones; for demo its own"
    flags.text(measured, "--prompts", "FILE", f"one prompt a line (default: {by_default})")
    flags.add_material(measured)
    flags.whole(measured, "--samples", "images that are made again for each step", default=SAMPLES)
    flags.add_usage(parser, "steps", "guidance")
    flags.add(parser, Sampling, "batch", "seed", "height", "width", "scheduler", "whole_prompts")
    flags.add_arguments(parser)
    flags.add_lora(parser)
    flags.add_variant(parser)


def run(args: argparse.Namespace) -> int:
    if (kind := kind_of(args.model)) != "model":
        raise (
            not_runnable(args.model, kind)
            if kind in ("plan", "statistics", "schedule")
            else InputError(
                f"{args.model} is {kind}, which has its model's schedule: name the model, and export it again"
            )
        )
    out = _place(args)
    by_hand, chosen = flags.read(args, ScheduleSettings), flags.read(args, ChoiceSettings)
    asked = chosen.model_dump(exclude_none=True)
    if asked and by_hand.model_fields_set - {"depth"}:
        raise InputError(
            "--guidance-interval and --deep-every say a schedule by hand: leave out --speedup and --max-error"
        )
    if not asked and not by_hand.model_fields_set & {"guidance_interval", "deep_every"}:
        raise InputError(
            "say a schedule (--guidance-interval, --deep-every) or what to choose (--speedup, --max-error)"
        )
    table = flags.read(args, TableSettings)
    if "threads" in table.model_fields_set and "runtime" not in table.model_fields_set:
        raise InputError("--threads are of what speed is measured in: give --runtime with it")
    sampling = flags.read_usage(args, args.model)
    samples = args.samples
    _, material = flags.read_material(args, samples)
    variant = flags.read_variants(args, args.model)[args.model]

    calm_libraries()
    from slimdiff.denoising.tasks import make_inputs
    from slimdiff.loading.pipelines import load_pipeline

    pipeline = load_pipeline(args.model, "fp32", variant=variant, lora=args.lora)
    times: dict[str | None, Any] = {}
    if asked:
        from slimdiff.denoising.scheduled import shallow_unet
        from slimdiff.planning.schedules import Images, choose_schedule, measure_changes

        if by_hand.depth is not None and getattr(pipeline, "unet", None) is not None:
            shallow_unet(pipeline.unet, by_hand.depth)  # which refuses what the model does not have
        prompts, sampling = make_inputs(pipeline, material, sampling)
        log.info("schedule: %d images in %d steps, again for each step and what is left out", samples, sampling.steps)
        images = Images(pipeline, prompts[:samples], sampling)
        depths = [by_hand.depth] if by_hand.depth else images.depths()
        if "runtime" in table.model_fields_set:
            times = _times(pipeline, sampling, table, depths, images.guidance_can_go)
        schedule = choose_schedule(images, measure_changes(images, depths, times), **asked)
    else:
        from slimdiff.denoising.scheduled import schedule_pipeline
        from slimdiff.denoising.schedulers import calls_of, with_scheduler

        unet: Any = getattr(pipeline, "unet", None)
        calls = calls_of(with_scheduler(pipeline, sampling), sampling.steps)
        schedule = by_hand.make(levels_of(getattr(unet, "config", {})) or 1, calls)
        schedule_pipeline(pipeline, schedule)  # which refuses what the model cannot do
        if "runtime" in table.model_fields_set:
            depths = [schedule.depth] if schedule.depth else []
            times = _times(pipeline, sampling, table, depths, not schedule.guides_always())
    if args.out is None:
        manifest.put_file(out.parent, out.name, schedule.save)
    else:
        schedule.save(out)
    value = {"out": str(out), **schedule.model_dump(exclude_none=True), **_cost(pipeline, schedule, sampling.guidance)}
    if times:
        costs = times.get(schedule.depth) or next(iter(times.values()))
        full, own = costs.full(schedule.steps), costs.of(schedule)
        value |= {"runtime": table.runtime, "image_ms": {"full": full, "scheduled": own, "beside_steps": costs.rest}}
    return result(args, value, _text(value, schedule))


def _times(
    pipeline: Any, sampling: Sampling, table: TableSettings, depths: Any, unguided: bool
) -> dict[str | None, Any]:
    """What each kind of step takes, by depth; None is the key where none is reused."""
    from exporters.latency.steps import measure_steps

    one = {depth: measure_steps(pipeline, sampling, depth=depth, unguided=unguided, settings=table) for depth in depths}
    return one or {None: measure_steps(pipeline, sampling, depth=None, unguided=unguided, settings=table)}


def _place(args: argparse.Namespace) -> Path:
    """The file to write."""
    if args.out is not None:
        out = Path(args.out)
        if out.suffix != ".json":
            raise InputError(f"--out {out}: name a file that ends in .json")
        check_new_file(out, "schedule")
        return out
    folder = places_of(args.model)[-1]
    if args.model == "demo" or not folder.is_dir():
        raise InputError(f"{args.model} is no directory of yours that a schedule could go into: say --out FILE")
    check_writable(folder / FILE)
    if (folder / FILE).exists():
        Schedule.load(folder)  # or it is no schedule, and stays
    return folder / FILE


def _cost(pipeline: Any, schedule: Schedule, guidance: float) -> dict[str, Any]:
    """What a picture's calls of the UNet cost, counted."""
    from exporters.graphs.pipeline import example_call
    from slimdiff.planning.costs import batch_of, shallow_share

    call = example_call(pipeline, guidance=guidance)
    share = 1.0 if schedule.depth is None else shallow_share(pipeline.unet, schedule.depth, call)
    cost = schedule.cost(share, batch_of(call))
    return {"shallow": share, "cost": cost, "speedup": 1 / cost}


def _text(value: dict[str, Any], schedule: Schedule) -> str:
    lines = [f"{value['out']}: {schedule}"]
    lines.append(f"multiply-adds of the UNet per image: {value['cost']:.1%}, {value['speedup']:.2f} times fewer")
    if (image := value.get("image_ms")) is not None:
        full, own = image["full"], image["scheduled"]
        lines.append(
            f"a whole image in {value['runtime']}: {full:.0f} ms at full schedule, {own:.0f} ms by this one, "
            f"{full / own:.2f} times as fast, by what each kind of step takes there"
        )
    if (error := schedule.made_by.get("latent_error")) is not None:
        lines.append(
            f"change of the final latents: {error:.3g} relative mean squared, on {schedule.made_by['images']} images"
        )
    return "\n".join(lines)
