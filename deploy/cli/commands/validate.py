"""`slimdiff validate`: whether two artifacts of the same model compute the same."""

from __future__ import annotations

import argparse
from typing import Any

from deploy.artifacts.schedules import find_schedule
from deploy.artifacts.usage import usage_of, use
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_runnable
from exporters.registry import names
from slimdiff.errors import InputError, require
from slimdiff.prompts import check_inputs
from slimdiff.settings import SteeringSettings

DESCRIPTION = """Run both artifacts on denoiser calls recorded from a real trajectory, from its first to its last
timestep, and hold their outputs, and the image at its end, against named bounds of the candidate's precision, and the
VAE that a whole CANDIDATE has. BASE computes in float32. Where CANDIDATE has a schedule, both make the image by it, and
what it runs in the place of the whole network is held against BASE's. Where a graph misses the bounds of a model, the
first tensor that diverges in it is named. Exit code 1 if they differ."""
EXAMPLE = """examples:
  slimdiff validate slim slim-onnx
  slimdiff validate demo demo-onnx --runtime openvino-fp32
  slimdiff validate demo demo-onnx-fp16 --every-module --json"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "base", "BASE", "the reference, in fp32: a model, or ONNX")
    flags.text(parser, "candidate", "CANDIDATE", "what is checked: a model, or ONNX")
    bounds = "whose bounds hold (default: the candidate's)"
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16", "int8"), help=bounds)
    parser.add_argument("--runtime", choices=names(), help="what runs the candidate's ONNX (default: onnxruntime)")
    flags.text(parser, "--pipeline", "MODEL", "the model whose trajectory is recorded, if neither is one")
    flags.add_schedule(parser)
    flags.add_variant(parser)
    flags.add_lora(parser, into="BASE")
    flags.add_steering(parser)
    flags.whole(parser, "--calls", "calls, spread over the trajectory", default=5)
    flags.add_usage(parser, "steps", "guidance")
    flags.add_argument(parser)
    neutral = "of the trajectory, whose image, where one is needed, is grey (default: 'a photo')"
    flags.sentence(parser, "--prompt", neutral, default="a photo")
    parser.add_argument(
        "--every-module", action="store_true", help="also hold every module in the graph against the model's own"
    )
    parser.add_argument(
        "--no-image", action="store_true", help="leave out the image, which takes a trajectory of each, and the VAE"
    )


def run(args: argparse.Namespace) -> int:
    asked = flags.read_sampling(args, batch=1)
    check_inputs(args.prompt, where="--prompt")
    check_runnable(args.base, args.candidate, args.pipeline)
    variants = flags.read_variants(args, args.base, args.candidate, args.pipeline)
    require("polygraphy", "onnx")
    calm_libraries()
    from deploy.build import spread
    from deploy.opening.openers import open_denoiser, vae_of
    from deploy.opening.schedules import as_followed
    from exporters.graphs.int8 import processors_for
    from exporters.graphs.reading import read_graph
    from exporters.validation.graph import check_parity
    from exporters.validation.parity import BOUNDS, check_trajectory
    from exporters.validation.parts import bounds_for
    from exporters.validation.scheduled import check_shallow
    from exporters.validation.vae import check_vae, watch_vae
    from slimdiff.denoising.tasks import neutral_inputs
    from slimdiff.denoising.trajectory import record_calls
    from slimdiff.loading.pipelines import load_pipeline

    rest, steering = args.pipeline, flags.read(args, SteeringSettings)
    base = open_denoiser(args.base, variant=variants[args.base], lora=args.lora, rest=rest, steering=steering)
    candidate = open_denoiser(args.candidate, args.runtime, variant=variants[args.candidate], rest=rest)
    if base.precision != "fp32":
        raise InputError(
            f"{args.base} computes in {base.precision}: BASE is the reference and has to be fp32; name the model itself"
        )
    # The inside of a graph is looked at in ONNX Runtime: what another runtime makes of it would not show there.
    inside = base.kind == "model" and candidate.runtime.startswith("onnxruntime")
    if args.every_module and not inside:
        raise InputError(
            "--every-module holds the inside of a graph against its model: BASE a model, CANDIDATE ONNX in onnxruntime"
        )
    pipeline = base.pipeline or candidate.pipeline
    if pipeline is None and args.pipeline:
        pipeline = load_pipeline(args.pipeline, "fp32", variant=variants[args.pipeline])
    if pipeline is None:
        raise InputError("neither artifact is a whole model: say with --pipeline whose trajectory to record")
    asked = use(asked, base.usage or candidate.usage or usage_of(args.pipeline))
    sampling = _unguided(asked, pipeline, base, candidate)
    sampling = candidate.sampling(base.sampling(sampling, pipeline), pipeline)
    sampling = sampling.model_copy(update=base.pixels(pipeline) | candidate.pixels(pipeline))
    prompts, sampling = neutral_inputs(pipeline, sampling.batch, sampling, args.prompt)
    log.info("validate: recording a trajectory of %d steps", sampling.steps)
    calls = spread(record_calls(pipeline, prompts, sampling), args.calls)
    precision: Any = args.precision or candidate.precision
    every = args.every_module
    value = check_parity(base.denoiser, candidate.denoiser, calls, precision=precision, every_module=every)
    pair, schedule = _by_schedule(
        pipeline, base, candidate, find_schedule(args.candidate, args.schedule), args.schedule
    )
    schedule = as_followed(schedule, pipeline, sampling)
    if schedule is not None and schedule.depth is not None:
        bounds = bounds_for(base.denoiser, candidate.denoiser) or BOUNDS[precision]
        value = check_shallow(value, pair[0].unet.passes, pair[1].unet.passes, calls, schedule.depth, bounds)
    if not args.no_image:
        log.info("validate: the image of each%s", f", by the schedule of {schedule}" if schedule else "")
        with watch_vae(getattr(pipeline, "vae", None)) as seen:
            value = check_trajectory(value, pair[0], pair[1], prompts, sampling)
        if seen and (vae := vae_of(candidate, args.candidate)):
            log.info("validate: the VAE")
            of_vae = None if args.precision == "int8" else args.precision  # which is the UNet's alone
            value = check_vae(value, pipeline.vae, vae, seen, precision=of_vae, every_module=every)
    value |= {"reference": f"{base.kind}, {base.precision}", "timesteps": [call.timestep for call in calls]}
    value["schedule"] = schedule and schedule.model_dump(exclude_none=True)
    if candidate.runtime in names("graph"):
        value["processors"] = processors_for(read_graph(candidate.denoiser.session.source))
    return result(args, value, _text(value, precision), 0 if value["passed"] else 1)


def _by_schedule(pipeline: Any, base: Any, candidate: Any, schedule: Any, asked: str | None) -> tuple[list[Any], Any]:
    """The pipeline with the denoiser of each side, by the candidate's schedule; and that schedule, if there is one."""
    from deploy.opening.schedules import with_schedule
    from slimdiff.compression import with_denoiser

    ours, schedule = with_schedule(with_denoiser(pipeline, candidate.denoiser), candidate, schedule, asked)
    return [with_schedule(with_denoiser(pipeline, base.denoiser), base, schedule, "")[0], ours], schedule


