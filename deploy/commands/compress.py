"""`slimdiff compress`: calibrate, plan, slim."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = """examples:
  slimdiff compress demo --out demo-slim --reduce 12%
  slimdiff compress my-checkpoint --out slim --reduce 100M --prompts prompts.txt --samples 64
  slimdiff compress my-checkpoint --out slim --macs 20% --prompts prompts.txt
  slimdiff compress my-checkpoint --out slim --plan edited-plan.json --prompts prompts.txt"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "compress",
        help="calibrate, plan, slim; writes a diffusers pipeline directory",
        description="Make a slim model out of a dense one, without training: a diffusers pipeline directory.",
        epilog=EXAMPLE,
    )
    parser.add_argument("model", metavar="MODEL", help="'demo', a diffusers pipeline directory, or a hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the slim model goes")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--reduce", metavar="AMOUNT", help="what goes out of the denoiser: 100M, or 12%% of all its parameters"
    )
    what.add_argument("--macs", metavar="AMOUNT", help="likewise in multiply-accumulates of one call: 50G, or 20%%")
    what.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="the smallest model whose noise prediction changes by at most this (relative mean squared), measured",
    )
    what.add_argument("--plan", metavar="FILE", help="the ranks themselves: a plan.json, perhaps edited")
    parser.add_argument("--prompts", metavar="FILE", help="calibration prompts, one a line (default for demo: its own)")
    parser.add_argument("--samples", type=int, metavar="N", help="how many prompts to calibrate with (default: 64)")
    parser.add_argument("--groups", metavar="LIST", help="of query_key,value_output,feed_forward (default: all)")
    parser.add_argument("--align", type=int, metavar="N", help="ranks are multiples of this (default: 8)")
    parser.add_argument("--allocation", choices=("global", "uniform"), help="how ranks are chosen (default: global)")
    parser.add_argument("--statistics", metavar="FILE", help="statistics of this model, instead of calibrating")
    for name, kind, text in (
        ("steps", int, "scheduler steps per image (default: 20)"),
        ("guidance", float, "guidance scale (default: 5)"),
        ("batch", int, "prompts at a time (default: 8)"),
        ("seed", int, "of the first prompt's noise (default: 0)"),
        ("height", int, "pixels (default: the model's)"),
        ("width", int, "pixels (default: the model's)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.arguments import given, settings
    from deploy.outputs import artifact_folder, check_folder
    from deploy.prompts import EMBEDDED, calibration_prompts
    from slimdiff import Budget, CalibrationSettings, Plan, PlanSettings, Sampling, Statistics, artifacts
    from slimdiff.errors import InputError

    out = Path(args.out)
    check_folder(out, artifacts.MANIFEST)
    sampling = settings(Sampling, args, "steps", "guidance", "batch", "seed", "height", "width")
    calibration = settings(CalibrationSettings, args, "samples", sampling=sampling)
    planning = settings(PlanSettings, args, "align", "allocation", **given(groups=_groups(args.groups)))
    plan = Plan.load(Path(args.plan)) if args.plan else None
    budget = None if plan else Budget(args.reduce, macs=args.macs, max_error=args.max_error)
    statistics = Statistics.load(Path(args.statistics)) if args.statistics else None
    if args.prompts is None and args.model != "demo":
        raise InputError("--prompts is missing: name a text file of calibration prompts, one a line")
    prompts = calibration_prompts(args.prompts or EMBEDDED, calibration.samples + sampling.batch)

    from deploy.console import calm_libraries, log, result

    calm_libraries()
    from deploy.figures import costs
    from deploy.pipeline_files import save_pipeline
    from deploy.steps import compression_result
    from deploy.workshop import denoiser_of
    from exporters.pipeline_export import example_call
    from slimdiff import compress
    from slimdiff.costs import count_parameters
    from slimdiff.pipelines import load_pipeline

    pipeline = load_pipeline(args.model)
    if budget is not None and budget.kind == "parameters":
        budget.removed(count_parameters(denoiser_of(pipeline)))  # refuse it before the long work, not after
    used = prompts[: calibration.samples]  # what is left over is for measuring an error on
    log.info("compress: %d prompts, %d steps each", len(used), sampling.steps)
    slim = compress(
        pipeline,
        prompts,
        budget,
        plan=plan,
        calibration=calibration,
        planning=planning,
        statistics=statistics,
        progress=not args.quiet,
    )
    call = example_call(pipeline, height=sampling.height, width=sampling.width)
    dense_costs, slim_costs = (costs(denoiser_of(p), call) for p in (pipeline, slim.pipeline))
    value = {"out": str(out), **compression_result(slim.plan, dense_costs, slim_costs, slim.seconds)}
    with artifact_folder(out) as temporary:
        save_pipeline(slim.pipeline, temporary)
        slim.plan.save(temporary / "plan.json")
        made_from = {
            "model_hash": slim.plan.model_hash,
            "budget": slim.plan.budget,
            "prompts": artifacts.fingerprint(used),
            "calibration": calibration.model_dump(),
            "plan": planning.model_dump(),
        }
        artifacts.write_manifest(temporary, "slim-model", made_from)
    log.info("compress: written to %s", out)
    result(value, _text(value), args.json)
    return 0


def _groups(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",")) if text else None


def _text(value: dict[str, Any]) -> str:
    from deploy.console import amount, change, in_bytes

    lines = [f"{value['out']}: {value['sites']} sites slimmed"]
    for name, show in (("parameters", amount), ("macs", amount), ("bytes", in_bytes)):
        dense, slim = value[name]["dense"], value[name]["slim"]
        lines.append(f"{name:12}{show(dense):>12} -> {show(slim):>12}   {change(dense, slim)}")
    if value["noise_error"] is not None:
        lines.append(f"noise error {value['noise_error']:12.3g}    measured on unseen calls")
    lines += [f"left dense: {row['site']} ({row['reason']})" for row in value["left_dense"]]
    return "\n".join(lines)
