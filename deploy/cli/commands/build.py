"""`slimdiff build`: the whole chain from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.artifacts import build_folder
from deploy.artifacts.schedules import find_schedule
from deploy.cli import flags
from deploy.cli.console import calm_libraries, figures, result
from deploy.cli.outputs import check_apart, check_folder
from deploy.recipe.material import PICTURES, calibration_material
from deploy.recipe.recipe import load_recipe
from slimdiff.loading.naming import find_model
from slimdiff.settings import PlanSettings

DESCRIPTION = """Calibrate, plan, slim, export, build the engine, validate, compare, bench, report. Finished stages
with unchanged inputs are skipped, an interrupted build goes on where it was. The recipe's gates decide the exit
code."""
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

FORCE = "do a stage and its dependants again"


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "recipe", "RECIPE.yaml", "what to build")
    flags.text(parser, "--out", "DIR", "build folder (default: the recipe's name without its ending)")
    flags.several(parser, "--force", "STAGE", FORCE)
    flags.add(parser, PlanSettings, "precision", default=None)
    ray = "build the cells of a recipe's matrix on Ray: a cluster that sees the same files, or this machine"
    flags.text(parser, "--ray", "ADDRESS", ray, nargs="?", const="local")


def run(args: argparse.Namespace) -> int:
    return run_recipe(Path(args.recipe), args)


def run_recipe(source: Path, args: argparse.Namespace) -> int:
    """Build a recipe file; also what `slimdiff demo` does."""
    asked = getattr(args, f"{PlanSettings.__name__}.precision", None)
    recipe = load_recipe(source, {} if asked is None else {"plan": {"precision": asked}})
    find_model(recipe.model)
    pictures = {name: getattr(recipe, name) for name in PICTURES}
    named = (recipe.model, recipe.prompts, recipe.schedule, *pictures.values(), recipe.compare.reference)
    places = [*named, *(one.file for one in recipe.lora), *(one.weights for one in recipe.compare.metrics.values())]
    read = [place for place in places if isinstance(place, str)]
    out = Path(args.out) if args.out else Path(source.stem)
    check_apart({"--out": out}, read)
    check_folder(out, "build")
    if recipe.prompts is not None:
        calibration_material(recipe.prompts, recipe.calibration.samples, 0, **pictures, classes=recipe.classes)

    find_schedule(recipe.model, recipe.schedule)  # or it is none, and says so now
    calm_libraries()
    from deploy.build import run_build

    whole = run_build(recipe, source.stem, out, args.force, getattr(args, "ray", None))
    report = str(out / build_folder.REPORT)
    gates = [f"gate {g['gate']}: {g['verdict']} ({g['detail']})" for g in whole["gates"]]
    text = [whole["sentence"], "", *figures(whole["figures"]), "", *gates, f"verdict: {whole['verdict']}"]
    value = {"out": str(out), "report": report, **whole}
    return result(args, value, "\n".join([*text, f"report: {report}"]), whole["exit_code"])
