"""`slimdiff calibrate`: statistics of a model, kept in a file for any number of budgets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.flags import add_sampling

EXAMPLE = """examples:
  slimdiff calibrate my-checkpoint --out statistics.safetensors --prompts prompts.txt --sensitivities
  slimdiff compress my-checkpoint --out slim --reduce 100M --prompts prompts.txt --statistics statistics.safetensors
  slimdiff calibrate --out both.safetensors --merge one.safetensors other.safetensors
  torchrun --nproc-per-node 2 -m deploy calibrate my-checkpoint --out statistics.safetensors --prompts prompts.txt

An interrupted calibration goes on where it stopped when the same command is given again."""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "calibrate",
        help="collect a model's statistics into a file, for any number of budgets",
        description="Watch a model make images of the calibration prompts and keep the moments of its inner "
        "activations. Under torchrun or accelerate launch, the processes share the prompts out.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="'demo', a diffusers pipeline directory, or a hub id; none to merge"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="where the statistics go")
    parser.add_argument(
        "--merge",
        nargs="+",
        default=[],
        metavar="FILE",
        help="statistics of the same model to add: other prompts, seeds",
    )
    parser.add_argument(
        "--sensitivities",
        action="store_true",
        help="also measure what planning needs of the model: a forward pass for each site and recorded call",
    )
    add_sampling(parser)
    parser.add_argument(
        "--timestep-weights",
        choices=("uniform", "min_snr", "inverse_snr"),
        help="how much each timestep counts (default: uniform)",
    )
    parser.add_argument(
        "--tokens-per-dimension", type=int, metavar="N", help="tokens a site sees per dimension (default: 64)"
    )
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="of moments at a time (default: 2)")
    return parser


def run(args: argparse.Namespace) -> int:
    import shutil
    import time

    from deploy.arguments import settings
    from deploy.prompts import calibration_prompts, default_source, described
    from slimdiff import CalibrationSettings, Sampling, Statistics, distributed
    from slimdiff.errors import InputError
    from slimdiff.statistics import read_metadata

    out = Path(args.out)
    if out.exists():
        try:
            read_metadata(out)
        except InputError:
            raise InputError(f"--out {out} is there and no statistics file: name another") from None
    if args.model is None and not args.merge:
        raise InputError("name a MODEL to calibrate, or statistics to --merge")
    others = [Statistics.load(Path(name)) for name in args.merge]

    from deploy.console import calm_libraries, log, result

    started = time.perf_counter()
    unfinished = out.absolute().parent / f".{out.name}.unfinished"
    if args.model is not None:
        sampling = settings(Sampling, args, "steps", "guidance", "batch", "seed", "height", "width")
        names = ("samples", "timestep_weights", "tokens_per_dimension", "memory_limit")
        calibration = settings(CalibrationSettings, args, *names, sampling=sampling)
        source = args.prompts or default_source(args.model)
        prompts = calibration_prompts(source, calibration.samples)
        calm_libraries()
        from slimdiff import PlanSettings, calibrate
        from slimdiff.compression import measure
        from slimdiff.pipelines import load_pipeline

        pipeline = load_pipeline(args.model)
        log.info("calibrate: %d prompts %s, %d steps each", len(prompts), described(source), sampling.steps)
        progress = None if args.quiet else "calibrate"
        statistics = calibrate(pipeline, prompts, calibration, unfinished=unfinished, progress=progress)
        if args.sensitivities:
            measure(pipeline, prompts, calibration, PlanSettings(), statistics, progress=progress)
        rank, _ = distributed.world()
        distributed.agree(None, None)  # until every process has what it needs of the others
        if rank > 0:
            return 0
        others = [statistics, *others]
    merged = others[0].merge(*others[1:]) if len(others) > 1 else others[0]
    merged.save(out)
    shutil.rmtree(unfinished, ignore_errors=True)
    log.info("calibrate: written to %s", out)
    value = {
        "out": str(out),
        "prompts": merged.made_from.get("prompts"),
        "sums": len(merged.tokens),
        "merged": len(args.merge),
        "sensitivities": len(merged.sensitivities),
        "bytes": out.stat().st_size,
        "seconds": round(time.perf_counter() - started, 3),
    }
    result(value, _text(value), args.json)
    return 0


def _text(value: dict[str, Any]) -> str:
    from deploy.console import in_bytes

    text = f"{value['out']}: {value['sums']} sums over {value['prompts']} prompts, {in_bytes(value['bytes'])}"
    return text + (f", {value['sensitivities']} sensitivities" if value["sensitivities"] else "")
