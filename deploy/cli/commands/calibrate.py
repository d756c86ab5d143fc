"""`slimdiff calibrate`: statistics of a model, kept in a file for any number of budgets."""

from __future__ import annotations

import argparse
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.artifacts.numbers import size
from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_file, check_new_file
from deploy.recipe.prompts import described
from slimdiff.errors import InputError
from slimdiff.prompts.material import Material
from slimdiff.settings import CalibrationSettings, OffloadSettings, WeightSettings
from slimdiff.storage.lock import locked, remove_empty

if TYPE_CHECKING:
    from slimdiff import Statistics

DESCRIPTION = """Watch a model make images of the calibration prompts and keep the moments of its inner activations.
Under torchrun or accelerate launch, the processes share the prompts out."""
EXAMPLE = """examples:
  slimdiff calibrate my-checkpoint --out statistics.safetensors --prompts prompts.txt --sensitivities
  slimdiff compress my-checkpoint --out slim --reduce 100M --prompts prompts.txt --statistics statistics.safetensors
  slimdiff calibrate --out both.safetensors --merge one.safetensors other.safetensors
  torchrun --nproc-per-node 2 -m slimdiff calibrate my-checkpoint --out statistics.safetensors --prompts prompts.txt

An interrupted calibration goes on where it stopped when the same command is given again."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "model", "MODEL", f"{flags.MODEL}; none to merge", nargs="?")
    flags.add_pipeline(parser)
    flags.text(parser, "--out", "FILE", "where the statistics go", required=True)
    merged = "statistics of the same model to add: other prompts, seeds"
    flags.text(parser, "--merge", "FILE", merged, nargs="+", default=[])
    measured = "also measure what planning needs of the model: a forward pass for each site and recorded call"
    parser.add_argument("--sensitivities", action="store_true", help=measured)
    flags.add_calibration(parser)
    flags.add_lora(parser)
    flags.add(parser, WeightSettings, "variant")
    flags.add(parser, OffloadSettings, "offload")
    flags.add(parser, CalibrationSettings, "timestep_weights", "tokens_per_dimension", "memory_limit")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if args.model is None and not args.merge:
        raise InputError("name a MODEL to calibrate, or statistics to --merge")
    check_new_file(out, "statistics file")
    for name in args.merge:
        check_file(name, "--merge")
    if args.sensitivities and flags.read(args, OffloadSettings).offload:
        raise InputError(
            "--sensitivities take a forward pass for each site and call, each of which would read all files: leave "
            "out --offload, or them, and plan with --allocation local"
        )
    calibration, variant = flags.read_calibration(args), flags.read(args, WeightSettings).variant
    more = calibration.sampling.batch if args.sensitivities else 0
    source, material = "", Material()
    if args.model is not None:
        source, material = flags.read_material(args, calibration.samples, more)

    from slimdiff.statistics import Statistics, read_metadata

    if out.exists():
        try:
            read_metadata(out)
        except InputError:
            raise InputError(f"--out {out} is there and no statistics file: name another file") from None
    others = [Statistics.load(Path(name)) for name in args.merge]
    started = time.perf_counter()
    if args.model is None:
        return _write(out, others, args, started)

    calm_libraries()
    from deploy.opening.distilled import warn_of_steps
    from slimdiff import Compressor, load_pipeline
    from slimdiff.calibration import distributed
    from slimdiff.denoising.tasks import for_task, make_inputs

    offload = flags.read(args, OffloadSettings).offload
    held = load_pipeline(args.model, variant=variant, lora=args.lora, rest=args.pipeline, offload=offload)
    pipeline = for_task(held, material)
    warn_of_steps(pipeline, args.model, calibration.sampling)
    prompts, sampling = make_inputs(pipeline, material, calibration.sampling)
    calibration = calibration.model_copy(update={"sampling": sampling})
    first, unfinished = distributed.world()[0] == 0, out.absolute().parent / f".{out.name}.unfinished"
    with ExitStack() as until_written:
        if first:
            until_written.enter_context(locked(unfinished, "calibration", out, stays=False))
            until_written.callback(remove_empty, unfinished)
        seen = min(len(prompts), calibration.samples)
        log.info("calibrate: %d prompts %s, %d steps each", seen, described(source), calibration.sampling.steps)
        work = Compressor(pipeline, prompts, calibration, unfinished=unfinished)
        statistics = work.statistics
        if args.sensitivities:
            work.measure()
        distributed.agree(lambda: None)  # until every process has what it needs of the others
        if not first:
            return 0
        code = _write(out, [statistics, *others], args, started)
        shutil.rmtree(unfinished, ignore_errors=True)
    return code


def _write(out: Path, parts: list[Statistics], args: argparse.Namespace, started: float) -> int:
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
    text = f"{out}: {value['sums']} sums over {value['prompts']} prompts, {size(out.stat().st_size)}"
    return result(args, value, text + (f", {value['sensitivities']} sensitivities" if merged.sensitivities else ""))