def _text(value: dict[str, Any], precision: str) -> str:
    lines = [
        f"{'ok  ' if c['passed'] else 'FAIL'} {c['tensor']} {c['metric']} {c['value']} (bound {c['bound']})"
        for c in value["checks"]
    ]
    same = f"the same, within the bounds of {precision}"
    lines.append(same if value["passed"] else f"they differ, first at {value['first_diverging']}")
    if "processors" in value:
        lines.append(f"right on processors: {value['processors']}")
    place = value["divergence"] or {"kind": None}
    if place["kind"] == "own error":
        size = place["problem"] or f"{place['not_finite']} values are not finite"
        if place["relative_l2"] is not None:
            size = f"relative L2 {place['relative_l2']:.3g}, bound {place['bound']:g}"
        lines.append(f"given the model's own inputs, {place['module']} goes wrong at node {place['node']}: {size}")
    elif place["kind"] == "not finite":
        lines.append(f"{place['not_finite']} values of node {place['node']} are not finite: {place['advice']}")
    elif place["kind"] == "accumulated":
        largest = place["largest"]
        lines.append(
            "every module is right within its bound, the errors add up; the largest is "
            f"{largest['tensor']}'s, relative L2 {largest['relative_l2']:.3g}"
        )
    return "\n".join(lines)


def _unguided(sampling: Any, pipeline: Any, *sides: Any) -> Any:
    """Without guidance where a graph takes no whole number of guided images at a time."""
    from slimdiff.denoising.tasks import samples_per_image

    samples = samples_per_image(pipeline, sampling)
    batches = [side.denoiser.batch for side in sides if side.kind != "model"]
    odd = any(isinstance(batch, int) and batch % samples for batch in batches)
    return sampling.model_copy(update={"guidance": 1.0}) if odd else sampling
