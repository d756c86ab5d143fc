"""How often `slimdiff bench` cries wolf, and how often it misses a slowdown, on this machine as it is.

`python -m benchmarks.gate_study [--runs 100]` runs the command on the embedded model: against itself, and against
itself with 7 % more work, in turn, and prints how often each verdict came, with exact binomial intervals, and how long
it took. Every run is appended to `runs/gate-study/runs.jsonl`; what is there is not run again, so it can be stopped and
resumed, and several may work at it side by side, each kept on a core of its own (`taskset`).

The slowdown is planted in the graph: matrix products of the input that come to almost nothing are added to the output.
How many is settled by measuring, in process pairs, on the same machine; what it came to is the mean over all process
pairs of the runs, and stands in the table.
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
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from exporters.latency.measure import bench
from exporters.latency.pair import Job
from exporters.machine import machine_name
from exporters.settings import BenchSettings
from slimdiff.storage import manifest

WIDTH, DEPTH = 64, 8
UNITS = 757
"""Of work that take about as long as the embedded model: where the search for an amount begins."""
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
    (out / manifest.MANIFEST).unlink(missing_ok=True)
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
    jobs = [Job(path.parent.name, str(path), "onnxruntime") for path in (dense, slower)]
    settings = BenchSettings(processes=pairs, max_seconds=3600)
    found = bench(jobs[0], jobs[1], settings)
    speedup = found["speedup"]
    return {"ratio": exp(fmean(found["log_ratios"])), "low": 1 / speedup["high"], "high": 1 / speedup["low"]}


def calibrated(dense: Path, folder: Path, wanted: float, pairs: int) -> dict[str, Any]:
    """Find how much work makes the graph slower by `wanted`; the graph is then `folder/slower/model.onnx`.

    Each amount that is measured, with more pairs the second time, draws the line through no work anew, which gives the
    next. What it came to is told by the runs of the study, which are many more.
    """
    file = folder / "calibration.json"
    if file.is_file() and json.loads(file.read_text())["wanted"] == wanted:
        return json.loads(file.read_text())
    units, tried = round(wanted * UNITS), []
    for part in (1, 2):
        shutil.rmtree(folder / "tried", ignore_errors=True)
        found = slowdown(dense, plant(dense, folder / "tried", units), part * pairs)
        tried.append({"units": units, "pairs": part * pairs, **found})
        weights, work, slower = (np.array([row[key] for row in tried]) for key in ("pairs", "units", "ratio"))
        per_unit = float((weights * work * (slower - 1)).sum() / (weights * work**2).sum())
        units = max(1, round(wanted / max(per_unit, wanted / (4 * units))))
    shutil.rmtree(folder / "tried", ignore_errors=True)
    shutil.rmtree(folder / "slower", ignore_errors=True)
    plant(dense, folder / "slower", units)
    value = {"wanted": wanted, "units": units, "tried": tried}
    manifest.write_json(file, value)
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


def slower_by(runs: list[dict[str, Any]]) -> str:
    """By how much the candidate was slower, over all process pairs of all runs, with 95 %.

    A run ends early where its pairs are convincing, which moves the mean a little; where nearly all come to one
    verdict, there is hardly anything that it could select.
    """
    ratios = [ratio for run in runs for ratio in run["log_ratios"]]
    mean, half = fmean(ratios), 1.96 * stdev(ratios) / len(ratios) ** 0.5
    return f"{exp(mean) - 1:+.2%} ({exp(mean - half) - 1:+.2%} to {exp(mean + half) - 1:+.2%})"


def table(runs: list[dict[str, Any]], tolerance: str) -> str:
    """Verdicts by kind of run, as Markdown."""
    lines = [
        "| candidate | slower by, over all process pairs (95 %) | runs | pass | fail | inconclusive "
        "| share of fail (95 %) | seconds, median | longest | process pairs | their scatter, median |",
        "| --- " * 11 + "|",
    ]
    for kind in KINDS:
        of_kind = [run for run in runs if run["kind"] == kind]
        if not of_kind:
            continue
        counts = [sum(run["verdict"] == verdict for run in of_kind) for verdict in VERDICTS]
        exact = binomtest(counts[1], len(of_kind)).proportion_ci(method="exact")
        seconds, pairs = [run["seconds"] for run in of_kind], [run["process_pairs"] for run in of_kind]
        name = "the same" if kind == "same" else "with more work"
        lines.append(
            f"| {name} | {slower_by(of_kind)} | {len(of_kind)} | " + " | ".join(map(str, counts)) + " "
            f"| {counts[1] / len(of_kind):.1%} ({exact.low:.1%} to {exact.high:.1%}) | {median(seconds):.0f} "
            f"| {max(seconds):.0f} | {median(pairs):g} ({min(pairs)} to {max(pairs)}) "
            f"| {median(run['scatter'] for run in of_kind):.1%} |"
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
        from deploy.cli.commands.bench import written

        with manifest.replacing(folder / "dense") as temporary:
            written("demo", "onnxruntime", 2, temporary)
    if "slower" in kinds:
        calibrated(dense, folder, arguments.slowdown, arguments.pairs)
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
    print(table(runs, arguments.tolerance))


if __name__ == "__main__":
    main()
