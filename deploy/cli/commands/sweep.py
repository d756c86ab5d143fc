"""`slimdiff sweep`: the frontier of size and latency against fidelity."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.cli.flags import add_calibration
from deploy.recipe.recipe import POINTS
from exporters.settings import TABLE_RUNTIMES

EXAMPLE = """examples:
  slimdiff sweep demo --out demo-sweep
  slimdiff sweep my-checkpoint --out sweep --points 50M,100M,150M
  slimdiff sweep my-checkpoint --out sweep --by macs --points 10%,20%,30% --prompts prompts.txt

DIR gets sweep.json, sweep.html (open it in a browser) and a folder for each point with its plan. Points that are there
and whose inputs have not changed are kept, so more points can be added later."""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "sweep",
        help="the frontier: size and latency against fidelity, as JSON and as a page",
        description="Make a slim model at each of several budgets, measure its noise-prediction error on unseen calls, "
        "its images against the dense model's and its latency, and draw the frontier. Calibration is done once.",
        epilog=EXAMPLE,
    )
    parser.add_argument("model", metavar="MODEL", help="'demo', a diffusers pipeline directory, or a hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the sweep goes")
    parser.add_argument("--by", choices=tuple(POINTS), default="parameters", help="unit of the points (%(default)s)")
    parser.add_argument("--points", metavar="LIST", help="budgets such as 5%%,10%%,20%% (default: a few of each unit)")
    parser.add_argument("--runtime", choices=TABLE_RUNTIMES, default="onnxruntime", help="of the latency (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of that runtime (default: its own choice)")
    parser.add_argument("--rounds", type=int, metavar="N", help="pairs of runs per point (default: 30)")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="images per point (default: %(default)s)")
    add_calibration(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.cli.arguments import plan_settings, settings
    from deploy.cli.outputs import check_folder
    from deploy.recipe.recipe import Recipe, SweepStage, point_budget
    from exporters.settings import LatencySettings
    from slimdiff import CalibrationSettings, Sampling
    from slimdiff.errors import InputError
    from slimdiff.storage.manifest import LOCK

    out = Path(args.out)
    check_folder(out, LOCK, "sweep.json")
    sampling = settings(Sampling, args, "steps", "guidance", "batch", "seed", "height", "width")
    calibration = settings(CalibrationSettings, args, "samples", sampling=sampling)
    planning = plan_settings(args)
    bench = settings(LatencySettings, args, "rounds")
    points = [part.strip() for part in (args.points or POINTS[args.by]).split(",") if part.strip()]
    if not points:
        raise InputError("--points is empty: name budgets such as 5%,10%,20%")
    for text in points:
        point_budget(args.by, text)
    sweep = settings(SweepStage, args, "by", "runtime", "threads", "images", points=points)

    from deploy.cli.console import calm_libraries, result

    calm_libraries()
    from deploy.build import run_sweep

    recipe = Recipe(
        model=args.model, prompts=args.prompts, calibration=calibration, plan=planning, bench=bench, sweep=sweep
    )
    value = {"out": str(out), **run_sweep(recipe, out)}
    result(value, _text(value), args.json)
    return 0


def _text(value: dict[str, Any]) -> str:
    from deploy.cli.console import amount

    lines = [f"{'budget':>10}{'parameters':>13}{'MACs':>12}{'speedup':>10}{'noise error':>14}{'PSNR':>10}"]
    if value["by"] == "speedup":
        lines[0] += f"{'predicted':>12}"
    for point in value["points"]:
        psnr = point["images"]["psnr_db"] if point["images"] else None
        lines.append(
            f"{point['budget']:>10}{amount(point['parameters']):>13}{amount(point['macs']):>12}"
            f"{point['speedup']['median']:>9.3f}x{point['noise_error']:>14.3g}"
            + (f"{psnr:>7.1f} dB" if psnr is not None else f"{'-':>10}")
        )
        if value["by"] == "speedup":  # else there is no table of latencies
            latency = point["predicted"]["latency_ms"]
            lines[-1] += f"{latency['dense'] / latency['slim']:>11.3f}x"
    return "\n".join([*lines, f"{value['runtime']} on {value['machine']}", f"{value['out']}/sweep.html"])
