"""`slimdiff compress`: calibrate, plan, slim."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from deploy.cli.flags import add_calibration
from exporters.settings import TABLE_RUNTIMES

EXAMPLE = """examples:
  slimdiff compress demo --out demo-slim --reduce 12%
  slimdiff compress my-checkpoint --out slim --reduce 100M
  slimdiff compress my-checkpoint --out slim --macs 20% --prompts prompts.txt --samples 256
  slimdiff compress my-checkpoint --out slim --speedup 1.35 --runtime onnxruntime
  slimdiff compress my-checkpoint --out slim --max-error 1e-3
  slimdiff compress my-checkpoint --out slim --plan edited-plan.json"""


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
    what.add_argument(
        "--speedup",
        type=float,
        metavar="S",
        help="dense latency over slim latency, such as 1.35, in --runtime",
    )
    what.add_argument("--plan", metavar="FILE", help="the ranks themselves: a plan.json, perhaps edited")
    parser.add_argument("--runtime", choices=TABLE_RUNTIMES, help="where --speedup is measured (default: onnxruntime)")
    parser.add_argument("--threads", type=int, metavar="N", help="of that runtime (default: its own choice)")
    add_calibration(parser)
    parser.add_argument("--statistics", metavar="FILE", help="statistics of this model, instead of calibrating")
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.cli.arguments import plan_settings, settings
    from deploy.cli.outputs import artifact_folder, check_artifact
    from deploy.recipe.prompts import calibration_prompts, default_source, described
    from slimdiff import Budget, CalibrationSettings, Plan, Sampling, Statistics
    from slimdiff.errors import InputError
    from slimdiff.storage import manifest

    out = Path(args.out)
    check_artifact(out)
    sampling = settings(Sampling, args, "steps", "guidance", "batch", "seed", "height", "width")
    calibration = settings(CalibrationSettings, args, "samples", sampling=sampling)
    planning = plan_settings(args)
    plan = Plan.load(Path(args.plan)) if args.plan else None
    budget = None if plan else Budget(args.reduce, macs=args.macs, speedup=args.speedup, max_error=args.max_error)
    if args.speedup is None and (args.runtime or args.threads):
        raise InputError("--runtime and --threads say where --speedup is measured: give --speedup with them")
    statistics = Statistics.load(Path(args.statistics)) if args.statistics else None
    source = args.prompts or default_source(args.model)
    prompts = calibration_prompts(source, calibration.samples + sampling.batch)

    from deploy.cli.console import calm_libraries, log, result

    calm_libraries()
    from deploy.artifacts.figures import compression_result, costs, denoiser_of
    from deploy.artifacts.files import copy_licenses, save_pipeline
    from exporters.graphs.pipeline import example_call
    from slimdiff import compress
    from slimdiff.calibration import distributed
    from slimdiff.loading.pipelines import load_pipeline
    from slimdiff.planning.planner import check_budgets

    pipeline = load_pipeline(args.model)
    one_call = partial(example_call, pipeline, height=sampling.height, width=sampling.width)
    if budget is not None:
        check_budgets(denoiser_of(pipeline), [budget], planning, call=one_call)
    latency = None
    if args.speedup is not None:
        from exporters.latency.table import measure_latency
        from exporters.settings import TableSettings

        chosen = settings(TableSettings, args, "runtime", "threads")
        progress = None if args.quiet else "latency"
        latency = measure_latency(denoiser_of(pipeline), one_call(), planning, chosen, progress=progress)
    call = one_call()
    dense_costs = costs(denoiser_of(pipeline), call)
    used = prompts[: calibration.samples]  # what is left over is for measuring an error on
    log.info("compress: %d prompts %s, %d steps each", len(used), described(source), sampling.steps)
    slim = compress(
        pipeline,
        prompts,
        budget,
        plan=plan,
        latency=latency,
        calibration=calibration,
        planning=planning,
        statistics=statistics,
        release_dense=True,  # its costs are known
        progress=not args.quiet,
    )
    if distributed.world()[0] > 0:  # every process has made the same model
        return 0
    slim_costs = costs(denoiser_of(slim.pipeline), call)
    value = {"out": str(out), **compression_result(slim.plan, dense_costs, slim_costs, slim.seconds)}
    with artifact_folder(out) as temporary:
        save_pipeline(slim.pipeline, temporary)
        copy_licenses(args.model, temporary)
        slim.plan.save(temporary / "plan.json")
        made_from = {
            "model_hash": slim.plan.model_hash,
            "budget": slim.plan.budget,
            "latency": dict(latency.made_from) if latency else None,
            "prompts": manifest.fingerprint(used),
            "calibration": calibration.model_dump(),
            "plan": planning.model_dump(),
        }
        manifest.write_manifest(temporary, "slim-model", made_from)
    log.info("compress: written to %s", out)
    result(value, _text(value), args.json)
    return 0


def _text(value: dict[str, Any]) -> str:
    from deploy.cli.console import amount, change, in_bytes

    lines = [f"{value['out']}: {value['sites']} sites slimmed"]
    for name, show in (("parameters", amount), ("macs", amount), ("bytes", in_bytes)):
        dense, slim = value[name]["dense"], value[name]["slim"]
        lines.append(f"{name:12}{show(dense):>12} -> {show(slim):>12}   {change(dense, slim)}")
    if "latency_ms" in value["predicted"]:
        dense, slim = (value["predicted"]["latency_ms"][side] for side in ("dense", "slim"))
        lines.append(f"{'latency':12}{dense:9.2f} ms -> {slim:9.2f} ms   {change(dense, slim)} (predicted)")
    if value["noise_error"] is not None:
        lines.append(f"noise error {value['noise_error']:12.3g}    measured on unseen calls")
    lines += [f"left dense: {row['site']} ({row['reason']})" for row in value["left_dense"]]
    return "\n".join(lines)
