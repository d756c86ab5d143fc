"""What slimming is worth in each runtime: dense, cut by parameters, and cut for a speedup by the runtime's own table.

`python -m benchmarks.runtimes [--model sd15] [--batch 1,2] [--runtime torch,onnxruntime,openvino]` prints a Markdown
table. Each runtime and batch is a process of its own, and its table of latencies another before it, so that memory is
given back in between. What is measured is kept in `--out`, and not measured again: run it in parts, or after a crash.

Dense and slim run in turn, in pairs of processes. "Predicted" is what the runtime's own table of layers
(`exporters.latency.table`) says of the same ranks; torch in bf16 and torch compiled have no table, and are cut by eager
float32's. Weights are random and slim models are cut without calibration: that costs the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from benchmarks.full_size import MODELS, random_calls
from benchmarks.random_models import random_unet
from benchmarks.ranks import ranks_for_speedup, uniform_ranks
from exporters.latency.measure import bench
from exporters.latency.pair import write_job
from exporters.latency.table import measure_latency
from exporters.machine import machine_name, usable_cores
from exporters.registry import register, runtime_of
from exporters.settings import BenchSettings, TableSettings
from slimdiff.planning.costs import CostTable, count_parameters
from slimdiff.slimming.skeleton import skeleton
from slimdiff.storage import manifest

register(replace(runtime_of("torch"), name="torch-bf16", options={"dtype": "bfloat16"}))
register(replace(runtime_of("torch"), name="torch-compile", options={"compiled": True}))
IN_TORCH = ("torch", "torch-bf16", "torch-compile")
"""Eager in two precisions, and compiled."""
GRAPHS = ("onnxruntime", "openvino", "openvino-fp32")
RUNTIMES = (*IN_TORCH, *GRAPHS)
OWN_TABLE = ("torch", *GRAPHS)
BAR = 0.9
"""How much of the speedup that a runtime's own table predicts is to be reached."""


class Settings(BaseModel):
    """How much is measured."""

    model_config = ConfigDict(extra="forbid")

    threads: int
    """Of the runtime."""
    latency: BenchSettings
    """Of the process pairs; `threads` is set to the above."""
    table: TableSettings
    """Of the latency tables; `runtime` and `threads` are set for each."""
    speedup: float
    """What the second slim model is cut for."""


def latency_table(name: str, batch: int, runtime: str, settings: Settings, cache: Path, unet: nn.Module) -> CostTable:
    """A runtime's table (eager float32's for all that is torch), measured now unless it is in the cache."""
    where = {"runtime": runtime if runtime in GRAPHS else "torch", "threads": settings.threads}
    wanted = TableSettings.model_validate({**settings.table.model_dump(), **where})
    call = random_calls(replace(MODELS[name], batch=batch), 1)[0]
    return measure_latency(unet, call, None, wanted, cache=cache)


