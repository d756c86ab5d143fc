"""`slimdiff sweep`: the frontier of size and latency against fidelity."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.artifacts.numbers import amount
from deploy.cli import flags
from deploy.cli.console import calm_libraries, result
from deploy.cli.outputs import check_folder
from deploy.recipe.recipe import Recipe, SweepStage
from exporters.settings import BenchSettings
from slimdiff.settings import PlanSettings, WeightSettings

DESCRIPTION = """Make a slim model at each of several budgets, measure its noise-prediction error on unseen calls, its
images against the dense model's and its latency, and draw the frontier. Calibration is done once."""
EXAMPLE = """examples:
  slimdiff sweep demo --out demo-sweep
  slimdiff sweep my-checkpoint --out sweep --points 50M,100M,150M
  slimdiff sweep my-checkpoint --out sweep --by macs --points 10%,20%,30% --prompts prompts.txt

DIR gets sweep.json, sweep.html (open it in a browser) and a folder for each point with its plan. Points that are there
and whose inputs have not changed are kept, so more points can be added later."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "model", "MODEL", flags.MODEL)
    flags.text(parser, "--out", "DIR", "where the sweep goes", required=True)
    flags.add(parser, SweepStage, "by", "points", "runtime", "threads", "images")
    flags.add(parser, BenchSettings, "rounds", "processes")
    flags.add_lora(parser)
    flags.add(parser, WeightSettings, "variant")
    flags.add_schedule(parser)
    flags.add_calibration(parser, "input-")
    flags.add(parser, PlanSettings, *flags.PLANNING)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_folder(out, "sweep")
    calibration = flags.read_calibration(args)
    sweep = flags.read(args, SweepStage)
    bench = flags.read(args, BenchSettings, **({"threads": sweep.threads} if sweep.threads else {}))
    flags.read_material(args, calibration.samples)  # whether there is any
    planning = flags.read_planning(args)

    calm_libraries()
    from deploy.build import run_sweep

    variant = flags.read(args, WeightSettings).variant
    chosen = {"calibration": calibration, "plan": planning, "bench": bench, "sweep": sweep, "variant": variant}
    named = {"prompts": args.prompts, "schedule": args.schedule, **flags.named_material(args)}
    recipe = Recipe(model=args.model, lora=tuple(args.lora), **named, **chosen)
    value = {"out": str(out), **run_sweep(recipe, out)}
    return result(args, value, _text(value))


def _text(value: dict[str, Any]) -> str:
    predicted = value["by"] == "speedup"  # else there is no table of latencies
    lines = [f"{'budget':>10}{'parameters':>13}{'MACs/sample':>12}{'speedup':>10}{'noise error':>14}{'PSNR':>10}"]
    lines[0] += f"{'predicted':>12}" * predicted
    for point in value["points"]:
        psnr = point["images"]["psnr_db"] if point["images"] else None
        lines.append(
            f"{point['budget']:>10}{amount(point['parameters']):>13}{amount(point['macs']):>12}"
            f"{point['speedup']['median']:>9.3f}x{point['noise_error']:>14.3g}"
            + (f"{psnr:>7.1f} dB" if psnr is not None else f"{'-':>10}")
        )
        if predicted:
            latency = point["predicted"].get("latency_ms_per_image") or point["predicted"]["latency_ms"]
            lines[-1] += f"{latency['dense'] / latency['slim']:>11.3f}x"
    return "\n".join([*lines, f"{value['runtime']} on {value['machine']}", f"{value['out']}/sweep.html"])
