"""The command: cells one after the other, and the file that they are kept in."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import benchmarks.gpu
from benchmarks.full_size import MODELS
from benchmarks.gpu.attention import measure_attention
from benchmarks.gpu.cells import RUNTIMES, make_plans, measure_cell, measure_peaks, why_not
from benchmarks.gpu.pictures import measure_pictures
from benchmarks.gpu.report import table_of
from benchmarks.gpu.unets import DTYPES
from slimdiff.schedule import ScheduleSettings
from slimdiff.storage import manifest


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.manual_seed(0)
    started = time.monotonic()
    file = Path(args.out)
    result = open_result(file, machine(args.device))
    missing = [dtype for dtype in args.dtype if dtype not in result["peaks"]]
    if missing or "bytes" not in result["peaks"]:
        result["peaks"] |= measure_peaks(args.device, missing)
        manifest.write_json(file, result)
    if "attention" in args.part:
        for dtype in args.dtype:
            if dtype not in result["attention"]:
                tokens = 4096 if args.device == "cuda" else 64
                result["attention"][dtype] = measure_attention(args.device, DTYPES[dtype], args.rounds, tokens)
                manifest.write_json(file, result)
    left = picture_cells(args, result, file, started) if "pictures" in args.part else 0
    for cell in cells(args) if "unet" in args.part else ():
        key = "/".join(map(str, cell))
        if key in result["cells"]:
            continue
        if why := why_not(cell[1], args.device):
            result["cells"][key] = {"skipped": why}
        elif time.monotonic() - started > 60 * args.minutes:
            left += 1
        else:
            measure(cell, key, args, result, file)
    manifest.write_json(file, result)
    print(table_of(result))
    if left:
        print(f"\n{left} cells are left: run it again with the same --out.")


def picture_cells(args: Any, result: dict[str, Any], file: Path, started: float) -> int:
    """Measure whole pictures; gives how many cells are left."""
    left = 0
    how = ScheduleSettings(guidance_interval=args.guidance_interval, deep_every=args.deep_every)
    runtimes = [runtime for runtime in args.runtime if runtime in ("eager", "graph")]
    for runtime, images, model in product(runtimes, args.batch, args.model):
        key = f"{model}/{runtime}/{images}"
        if key in result["pictures"] or why_not(runtime, args.device):
            continue
        if time.monotonic() - started > 60 * args.minutes:
            left += 1
            continue
        result["pictures"][key] = measure_pictures(
            *(model, plans_of(model, args, result, file), how, runtime, args.dtype, images),
            *(args.device, args.rounds, args.seconds, args.steps),
        )
        manifest.write_json(file, result)
    return left


def plans_of(model: str, args: Any, result: dict[str, Any], file: Path) -> dict[str, Any]:
    """The plans of a model, made and written if they are not there."""
    if model not in result["plans"]:
        result["plans"][model] = make_plans(model, args.device, args.speedup, args.rounds)
        manifest.write_json(file, result)
    return result["plans"][model]


def measure(cell: tuple[str, str, str, int], key: str, args: Any, result: dict[str, Any], file: Path) -> None:
    """Measure one cell, with the plans of its model before it if they are not there, and write the file."""
    model, runtime, dtype, batch = cell
    plans = plans_of(model, args, result, file)
    begun = time.monotonic()
    torch.compiler.reset()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result["cells"][key] = measure_cell(model, plans, runtime, dtype, batch, args.device, args.rounds, args.seconds)
    manifest.write_json(file, result)
    print(f"{key}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def cells(args: Any) -> Iterator[tuple[str, str, str, int]]:
    """What takes long to compile comes last."""
    for runtime in sorted(args.runtime, key=RUNTIMES.index):
        for model in args.model:
            for dtype in args.dtype:
                for batch in args.batch:
                    yield model, runtime, dtype, batch


def open_result(file: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, on this machine alone."""
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if result and result["machine"] != here:
        raise SystemExit(f"{file} was measured elsewhere ({result['machine']}): name another --out")
    return {"machine": here, "peaks": {}, "plans": {}, "cells": {}, "pictures": {}, "attention": {}} | result


def machine(device: str) -> dict[str, Any]:
    """The device, and the versions that its times depend on."""
    here: dict[str, Any] = {"python": platform.python_version()}
    here |= manifest.versions(("torch", "diffusers", "triton", "tensorrt"))
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        here |= {"gpu": gpu.name, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        here |= {"capability": f"sm{gpu.major}{gpu.minor}", "memory": gpu.total_memory}
    else:
        here["cpu"] = platform.processor() or platform.machine()
    return here


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, on_gpu = made.add_argument, torch.cuda.is_available()

    def several(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            wrong = set(text.split(",")) - set(known)
            if wrong:
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: there is {', '.join(known)}")
            return text.split(",")

        return parse

    add("--model", type=several(list(MODELS)), default=["sd15", "sdxl"])
    add("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    add("--dtype", type=several(list(DTYPES)), default=["fp16", "bf16"] if on_gpu else ["fp32"])
    add("--batch", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2, 4, 8])
    add("--runtime", type=several(RUNTIMES), default=list(RUNTIMES))
    add("--part", type=several(("unet", "pictures", "attention")), default=["unet"])
    add("--speedup", type=float, default=1.35, help="of the latency-budgeted UNet (default: 1.35)")
    add("--steps", type=int, default=25, help="of a picture (default: 25)")
    add("--guidance-interval", default="0:0.5", help="of the schedule of pictures (default: 0:0.5)")
    add("--deep-every", type=int, default=3, help="steps from one whole call to the next (default: 3)")
    add("--rounds", type=int, default=60, help="runs of each UNet in a cell, at most (default: 60)")
    add("--seconds", type=float, default=20, help="of timing in a cell, about, at most (default: 20)")
    add("--minutes", type=float, default=9, help="no cell is begun after these (default: 9)")
    add("--out", default="gpu.json", help="kept up after every cell, and gone on with (default: gpu.json)")
    return made