def measure(name: str, batch: int, runtime: str, settings: Settings, cache: Path, scratch: Path) -> dict[str, Any]:
    """One runtime's rows at one batch, in this process.

    Args:
        name: of `MODELS`.
        batch: samples per call.
        runtime: of `RUNTIMES`.
        settings: how much is measured.
        cache: folder of latency tables.
        scratch: folder for graphs.

    Returns:
        `variants`: per slim model, its `parameters` and `ranks`, `bench`'s result and, if the runtime has a
        table, the speedup `predicted` and the share of it `reached`; beside what it was measured with.
    """
    model = replace(MODELS[name], batch=batch)
    unet, call = random_unet(model), random_calls(model, 1)[0]
    table = latency_table(name, batch, runtime, settings, cache, unet)
    ranks = {
        f"-{model.budget}": uniform_ranks(unet, model.budget),
        f"{settings.speedup:g}x by table": ranks_for_speedup(unet, table, settings.speedup),
    }
    models = {"dense": unet, **{told: skeleton(unet, chosen) for told, chosen in ranks.items()}}
    counts = {told: count_parameters(each) for told, each in models.items()}
    timing = settings.latency.model_copy(update={"threads": settings.threads})
    variants = {}
    with tempfile.TemporaryDirectory(dir=scratch, prefix="slimdiff-runtimes-") as folder:
        places = [Path(folder) / str(number) for number in range(len(models))]
        jobs = {
            told: write_job(told, each, call, runtime, place)
            for (told, each), place in zip(models.items(), places, strict=True)
        }
        models.clear()
        del unet
        gc.collect()
        for told, chosen in ranks.items():
            found = bench(jobs["dense"], jobs[told], timing)
            row = {"parameters": counts[told], "ranks": chosen, **found}
            if runtime in OWN_TABLE:
                row["predicted"] = table.dense / table.of(chosen)
                row["reached"] = found["speedup"]["median"] / row["predicted"]
            variants[told] = row
    return {
        "model": name,
        "batch": batch,
        "runtime": runtime,
        "parameters": counts["dense"],
        "variants": variants,
        "table": dict(table.made_from),
        "threads": settings.threads,
        "peak": max(v[side]["peak_memory_bytes"] or 0 for v in variants.values() for side in ("baseline", "candidate")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| runtime | batch | UNet | parameters | dense | slim | speedup (95 %) | predicted | reached of that | peak |",
        "| --- | --- | --- | " + "--- | " * 7,
    ]
    for row in rows:
        for told, r in row["variants"].items():
            speedup = "{median:.2f}x ({low:.2f} to {high:.2f})".format(**r["speedup"])
            cells = [row["runtime"], str(row["batch"]), f"{row['model']}, {told}", f"{r['parameters'] / 1e6:,.1f} M"]
            cells += [f"{r[side]['median_ms']:,.0f} ms" for side in ("baseline", "candidate")]
            cells += [speedup, f"{r['predicted']:.2f}x" if "predicted" in r else "-"]
            cells += [f"{r['reached']:.2f}" if "reached" in r else "-", f"{row['peak'] / 2**30:.1f} GiB"]
            lines.append(f"| {' | '.join(cells)} |")
    told = [r for row in rows for r in row["variants"].values()]
    reached = [r["reached"] for r in told if "reached" in r]
    lines += ["", f"Slim is faster in {sum(r['speedup']['low'] > 1 for r in told)} of {len(told)} rows, 95 % sure."]
    if reached:
        lines.append(f"{sum(r >= BAR for r in reached)} of {len(reached)} reach {BAR:g} of what their table predicts.")
    lines.append(f"{machine_name()}; {rows[0]['threads']} threads; random weights.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", choices=tuple(MODELS))
    parser.add_argument("--batch", default="1,2", help="samples per call (default: %(default)s)")
    parser.add_argument("--runtime", default=",".join(RUNTIMES), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: the cores there are")
    parser.add_argument("--processes", type=int, default=4, help="process pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each side in a pair (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="runs before them (default: %(default)s)")
    parser.add_argument("--speedup", type=float, default=1.2, help="to cut for by table (default: %(default)s)")
    parser.add_argument("--table-ranks", type=int, default=4, help="ranks measured per layer (default: %(default)s)")
    parser.add_argument("--table-rounds", type=int, default=10, help="runs of every layer (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/runtimes"), help="default: %(default)s")
    parser.add_argument("--only", choices=("table", "row"), help="measure one here: its table, or its row")
    args = parser.parse_args(argv)
    settings = Settings(
        threads=args.threads,
        latency=BenchSettings(
            processes=args.processes, rounds=args.rounds, warmup=args.warmup, batch=1, max_seconds=3600
        ),
        table=TableSettings(ranks=args.table_ranks, rounds=args.table_rounds),
        speedup=args.speedup,
    )
    cache = args.out / "tables"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only == "table":
        torch.set_num_threads(args.threads)
        unet = random_unet(MODELS[args.model])
        latency_table(args.model, int(args.batch), args.runtime, settings, cache, unet)
        return 0
    if args.only == "row":
        row = measure(args.model, int(args.batch), args.runtime, settings, cache, args.out)
        manifest.write_json(_file(args, settings, args.batch, args.runtime), row)
        return 0
    rows, failed = [], []
    for batch in args.batch.split(","):
        for runtime in args.runtime.split(","):
            file = _file(args, settings, batch, runtime)
            if not file.is_file():
                for step in ("table", "row"):
                    again = [f"--{name}={value}" for name, value in _arguments(args).items()]
                    command = [sys.executable, "-m", "benchmarks.runtimes", f"--only={step}", *again]
                    if subprocess.run([*command, f"--batch={batch}", f"--runtime={runtime}"]).returncode:
                        failed.append(f"{runtime} at batch {batch}: its {step} could not be measured")
                        break
            if file.is_file():
                rows.append(json.loads(file.read_text(encoding="utf-8")))
    print("\n".join([*([table(rows)] if rows else []), *failed]))
    return 1 if failed else 0


def _file(args: argparse.Namespace, settings: Settings, batch: str, runtime: str) -> Path:
    """Where a row is kept: another of other settings, versions or machine has another name."""
    decided = {"settings": settings.model_dump(), "machine": machine_name(), "versions": manifest.versions()}
    return args.out / f"{args.model}-batch{batch}-{runtime}-{manifest.fingerprint(decided)[:8]}.json"


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a process for one row or table takes over."""
    own = ("only", "batch", "runtime")
    return {name.replace("_", "-"): value for name, value in vars(args).items() if name not in own}


if __name__ == "__main__":
    sys.exit(main())
