"""`slimdiff build`: the whole chain from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  slimdiff build recipe.yaml --out build

recipe.yaml, at least:
  model: path/to/diffusers-directory
  budget: {reduce: 25%}

calibrated with the built-in general prompts unless it says  prompts: prompts.txt

stages: calibrate, plan, slim, export, engine, validate, compare, bench, report;
and sweep, before the report, if the recipe has  sweep: {points: [5%, 10%, 20%]};
further exports of the slim model, each with its parity, engine or latency, in cells/, if it has
  matrix: {targets: [onnxruntime, sm89], shapes: [512x512, 4x512x512], precision: [fp16]}"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "build",
        help="the whole chain from a recipe; finished stages with unchanged inputs are skipped",
        description="Calibrate, plan, slim, export, build the engine, validate, compare, bench, report. Finished "
        "stages with unchanged inputs are skipped, an interrupted build goes on where it was. The recipe's gates "
        "decide the exit code.",
        epilog=EXAMPLE,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="what to build")
    parser.add_argument("--out", metavar="DIR", help="build folder (default: the recipe's name without its ending)")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="do a stage and its dependants again"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="build the cells of a recipe's matrix on Ray: a cluster that sees the same files, or this machine",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    return run_recipe(Path(args.recipe), args)


def run_recipe(source: Path, args: argparse.Namespace) -> int:
    """Build a recipe file; also what `slimdiff demo` does."""
    from deploy.artifacts import build_folder
    from deploy.cli.outputs import check_folder
    from slimdiff.errors import InputError
    from slimdiff.storage.manifest import LOCK

    if not source.is_file():
        raise InputError(f"{source}: no such recipe")
    out = Path(args.out) if args.out else Path(source.stem)
    check_folder(out, LOCK, build_folder.BUILD)

    from deploy.cli.console import calm_libraries, result

    calm_libraries()
    from deploy.build import run_build
    from deploy.recipe.recipe import load_recipe

    whole = run_build(load_recipe(source), source.stem, out, args.force, getattr(args, "ray", None))
    result({"out": str(out), "report": str(out / build_folder.REPORT), **whole}, _text(out, whole), args.json)
    return whole["exit_code"]


def _text(out: Path, whole: dict[str, Any]) -> str:
    from deploy.artifacts import build_folder
    from deploy.cli.console import amount, change, in_bytes

    shown = {"parameters": amount, "macs": amount, "bytes": in_bytes, "latency_ms": lambda ms: f"{ms:.2f} ms"}
    lines = [whole["sentence"], ""]
    for name, show in shown.items():
        figure = whole["figures"][name]
        if figure:
            dense, slim = figure["dense"], figure["slim"]
            lines.append(f"{name.removesuffix('_ms'):12}{show(dense):>12} -> {show(slim):>12}   {change(dense, slim)}")
    lines.append("")
    lines += [f"gate {g['gate']}: {g['verdict']} ({g['detail']})" for g in whole["gates"]]
    return "\n".join([*lines, f"verdict: {whole['verdict']}", f"report: {out / build_folder.REPORT}"])
