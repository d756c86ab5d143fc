"""Ranks and int8 in one knapsack, against either alone and both with budgets of their own.

`python -m benchmarks.joint [--model demo|things] [--runtime openvino-fp32,onnxruntime] [--speedups 1.5,2]` prints a
Markdown table. Every row reaches the speedup by the runtime's own table (`exporters.latency.table`), so that errors are
held against each other at the same latency:

    ranks          the knapsack of ranks alone
    int8           the knapsack of precisions alone
    int8, ranks    first what an export would put into int8, under `ExportSettings.int8_error`; ranks for what is left
    ranks, int8    first ranks for half of the speedup (its square root); then int8, the cheapest layers first
    joint          one knapsack

Errors are those of the exported graph in the runtime, on calls that calibration has not seen, against the dense model;
the speedup beside them is measured in pairs of processes. What is measured is kept below `--work`: run it in parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.quality.worlds import WORLDS
from exporters.graphs.export import export_unet
from exporters.graphs.pipeline import example_call
from exporters.latency.measure import bench
from exporters.latency.pair import Job
from exporters.latency.table import measure_latency
from exporters.machine import machine_name
from exporters.runtimes.unet import UNet
from exporters.settings import BenchSettings, ExportSettings, TableSettings
from slimdiff import Budget, CalibrationSettings, Compressor, InputError, Plan, PlanSettings
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.costs import CostTable
from slimdiff.planning.precision import choose_int8, layer_plans
from slimdiff.settings import Sampling
from slimdiff.storage import manifest

GROUPS = ("query_key", "value_output", "feed_forward", "resnet")
HELD = 8
"""Calls that errors are taken over, of two images."""


class Subject:
    """A model on its way to plans in a runtime: what they share is made when first needed."""

    def __init__(self, model: str, runtime: str, samples: int) -> None:
        self.world, self.runtime = WORLDS[model](), runtime
        self.pipeline = load_pipeline(self.world.model, "fp32")
        self.sampling = Sampling(steps=20, batch=16, guidance=self.world.guidance, seed=0)
        calibration = CalibrationSettings(samples=samples, sampling=self.sampling)
        prompts = self.world.captions(samples + 16, 0)
        self.work = Compressor(self.pipeline, prompts, calibration, PlanSettings(groups=GROUPS, precision="int8"))
        self.call = example_call(self.pipeline, guidance=self.world.guidance)
        self.held = record_calls(
            self.pipeline, prompts[samples : samples + 2], self.sampling.model_copy(update={"batch": 1, "seed": 7000})
        )
        self.held = self.held[:: len(self.held) // HELD]

    @cached_property
    def table(self) -> CostTable:
        return measure_latency(
            self.pipeline.unet, self.call, self.work.planning, TableSettings(runtime=self.runtime, threads=1)
        )

    def ranks(self, speedup: float) -> Plan:
        """The knapsack of ranks alone."""
        planner = self.work.planner
        planner.settings = planner.settings.model_copy(update={"precision": "own"})
        try:
            return self.work.plan(Budget(speedup=speedup), CostTable("latency_ms", self.table.dense, self.table.layers))
        finally:
            planner.settings = self.work.planning

    def joint(self, speedup: float) -> Plan:
        return self.work.plan(Budget(speedup=speedup), self.table)

    def int8(self, speedup: float) -> Plan:
        """The knapsack of precisions alone: of ranks that save nothing."""
        flat = {path: {1: 0.0, rank: 0.0} for path, rank in self._dense_ranks().items()}
        return self.work.plan(
            Budget(speedup=speedup), CostTable("latency_ms", self.table.dense, flat, {}, self.table.int8)
        )

    def int8_then_ranks(self, speedup: float) -> Plan:
        errors, macs = self.work.planner._int8
        faster = {path for path, curve in self.table.int8.items() if max(curve.values()) > 0}
        int8 = choose_int8({p: e for p, e in errors.items() if p in faster}, macs, ExportSettings().int8_error)
        reached = self.table.dense / self.table.of(self._dense_ranks(), int8)
        plan = self._dense() if speedup <= reached else self._least(lambda rate: self.ranks(rate), int8, speedup)
        return self._with(plan, int8)

    def ranks_then_int8(self, speedup: float) -> Plan:
        plan = self.ranks(speedup**0.5)
        errors, ranks = self.work.planner.int8_errors, plan.ranks()
        saved = {p: self.table.of(ranks) - self.table.of(ranks, [p]) for p in errors}
        order = sorted((p for p in saved if saved[p] > 0), key=lambda p: errors[p] / saved[p])
        for count in range(len(order) + 1):
            if self.table.dense / self.table.of(ranks, order[:count]) >= speedup:
                return self._with(plan, order[:count])
        raise InputError(f"int8 does not reach {speedup:g} from ranks for {speedup**0.5:.3g}")

    def _least(self, plan_at: Callable[[float], Plan], int8: list[str], speedup: float) -> Plan:
        """Ranks for the least speedup of their own with which int8 reaches the speedup."""
        low, high = 1.0 + 1e-3, speedup
        for _ in range(6):
            middle = (low + high) / 2
            reached = self.table.dense / self.table.of(plan_at(middle).ranks(), int8)
            low, high = (middle, high) if reached < speedup else (low, middle)
        return plan_at(high)

    def _dense_ranks(self) -> dict[str, int]:
        return {layer.path: layer.dense_rank for layer in self.work.planner.layers}

    def _dense(self) -> Plan:
        plan = self.ranks(1.05)
        sites = {n: s.model_copy(update={"rank": s.dense_rank}) for n, s in plan.sites.items()}
        return plan.model_copy(update={"sites": sites}).recount()

    def _with(self, plan: Plan, int8: list[str]) -> Plan:
        layers = layer_plans(self.pipeline.unet, int8, self.work.planner.int8_errors, self.table)
        return plan.model_copy(update={"layers": layers})

    def measure(self, plan: Plan) -> dict[str, Any]:
        """Error and latency of the graph of a plan, in the runtime."""
        slim = self.work.slim(plan)
        with TemporaryDirectory(prefix="slimdiff-joint-") as scratch:
            how: Any = {"calibration": self.work.calls.sensitivity, "settings": ExportSettings(precision="int8")}
            dense = export_unet(self.pipeline.unet, Path(scratch) / "dense", self.call)
            file = export_unet(slim, Path(scratch) / "slim", self.call, **(how if plan.int8() else {}))
            opened = UNet.open(file, self.runtime, 1)
            error = noise_error(partial(predict, self.pipeline.unet), lambda call: opened.predict(call), self.held)
            before, after = Job("dense", str(dense), self.runtime), Job("slim", str(file), self.runtime)
            paired = bench(before, after, BenchSettings(threads=1))
            size = sum(f.stat().st_size for f in file.parent.glob("model.onnx*"))
            whole = sum(f.stat().st_size for f in dense.parent.glob("model.onnx*"))
        predicted = self.table.dense / self.table.of(plan.ranks(), plan.int8())
        return {
            "error": error["relative_mse"],
            "speedup": paired["speedup"],
            "predicted": predicted,
            "layers": len(plan.int8()),
            "parameters": plan.parameters["slim"] / plan.parameters["dense"],
            "bytes": size / whole,
        }


WAYS: dict[str, Callable[[Subject, float], Plan]] = {
    "ranks": Subject.ranks,
    "int8": Subject.int8,
    "int8, ranks": Subject.int8_then_ranks,
    "ranks, int8": Subject.ranks_then_int8,
    "joint": Subject.joint,
}
SEPARATE = ("int8, ranks", "ranks, int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WORLDS), default="demo")
    parser.add_argument("--runtime", default="openvino-fp32", help="one or several, with commas between")
    parser.add_argument("--speedups", default="1.5,2", help="by the runtime's own table")
    parser.add_argument("--samples", type=int, default=64, help="prompts of the calibration")
    parser.add_argument("--work", type=Path, default=Path("runs/joint"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for runtime in arguments.runtime.split(","):
        file = arguments.work / f"{arguments.model}-{runtime}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows: dict[str, Any] = manifest.read_json(file) if file.is_file() else {}
        subject: Subject | None = None
        for speedup in map(float, arguments.speedups.split(",")):
            for way, plan_for in WAYS.items():
                if f"{speedup:g}/{way}" in rows:
                    continue
                subject = subject or Subject(arguments.model, runtime, arguments.samples)
                try:
                    rows[f"{speedup:g}/{way}"] = subject.measure(plan_for(subject, speedup))
                except InputError as error:
                    rows[f"{speedup:g}/{way}"] = {"refused": str(error)}
                manifest.write_json(file, rows)
        print(f"\n{arguments.model} in {runtime}, one thread, {machine_name()}\n")
        print("\n".join(_table(rows)))


def _table(rows: dict[str, Any]) -> list[str]:
    lines = ["| speedup asked | plan | noise error | of the better separate | measured (95 %) | int8 layers | file |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for key, row in rows.items():
        speedup, way = key.split("/")
        if "refused" in row:
            lines.append(f"| {speedup} | {way} | cannot be | | | | |")
            continue
        others = [rows.get(f"{speedup}/{name}", {}).get("error") for name in SEPARATE]
        better = min((error for error in others if error is not None), default=None)
        share = "" if better is None else f"{row['error'] / better:.2f}"
        took = "{median:.3f} ({low:.3f} to {high:.3f})".format(**row["speedup"])
        lines.append(
            f"| {speedup} | {way} | {row['error']:.2g} | {share} | {took} | {row['layers']} | {row['bytes']:.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()
