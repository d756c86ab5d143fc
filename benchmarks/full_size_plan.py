"""Ranks and int8 in one plan at full size, with random weights: what planning takes, and whether speedups are reached.

`python -m benchmarks.full_size_plan [--model sd15]` prints two Markdown tables. The first is of the time that it takes
to measure every site of all groups, and every layer in int8: on as many calls as plans need, of `--calls`. The second
is of plans for `--speedups` in each runtime: by the runtime's own table, and measured as `slimdiff bench` does, in
pairs of fresh processes. Random weights say nothing of errors, and whatever latency depends on is there. What is made
and measured stays in `--work`: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.full_size import MODELS, Clock, Model, peak_bytes, random_calls
from benchmarks.random_models import random_unet
from exporters.graphs.export import export_unet
from exporters.graphs.quantise import quantise_graph
from exporters.latency.measure import bench
from exporters.latency.pair import Job
from exporters.latency.table import measure_latency
from exporters.layout import GRAPH
from exporters.machine import machine_name, usable_cores
from exporters.settings import BenchSettings, ExportSettings, TableSettings
from slimdiff import Budget, InputError, Plan, PlanSettings, Statistics
from slimdiff.calibration.calibrate import calibrate_on_calls
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.trajectory import Call
from slimdiff.planning.costs import CostTable
from slimdiff.planning.planner import Planner
from slimdiff.slimming.skeleton import skeleton
from slimdiff.storage import manifest
from slimdiff.storage.manifest import replacing

GROUPS = ("query_key", "value_output", "feed_forward", "resnet")
STATISTICS, CLOCKS = "statistics.safetensors", "planning.json"
INT8_CALLS = 2
"""That a graph is calibrated on, for its time alone."""


class Subject:
    """A model of this size on its way to plans; what they share is made when first needed."""

    def __init__(self, model: Model, calls: int, threads: int, work: Path) -> None:
        self.model, self.count, self.threads, self.work = model, calls, threads, work
        self.settings = PlanSettings(groups=GROUPS, precision="int8")

    @cached_property
    def unet(self) -> nn.Module:
        return random_unet(self.model)

    @cached_property
    def planner(self) -> Planner:
        """With sensitivities and what int8 costs, which are measured if they are not kept."""
        calls = random_calls(self.model, self.count)
        recorded = Calls.of(calls, fitting=random_calls(self.model, self.settings.fitting_calls))
        kept = self.work / STATISTICS
        if kept.is_file():
            return Planner(self.unet, Statistics.load(kept), self.settings, calls=recorded)
        peak_bytes(reset=True)
        with Clock() as collecting:
            statistics = calibrate_on_calls(self.unet, calls[:2])
        planner = Planner(self.unet, statistics, self.settings, calls=recorded)
        with Clock() as factorising:
            _ = planner.factors
        with Clock() as slimming:
            _ = planner.sensitivities
        with Clock() as rounding:
            layers = len(planner.int8_errors)
        clocks = {
            "statistics of 2 calls": collecting,
            "factors": factorising,
            f"sensitivities of {len(planner.chosen)} sites": slimming,
            f"what {layers} layers cost in int8": rounding,
        }
        rows = {step: vars(clock) for step, clock in clocks.items()}
        manifest.write_json(self.work / CLOCKS, {"steps": rows, "peak": peak_bytes()})
        planner.remember(statistics, macs_too=True)
        statistics.save(kept)
        return planner

    def table(self, runtime: str) -> CostTable:
        settings = TableSettings(runtime=runtime, threads=self.threads)
        return measure_latency(self.unet, self._call(), self.settings, settings)

    def plan(self, speedup: float, runtime: str) -> Plan:
        table = self.table(runtime)
        planner = self.planner
        planner.costs.latency = table
        return planner.plan(Budget(speedup=speedup))

    def graph(self, plan: Plan | None, name: str) -> Path:
        """The graph of a plan in a folder of this name; the dense one if there is none."""
        folder = self.work / name
        if not folder.is_dir():
            with replacing(folder) as temporary:
                unet = self.unet if plan is None else skeleton(self.unet, plan.ranks())
                export_unet(unet, temporary, self._call())
                if plan is not None and plan.int8():
                    how = ExportSettings(precision="int8")
                    quantise_graph(temporary / GRAPH, unet, self._calls(INT8_CALLS), how, plan)
        return folder / GRAPH

    def measure(self, speedup: float, runtime: str, settings: BenchSettings) -> dict[str, Any]:
        """What a plan predicts of its speedup and what is measured; why it was refused, if it was."""
        try:
            plan = self.plan(speedup, runtime)
        except InputError as error:
            return {"refused": str(error)}
        planned = plan.costs["latency_ms"]
        dense, slim = self.graph(None, "dense"), self.graph(plan, f"{runtime}-{self.threads}-{speedup:g}")
        result = bench(Job("dense", str(dense), runtime), Job("slim", str(slim), runtime), settings)
        return {
            "predicted": planned["dense"] / planned["slim"],
            "parameters": plan.parameters["slim"] / plan.parameters["dense"],
            "int8": len(plan.int8()),
            **{name: result[name] for name in ("speedup", "cpu_speedup")},
        }

    def _calls(self, count: int) -> list[Call]:
        return random_calls(replace(self.model, batch=1), count)

    def _call(self) -> Call:
        return self._calls(1)[0]


def planning_table(clocks: dict[str, Any]) -> str:
    lines = ["| step | time | processor time |", "| --- | --- | --- |"]
    lines += [f"| {s} | {c['wall'] / 60:.1f} min | {c['cpu'] / 60:.1f} min |" for s, c in clocks["steps"].items()]
    wall, cpu = (sum(c[clock] for c in clocks["steps"].values()) / 60 for clock in ("wall", "cpu"))
    lines.append(f"| together | {wall:.1f} min | {cpu:.1f} min |")
    return "\n".join([*lines, "", f"Peak memory: {clocks['peak'] / 2**30:.1f} GiB."])


def speedup_table(rows: dict[str, Any]) -> str:
    lines = ["| runtime | asked | predicted | measured (95 %) | of processor time | parameters | int8 layers |"]
    lines.append("| --- | " + "--- | " * 6)
    for key, row in rows.items():
        runtime, speedup = key.split("/")
        if "refused" in row:
            lines.append(f"| {runtime} | {speedup} | refused: {row['refused']} | | | | |")
            continue
        times = ("{median:.3f} ({low:.3f} to {high:.3f})".format(**row[c]) for c in ("speedup", "cpu_speedup"))
        lines.append(
            f"| {runtime} | {speedup} | {row['predicted']:.3f} | {' | '.join(times)} | {row['parameters']:.0%} "
            f"| {row['int8']} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", choices=tuple(MODELS))
    parser.add_argument(
        "--calls", type=int, default=16, help="recorded, of one guided image each; 2 at least (default: %(default)s)"
    )
    parser.add_argument(
        "--runtime", default="openvino-fp32,onnxruntime", help="an empty text: planning alone (default: %(default)s)"
    )
    parser.add_argument("--speedups", default="1.6,2", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the runtimes (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=3, help="process pairs (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/full-size-plan"), help="default: %(default)s")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("slimdiff").setLevel(logging.INFO)
    if args.calls < 2:
        parser.error("--calls is at least 2: statistics are collected on two")
    work = args.work / f"{args.model}-calls{args.calls}"
    work.mkdir(parents=True, exist_ok=True)
    subject = Subject(MODELS[args.model], args.calls, args.threads, work)
    _ = subject.planner
    settings = BenchSettings(
        threads=args.threads, processes=args.processes, rounds=3, warmup=1, batch=1, max_seconds=3600
    )
    file = work / f"speedups-{args.threads}-{args.processes}.json"
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for runtime in args.runtime.split(",") if args.runtime else []:
        for speedup in map(float, args.speedups.split(",")):
            if (key := f"{runtime}/{speedup:g}") not in rows:
                rows[key] = subject.measure(speedup, runtime, settings)
                manifest.write_json(file, rows)
    print(planning_table(json.loads((work / CLOCKS).read_text(encoding="utf-8"))), speedup_table(rows), sep="\n\n")
    print(
        f"Random weights; {args.threads} threads of the runtimes, at batch 1. {machine_name()}; {usable_cores()} cores"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
