"""Where a build keeps what: the names of its folders and files, and reading them.

    build.json      gates, verdict, figures, stages, versions, machine, recipe; written last of all but the report
    report.html     the report, a copy of report/report.html
    calibrate/      statistics, calibrate.json
    sensitivity/    sensitivity.json: what planning measures by forward passes, whatever the budget
    plan/           plan.json (a `slimdiff.Plan`), summary.json
    slim/           the slim model, a diffusers pipeline directory, with slim.json (the result of `slimdiff compress`)
    export/         dense/ and slim/ (ONNX of the denoiser), export.json
    engine/         the engine and engine.json, or engine.json with {"skipped": reason} alone
    validate/       validate.json: parity of the exported slim model with the slim model in torch
    compare/        compare.json, images/NN-dense.png, NN-slim.png, NN-slim_onnx.png
    bench/          bench.json: paired latency of dense and slim
    sweep/          sweep.json: the frontier, if the recipe asks for it; its points are in point-.../
    cells/NAME/     export/, engine/, validate/, bench/ of one cell of the matrix, if the recipe asks for one
    report/         report.html

Every folder has a `manifest.json`, whose `made_from.key` is the stage's key. Paths inside JSON are relative to the
build folder. JSON is strict: what is infinite or undefined is null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from slimdiff.errors import InputError
from slimdiff.storage.manifest import read_json, read_manifest

STAGES = ("calibrate", "sensitivity", "plan", "slim", "export", "engine", "validate", "compare", "bench", "report")
"""The stages of a build, in order; each has a folder of its name."""

CELLS = "cells"
"""The folder with a build of its own for every cell of a recipe's matrix."""

SWEEP = "sweep"
"""The stage that a build has only if its recipe says so."""

BUILD = "build.json"
REPORT = "report.html"
STATISTICS = "calibrate/statistics.safetensors"
PLAN = "plan/plan.json"
IMAGES = "compare/images"


def result_file(stage: str) -> str:
    """The file with a stage's result, relative to the build folder: `bench` -> `bench/bench.json`."""
    return BUILD if stage == "build" else f"{stage}/{stage}.json"


def read(build_folder: Path, stage: str) -> dict[str, Any]:
    """A stage's result, or with `build` the summary of the whole.

    Raises:
        InputError: if it is not there or is not JSON.
    """
    file = build_folder / result_file(stage)
    if not file.is_file():
        raise InputError(f"{build_folder} has no {result_file(stage)}: it is not a finished build")
    try:
        value = read_json(file)
    except InputError as error:
        raise InputError(f"{error}: build again with --force {stage}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object: build again with --force {stage}")
    return value


def read_verdict(build_folder: Path) -> dict[str, Any]:
    """The summary of the whole, if it is of what the folder holds now.

    A build that was stopped halfway has some stages that are newer than its last verdict.

    Raises:
        InputError: if there is none, or a stage was made again since.
    """
    whole = read(build_folder, "build")
    try:
        keys = {str(stage["name"]): stage["key"] for stage in whole["stages"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{build_folder / BUILD} does not say how its stages were made: build again") from error
    for name, key in keys.items():
        if read_manifest(build_folder / name)["made_from"].get("key") != key:
            raise InputError(
                f"{build_folder} is not a finished build: {name} was made again after its verdict: give the "
                "command that builds it again, which goes on where it stopped"
            )
    return whole


def strict(value: Any) -> Any:
    """`value` as strict JSON can hold it: NaN and infinities become null, tuples lists, paths strings."""
    return to_jsonable_python(value, inf_nan_mode="null")
