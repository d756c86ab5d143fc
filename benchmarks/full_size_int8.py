"""Int8 at full size, dense and slim, with random weights: file sizes, peak memory of making them, and latency.

`python -m benchmarks.full_size_int8 [--model sd15]` prints two Markdown tables. Each UNet is a process of its own, for
its peak memory; what is made and measured stays in `--work`, so that an interrupted run goes on where it was. Every
convolution and linear but the time layers is in int8: costs measured at random weights would say nothing. Latency is
that of pairs of fresh processes that run in turn, as `slimdiff bench` measures it; on a busy machine their processor
time, which on one thread is latency without waits for others, says more.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.full_size import MODELS, Clock, Model, peak_bytes, random_calls
from benchmarks.random_models import random_unet
from benchmarks.ranks import uniform_ranks
from exporters.graphs.export import export_unet
from exporters.graphs.quantise import quantise_graph
from exporters.latency.measure import bench
from exporters.latency.pair import Job
from exporters.layout import GRAPH
from exporters.machine import machine_name, usable_cores
from exporters.registry import runtime_of
from exporters.settings import BenchSettings, ExportSettings
from slimdiff.denoising.trajectory import predict
from slimdiff.models import plan_of
from slimdiff.plan import LayerPlan, Plan
from slimdiff.planning.costs import count_bytes, count_parameters
from slimdiff.slimming.skeleton import skeleton
from slimdiff.storage import manifest
from slimdiff.storage.manifest import replacing

UNETS = ("dense-fp32", "dense-int8", "slim-fp32", "slim-int8")
"""In the order that they are made: an int8 graph is made of the fp32 one before it."""
PAIRS = (
    ("dense-int8", "slim-int8"),
    ("dense-fp32", "slim-int8"),
    ("dense-fp32", "dense-int8"),
    ("dense-fp32", "slim-fp32"),
)
"""Baseline and candidate; what bars are about comes first."""
RUNTIMES = ("openvino-fp32", "openvino", "onnxruntime")
PASSES = 3.5
"""What putting a UNet into int8 takes, in calls of torch for every recorded one: its ranges, what comes into stretches,
and the quantiser's own pass."""
CALLS_BESIDE, SECONDS_BESIDE = 3, 60
"""What it takes besides, in calls and in seconds: biases are corrected, and graphs taken apart."""


def make(name: str, unet_name: str, model: Model, calls: int, work: Path) -> dict[str, Any]:
    """Make one UNet's graph in a folder of `work`, in this process.

    Args:
        name: of the configuration.
        unet_name: of `UNETS`.
        model: the configuration.
        calls: that int8 is calibrated on.

    Returns:
        `parameters`, `weights` (bytes in fp32), `wall` and `cpu` (seconds), `peak` (bytes), `bytes` (of the graph's
        files), and of int8 `share` (of the multiply-adds) and `layers` (how many are in int8).
    """
    variant, _, precision = unet_name.partition("-")
    unet: Any = random_unet(model)
    if variant == "slim":
        unet = skeleton(unet, uniform_ranks(unet, model.budget))
    gc.collect()
    recorded = random_calls(model, calls)
    with Clock() as clock:
        predict(unet, recorded[0])
    _say(f"{name}, {unet_name}: about {_seconds(precision, calls, clock.wall) / 60:.0f} min")
    row: dict[str, Any] = {"parameters": count_parameters(unet), "weights": count_bytes(unet)}
    peak_bytes(reset=True)
    with replacing(work / unet_name) as folder, Clock() as clock:
        if precision == "fp32":
            export_unet(unet, folder, recorded[0])
        else:
            shutil.copytree(work / f"{variant}-fp32", folder, dirs_exist_ok=True)
            settings = ExportSettings(precision="int8")
            report = quantise_graph(folder / GRAPH, unet, recorded, settings, all_in_int8(unet, plan_of(unet)))
            row |= {"share": report["share"], "layers": len(report["layers"])}
        row["bytes"] = sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))
    return row | {"wall": clock.wall, "cpu": clock.cpu, "peak": peak_bytes()}


