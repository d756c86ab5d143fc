"""`slimdiff calibrate`: statistics of a model, kept in a file for any number of budgets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cli.flags import add_sampling

if TYPE_CHECKING:
    from contextlib import ExitStack

    from slimdiff import Statistics

EXAMPLE = """examples:
  slimdiff calibrate my-checkpoint --out statistics.safetensors --prompts prompts.txt --sensitivities
  slimdiff compress my-checkpoint --out slim --reduce 100M --prompts prompts.txt --statistics statistics.safetensors
  slimdiff calibrate --out both.safetensors --merge one.safetensors other.safetensors
  torchrun --nproc-per-node 2 -m slimdiff calibrate my-checkpoint --out statistics.safetensors --prompts prompts.txt

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
    from contextlib import ExitStack

    from deploy.cli.outputs import check_writable
    from slimdiff.calibration import distributed
    from slimdiff.errors import InputError
    from slimdiff.statistics import Statistics, read_metadata

    out = Path(args.out)
    if out.exists():
        try:
            read_metadata(out)
        except InputError:
            raise InputError(f"--out {out} is there and no statistics file: name another") from None
    if args.model is None and not args.merge:
        raise InputError("name a MODEL to calibrate, or statistics to --merge")
    check_writable(out.absolute().parent)
    others = [Statistics.load(Path(name)) for name in args.merge]
    started = time.perf_counter()
    if args.model is None:
        return _write(out, others, args, started)
    with ExitStack() as until_written:
        unfinished = out.absolute().parent / f".{out.name}.unfinished"
        statistics = _calibrate(args, out, unfinished, until_written)
        if distributed.world()[0] > 0:
            return 0
        code = _write(out, [statistics, *others], args, started)
        shutil.rmtree(unfinished, ignore_errors=True)
    return code


def _calibrate(args: argparse.Namespace, out: Path, unfinished: Path, until_written: ExitStack) -> Statistics:
    from deploy.cli.arguments import settings
    from deploy.cli.console import calm_libraries, log
    from deploy.recipe.prompts import calibration_prompts, default_source, described
    from slimdiff import CalibrationSettings, Sampling
    from slimdiff.calibration import distributed
    from slimdiff.storage.lock import locked, remove_empty

    sampling = settings(Sampling, args, "steps", "guidance", "batch", "seed", "height", "width")
    names = ("samples", "timestep_weights", "tokens_per_dimension", "memory_limit")
    calibration = settings(CalibrationSettings, args, *names, sampling=sampling)
    source = args.prompts or default_source(args.model)
    prompts = calibration_prompts(source, calibration.samples)
    calm_libraries()
    from slimdiff import PlanSettings, calibrate
    from slimdiff.compression import measure
    from slimdiff.loading.pipelines import load_pipeline

    pipeline = load_pipeline(args.model)
    if distributed.world()[0] == 0:
        until_written.enter_context(locked(unfinished, "calibration", out))
        until_written.callback(remove_empty, unfinished)
    log.info("calibrate: %d prompts %s, %d steps each", len(prompts), described(source), sampling.steps)
    progress = None if args.quiet else "calibrate"
    statistics = calibrate(pipeline, prompts, calibration, unfinished=unfinished, progress=progress)
    if args.sensitivities:
        measure(pipeline, prompts, calibration, PlanSettings(), statistics, progress=progress)
    distributed.agree(None, None)  # until every process has what it needs of the others
    return statistics


def _write(out: Path, parts: list[Statistics], args: argparse.Namespace, started: float) -> int:
    import time

    from deploy.cli.console import log, result

    merged = parts[0].merge(*parts[1:]) if len(parts) > 1 else parts[0]
    merged.save(out)
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
    from deploy.cli.console import in_bytes

    text = f"{value['out']}: {value['sums']} sums over {value['prompts']} prompts, {in_bytes(value['bytes'])}"
    return text + (f", {value['sensitivities']} sensitivities" if value["sensitivities"] else "")
