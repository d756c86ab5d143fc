"""How often `slimdiff bench` cries wolf, and how often it misses a slowdown, on this machine as it is.

`python -m benchmarks.gate_study [--runs 100]` runs the command on the embedded model: against itself, and against
itself with 7 % more work, in turn, and prints how often each verdict came, with exact binomial intervals, and how long
it took. Every run is appended to `runs/gate-study/runs.jsonl`; what is there is not run again, so it can be stopped and
resumed, and several may work at it side by side, each kept on a core of its own (`taskset`).

The slowdown is planted in the graph: matrix products of the input that come to almost nothing are added to the output.
How many is settled by measuring, in process pairs, on the same machine, and measured again at the end of the search on
fresh pairs; the table says what it came to.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from exporters.gate.measure import BenchSettings, bench
from exporters.gate.pair import Job
from exporters.machine import machine_name
from slimdiff import artifacts

WIDTH, DEPTH = 64, 8
KINDS = ("same", "slower")
VERDICTS = ("pass", "fail", "inconclusive")


def plant(graph: Path, out: Path, units: int) -> Path:
    """Copy an fp32 graph with more work in it.

    Args:
        graph: `model.onnx`, with an input `sample` and one output.
        out: folder of the copy.
        units: of work, each some 260,000 multiply-accumulates and 4,096 hyperbolic tangents for 512 latents.

    Returns:
        the copy's `model.onnx`.
    """
    import onnx
    from onnx import helper, numpy_helper

    shutil.copytree(graph.parent, out)
    (out / artifacts.MANIFEST).unlink(missing_ok=True)
    model = onnx.load(str(out / graph.name), load_external_data=False)
    result = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}/dense" if name == result else name for name in node.output]
        node.input[:] = [f"{name}/dense" if name == result else name for name in node.input]
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([-1, WIDTH]), "planted/shape"),
            numpy_helper.from_array(np.array([units, 1]), "planted/times"),
            numpy_helper.from_array(weights, "planted/weights"),
            numpy_helper.from_array(np.array(1e-9, np.float32), "planted/share"),
        ]
    )
    nodes = [
        helper.make_node("Reshape", ["sample", "planted/shape"], ["planted/rows"]),
        helper.make_node("Tile", ["planted/rows", "planted/times"], ["planted/0"]),
    ]
    for layer in range(DEPTH):
        nodes.append(helper.make_node("MatMul", [f"planted/{layer}", "planted/weights"], [f"planted/{layer}/product"]))
        nodes.append(helper.make_node("Tanh", [f"planted/{layer}/product"], [f"planted/{layer + 1}"]))
    nodes += [
        helper.make_node("ReduceMean", [f"planted/{DEPTH}"], ["planted/mean"], keepdims=0),
        helper.make_node("Mul", ["planted/mean", "planted/share"], ["planted/nothing"]),
        helper.make_node("Add", [f"{result}/dense", "planted/nothing"], [result]),
    ]
    model.graph.node.extend(nodes)
    onnx.save(model, str(out / graph.name))
    return out / graph.name


def slowdown(dense: Path, slower: Path, pairs: int) -> dict[str, float]:
    """Time of one graph over another's, over process pairs: `ratio`, `low`, `high` (95 %)."""
    jobs = [Job(path.parent.name, str(path), "onnx", "onnxruntime") for path in (dense, slower)]
    settings = BenchSettings(processes=pairs, max_seconds=3600)
    found = bench(jobs[0], jobs[1], settings, progress="calibrate")
    speedup = found["speedup"]
    return {"ratio": exp(fmean(found["log_ratios"])), "low": 1 / speedup["high"], "high": 1 / speedup["low"]}


def calibrated(dense: Path, folder: Path, wanted: float, pairs: int) -> dict[str, Any]:
    """Find how much work makes the graph slower by `wanted`; the graph is then `folder/slower/model.onnx`.

    Two amounts are measured, the line through no work and them gives the amount, and the graph with that is measured.
    """
    file = folder / "calibration.json"
    if file.is_file() and json.loads(file.read_text())["wanted"] == wanted:
        return json.loads(file.read_text())
    units, tried = 8, []
    for _ in range(2):
        shutil.rmtree(folder / "tried", ignore_errors=True)
        found = slowdown(dense, plant(dense, folder / "tried", units), pairs)
        tried.append({"units": units, **found})
        units = max(1, round(units * wanted / max(found["ratio"] - 1, 0.005)))
    by_work = np.array([[t["units"], 1e2 * (t["ratio"] - 1)] for t in tried])
    # Through nothing for nothing, by least squares.
    per_unit = float((by_work[:, 0] @ by_work[:, 1]) / (by_work[:, 0] @ by_work[:, 0]))
    units = max(1, round(1e2 * wanted / per_unit))
    shutil.rmtree(folder / "tried", ignore_errors=True)
    shutil.rmtree(folder / "slower", ignore_errors=True)
    found = slowdown(dense, plant(dense, folder / "slower", units), 2 * pairs)
    value = {"wanted": wanted, "units": units, "pairs": 2 * pairs, "measured": found, "tried": tried}
    artifacts.write_json(file, value)
    return value