def all_in_int8(unet: nn.Module, plan: Plan | None) -> Plan:
    """A plan that puts every linear and convolution but the time layers into int8."""
    if plan is None:
        count = count_parameters(unet)
        sizes = {"dense": count, "slim": count}
        about = {"model_class": type(unet).__name__, "model_hash": "", "allocation": "uniform", "align": 1}
        plan = Plan.model_validate({**about, "sites": {}, "parameters": sizes})
    layers = [path for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    plan.layers = {path: LayerPlan(precision="int8") for path in layers if "time_emb" not in path}
    return plan


def _seconds(precision: str, calls: int, call: float) -> float:
    return 30 + 4 * call if precision == "fp32" else SECONDS_BESIDE + (PASSES * calls + CALLS_BESIDE) * call


def measure(pair: tuple[str, str], runtime: str, settings: BenchSettings, work: Path) -> dict[str, Any]:
    """`bench`'s result of two UNets of `work` in a runtime."""
    baseline, candidate = (Job(name, str(work / name / GRAPH), runtime) for name in pair)
    return bench(baseline, candidate, settings)


def table(name: str, made: dict[str, dict[str, Any]], measured: dict[str, dict[tuple[str, str], Any]]) -> str:
    """The rows as Markdown; what is not measured is left out."""
    lines = [
        "| UNet | parameters | files | of dense fp32 | multiply-adds in int8 | made in | processor time | peak |",
        "| --- | " + "--- | " * 7,
    ]
    whole = made[UNETS[0]]["bytes"]
    for unet, row in made.items():
        peak = f"{row['peak'] / 2**30:.1f} GiB"
        int8 = f"{row['share']:.1%}, {row['layers']} layers" if "share" in row else "-"
        lines.append(
            f"| {name}, {unet} | {row['parameters'] / 1e6:,.1f} M | {row['bytes'] / 1e6:,.0f} MB "
            f"| {row['bytes'] / whole:.3f} | {int8} | {row['wall']:.0f} s | {row['cpu']:.0f} s | {peak} |"
        )
    lines += ["", "| runtime | UNet | against | a call | speedup (95 %) | of processor time | peak |"]
    lines.append("| --- | " + "--- | " * 6)
    for runtime, results in measured.items():
        for (baseline, candidate), result in results.items():
            side = result["candidate"]
            clocks = ("{median:.2f}x ({low:.2f} to {high:.2f})".format(**result[c]) for c in ("speedup", "cpu_speedup"))
            calls = f"{result['baseline']['median_ms']:,.0f} to {side['median_ms']:,.0f} ms"
            peak = f"{(side['peak_memory_bytes'] or 0) / 2**30:.1f} GiB"
            lines.append(f"| {runtime} | {candidate} | {baseline} | {calls} | {' | '.join(clocks)} | {peak} |")
    return "\n".join(lines)


def bars(made: dict[str, dict[str, Any]], measured: dict[str, dict[tuple[str, str], Any]]) -> list[str]:
    """What was asked of slim int8, and whether it is reached."""
    lines = []
    if len(made) == len(UNETS):
        share = made["slim-int8"]["bytes"] / made["dense-fp32"]["bytes"]
        lines.append(f"Files of slim int8 are {share:.3f} of dense fp32's (bar: 0.3 at most).")
    for runtime, results in measured.items():
        for baseline, bar in (("dense-int8", "1.15"), ("dense-fp32", "1.6, and 2 with VNNI")):
            if (pair := (baseline, "slim-int8")) in results and "openvino" in runtime:
                times = results[pair]["speedup"]["median"]
                lines.append(f"{runtime}: slim int8 is {times:.2f} times as fast as {baseline} (bar: {bar}).")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", choices=tuple(MODELS))
    parser.add_argument("--batch", type=int, default=1, help="samples per call (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2, help="that int8 is calibrated on (default: %(default)s)")
    parser.add_argument("--runtime", default=",".join(RUNTIMES), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=3, help="process pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each side in a pair (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/full-size-int8"), help="default: %(default)s")
    parser.add_argument("--only", choices=UNETS, help="make one of them here")
    args = parser.parse_args(argv)
    model = replace(MODELS[args.model], batch=args.batch)
    work = args.work / f"{args.model}-batch{args.batch}-calls{args.calls}"
    work.mkdir(parents=True, exist_ok=True)
    if args.only:
        manifest.write_json(work / f"{args.only}.json", make(args.model, args.only, model, args.calls, work))
        return 0
    made: dict[str, dict[str, Any]] = {}
    for unet in UNETS:
        if not (work / f"{unet}.json").is_file():
            again = [f"--model={args.model}", f"--batch={args.batch}", f"--calls={args.calls}", f"--work={args.work}"]
            subprocess.run([sys.executable, "-m", "benchmarks.full_size_int8", f"--only={unet}", *again], check=True)
        made[unet] = json.loads((work / f"{unet}.json").read_text(encoding="utf-8"))
    settings = BenchSettings(
        threads=args.threads,
        processes=args.processes,
        rounds=args.rounds,
        warmup=1,
        batch=args.batch,
        max_seconds=3600,
    )
    measured: dict[str, dict[tuple[str, str], Any]] = {}
    for runtime in args.runtime.split(","):
        runtime_of(runtime, "graph")
        for pair in PAIRS:
            file = work / f"{runtime}-{args.threads}-{'-'.join(pair)}.json"
            if not file.is_file():
                _say(f"{args.model}, {runtime}: {pair[1]} against {pair[0]}")
                manifest.write_json(file, measure(pair, runtime, settings, work))
            result = json.loads(file.read_text(encoding="utf-8"))
            measured.setdefault(runtime, {})[pair] = result
            _say("{median:.2f}x, in {seconds:.0f} s".format(**result["speedup"], seconds=result["seconds"]))
    print("\n".join([table(args.model, made, measured), "", *bars(made, measured)]))
    print(f"Random weights; batch {args.batch}, int8 calibrated on {args.calls} calls; {args.threads} threads.")
    print(f"{machine_name()}; {usable_cores()} cores")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
