"""What is measured: the device's peaks, and dense against slim UNets in one runtime, dtype and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.engine import tensorrt_run
from benchmarks.gpu.layers import measure_layers, thin
from benchmarks.gpu.timing import interval, median, runner, timed
from benchmarks.gpu.unets import DTYPES, build, count, find_layers, make_inputs, model_of
from benchmarks.ranks import ranks_for_speedup, uniform_ranks

RUNTIMES = ("eager", "graph", "compile", "compile-graph", "tensorrt")
VARIANTS = ("dense", "parameters", "latency")
TABLE_DTYPE, TABLE_BATCH = "fp16", 2
"""What the table of layers' latencies is measured in, on a GPU; in fp32 on a CPU."""


def why_not(runtime: str, device: str) -> str | None:
    """Why a runtime is not measured here, if it is not."""
    if runtime in ("graph", "compile-graph", "tensorrt") and device != "cuda":
        return "needs a GPU"
    if runtime == "tensorrt" and not all(map(find_spec, ("tensorrt", "onnx", "onnxscript"))):
        return "needs tensorrt, onnx and onnxscript, which are not all installed"
    return None


def measure_peaks(device: str, dtypes: Sequence[str]) -> dict[str, float]:
    """FLOP/s of a large matrix product per dtype, and bytes/s of a large copy (read and written): this device's own."""
    size, megabytes = (8192, 2048) if device == "cuda" else (512, 64)
    peaks = {}
    for name in dtypes:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2))
        best = min(timed({"": lambda a=a, b=b: a @ b}, device, 20)[""])  # type: ignore[misc]
        peaks[name] = 2 * size**3 / best
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    peaks["bytes"] = 2 * source.numel() / min(timed({"": lambda: target.copy_(source)}, device, 20)[""])
    return peaks


def make_plans(name: str, device: str, speedup: float, rounds: int) -> dict[str, Any]:
    """Ranks of every variant, with what they cost, and the table that one of them is by."""
    model = model_of(name, TABLE_BATCH)
    unet = build(model, {}, "meta", torch.float32)
    layers = find_layers(unet)
    dtype = DTYPES[TABLE_DTYPE if device == "cuda" else "fp32"]
    measured = [thin(layer) for layer in layers]
    table, whole = measure_layers(model, measured, device, dtype, rounds)
    ranks: dict[str, dict[str, int]] = {
        "dense": {},
        "parameters": uniform_ranks(unet, model.budget, layers),
        "latency": ranks_for_speedup(unet, table, speedup, measured),
    }
    plans: dict[str, Any] = {v: {"ranks": ranks[v], **count(model, ranks[v])} for v in VARIANTS}
    plans["latency"] |= {"asked": speedup, "expected": table.dense / table.of(ranks["latency"])}
    return {**plans, "table": table.layers, "whole": whole}


@torch.no_grad()
def measure_cell(
    name: str,
    plans: Mapping[str, Any],
    runtime: str,
    dtype: str,
    batch: int,
    device: str,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """All variants in one runtime, dtype and batch: milliseconds, and speedups over the dense one with intervals."""
    model = model_of(name, batch)
    inputs = make_inputs(model, device, DTYPES[dtype])
    runs = {}
    for variant in VARIANTS:
        unet = build(model, plans[variant]["ranks"], device, DTYPES[dtype])
        runs[variant] = tensorrt_run(unet, inputs) if runtime == "tensorrt" else runner(unet, inputs, runtime)
    times = timed(runs, device, rounds, seconds)
    cell: dict[str, Any] = {"rounds": len(times["dense"])}
    if device == "cuda":
        cell["peak_memory"] = torch.cuda.max_memory_allocated()
    for variant in VARIANTS:
        ratios = [d / s for d, s in zip(times["dense"], times[variant], strict=True)]
        low, high = interval(ratios) if variant != "dense" else (1.0, 1.0)
        cell[variant] = {
            "median_ms": median(times[variant]) * 1e3,
            "p90_ms": float(torch.tensor(times[variant], dtype=torch.float64).quantile(0.9)) * 1e3,
            "speedup": {"median": median(ratios), "low": low, "high": high},
            "finite": bool(torch.isfinite(runs[variant]()).all()),
        }
    return cell
