"""`slimdiff compress`: calibrate, plan, slim."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from deploy.cli import flags
from exporters.settings import TableSettings

DESCRIPTION = "Make a slim model out of a dense one, without training: a diffusers pipeline directory."
EXAMPLE = """examples:
  slimdiff compress demo --out demo-slim --reduce 12%
  slimdiff compress my-checkpoint --out slim --reduce 100M
  slimdiff compress my-checkpoint --out slim --macs 20% --prompts prompts.txt --samples 256
  slimdiff compress my-checkpoint --out slim --speedup 1.35 --runtime onnxruntime
  slimdiff compress my-checkpoint --out slim --max-error 1e-3
  slimdiff compress my-checkpoint --out slim --plan edited-plan.json"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "model", "MODEL", flags.MODEL)
    flags.text(parser, "--out", "DIR", "where the slim model goes", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    flags.add_budget(what)
    flags.text(what, "--plan", "FILE", "the ranks themselves: a plan.json, perhaps edited")
    flags.add(parser, TableSettings, "runtime", "threads")
    flags.add_calibration(parser)
    flags.add_planning(parser)
    flags.text(parser, "--statistics", "FILE", "statistics of this model, instead of calibrating")


def run(args: argparse.Namespace) -> int:
    from deploy.cli.outputs import artifact_folder, check_artifact, check_file
    from deploy.recipe.prompts import calibration_prompts, default_source, described
    from slimdiff.errors import InputError
    from slimdiff.loading.naming import find_model

    out = Path(args.out)
    check_artifact(out)
    find_model(args.model)
    budget, table = flags.read_budget(args), flags.read(args, TableSettings)
    calibration = flags.read_calibration(args)
    by_latency = budget is not None and budget.kind == "speedup"
    if not by_latency and table.model_fields_set:
        raise InputError("--runtime and --threads say where --speedup is measured: give --speedup with them")
    for flag in ("plan", "statistics"):
        if getattr(args, flag):
            check_file(getattr(args, flag), f"--{flag}")
    source = args.prompts or default_source(args.model)
    prompts = calibration_prompts(source, calibration.samples + calibration.sampling.batch)
    planning = flags.read_planning(args)

    from deploy.cli.console import calm_libraries, log, result

    calm_libraries()
    from deploy.artifacts.figures import compression_result, costs, denoiser_of
    from deploy.artifacts.files import copy_licenses, save_pipeline
    from exporters.graphs.pipeline import example_call
    from slimdiff import Compressor, Plan, Statistics, compress
    from slimdiff.calibration import distributed
    from slimdiff.loading.pipelines import load_pipeline
    from slimdiff.storage import manifest

    plan = Plan.load(Path(args.plan)) if args.plan else None
    statistics = Statistics.load(Path(args.statistics)) if args.statistics else None
    pipeline = load_pipeline(args.model)
    sampling = calibration.sampling
    one_call = partial(example_call, pipeline, height=sampling.height, width=sampling.width)
    Compressor(pipeline, prompts, calibration, planning).check([] if budget is None else [budget], call=one_call)
    latency = None
    if by_latency:
        from exporters.latency.table import measure_latency

        latency = measure_latency(denoiser_of(pipeline), one_call(), planning, table)
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
    return result(args, value, _text(value))


def _text(value: dict[str, Any]) -> str:
    from deploy.cli.console import figures

    predicted = value["predicted"].get("latency_ms")
    lines = [f"{value['out']}: {value['sites']} sites slimmed", *figures({**value, "latency_ms": predicted})]
    if predicted:
        lines[-1] += " (predicted)"
    if value["noise_error"] is not None:
        lines.append(f"noise error {value['noise_error']:12.3g}    measured on unseen calls")
    lines += [f"left dense: {row['site']} ({row['reason']})" for row in value["left_dense"]]
    return "\n".join(lines)