def one_run(dense: Path, candidate: Path, tolerance: str, max_seconds: float) -> dict[str, Any]:
    """Run the command as a user would."""
    command = [sys.executable, "-m", "deploy", "bench", str(dense.parent), str(candidate.parent)]
    command += ["--tolerance", tolerance, "--max-seconds", str(max_seconds), "--quiet", "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1, 4):
        raise SystemExit(f"slimdiff bench ended with {done.returncode}")
    value = json.loads(done.stdout)
    kept = ("verdict", "speedup", "cpu_speedup", "process_pairs", "log_ratios", "scatter", "hints")
    return {**{name: value[name] for name in kept}, "seconds": round(time.perf_counter() - start, 2)}


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def next_kind(runs: list[dict[str, Any]], kinds: list[str], wanted: int) -> str | None:
    """The kind that has been run least; None if there are enough of each."""
    counts = {kind: sum(run["kind"] == kind for run in runs) for kind in kinds}
    least = min(counts, key=counts.__getitem__)
    return least if counts[least] < wanted else None


def table(runs: list[dict[str, Any]], calibration: dict[str, Any] | None, tolerance: str) -> str:
    """Verdicts by kind of run, as Markdown."""
    lines = [
        "| candidate | runs | pass | fail | inconclusive | share of fail (95 %) | seconds, median | longest "
        "| process pairs |",
        "| --- " * 9 + "|",
    ]
    measured = calibration["measured"] if calibration else None
    for kind in KINDS:
        of_kind = [run for run in runs if run["kind"] == kind]
        if not of_kind:
            continue
        counts = [sum(run["verdict"] == verdict for run in of_kind) for verdict in VERDICTS]
        exact = binomtest(counts[1], len(of_kind)).proportion_ci(method="exact")
        seconds, pairs = [run["seconds"] for run in of_kind], [run["process_pairs"] for run in of_kind]
        name = "the same"
        if kind == "slower" and measured:
            name = f"{measured['ratio'] - 1:.2%} slower ({measured['low'] - 1:.2%} to {measured['high'] - 1:.2%})"
        lines.append(
            f"| {name} | {len(of_kind)} | " + " | ".join(map(str, counts)) + f" | {counts[1] / len(of_kind):.1%} "
            f"({exact.low:.1%} to {exact.high:.1%}) | {median(seconds):.0f} | {max(seconds):.0f} "
            f"| {median(pairs):g} ({min(pairs)} to {max(pairs)}) |"
        )
    return "\n".join([f"Tolerance {tolerance}, {machine_name()}.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="of each kind, those that are there included")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of same (itself), slower (7 %% planted)")
    parser.add_argument("--slowdown", type=float, default=0.07, help="to be planted")
    parser.add_argument("--tolerance", default="5%")
    parser.add_argument("--max-seconds", type=float, default=140.0, help="of the command")
    parser.add_argument("--pairs", type=int, default=12, help="process pairs of each measurement of the planted work")
    parser.add_argument("--out", type=Path, default=Path("runs/gate-study"))
    arguments = parser.parse_args()
    folder, kinds = arguments.out, arguments.kinds.split(",")
    dense = folder / "dense" / "model.onnx"
    if not dense.is_file():
        from deploy.commands.bench import exported

        with artifacts.replacing(folder / "dense") as temporary:
            exported("demo", "onnxruntime", 2, temporary)
    calibration = None
    if "slower" in kinds:
        calibration = calibrated(dense, folder, arguments.slowdown, arguments.pairs)
    file = folder / "runs.jsonl"
    candidates = {"same": dense, "slower": folder / "slower" / "model.onnx"}
    runs = read_runs(file)
    with tqdm(total=len(kinds) * arguments.runs, unit="run") as bar:
        while kind := next_kind(runs, kinds, arguments.runs):
            bar.n = sum(run["kind"] in kinds for run in runs)
            bar.refresh()
            run = one_run(dense, candidates[kind], arguments.tolerance, arguments.max_seconds)
            with file.open("a") as stream:
                stream.write(json.dumps({"kind": kind, **run}) + "\n")
            runs = read_runs(file)
    print(table(runs, calibration, arguments.tolerance))


if __name__ == "__main__":
    main()
