"""The summary of a build: its figures, its gates and what they come to, and one sentence for people."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from deploy.artifacts.figures import machine
from deploy.artifacts.hashes import public_name
from deploy.artifacts.numbers import amount
from deploy.build import cells as matrix
from deploy.build.gates import EXIT_CODE, judge, overall
from deploy.build.stages import Done, Stage
from deploy.recipe.recipe import Recipe
from slimdiff.storage import manifest

_ALLOCATIONS = {
    "global": "one knapsack over measured sensitivities",
    "local": "one knapsack over local errors",
    "uniform": "the same share of all",
    "softmax": "shares by block influence",
}


def summary(recipe: Recipe, folder: Path, name: str, stages: Sequence[Stage], done: Sequence[Done]) -> dict[str, Any]:
    """What `build.json` holds, from the results of the stages."""
    figures: dict[str, Any] = {}
    for stage in stages:
        if stage.figures is not None:
            figures |= stage.figures(build_folder.read(folder, stage.name))
    results = {stage: build_folder.read(folder, stage) for stage in ("slim", "validate", "compare", "bench")}
    cells = matrix.results(recipe, folder)
    gates = [*judge(recipe.gates, results), *matrix.judge_cells(recipe.gates, cells)]
    verdict = overall(gates)
    calibrated = manifest.read_manifest(folder / "calibrate")["made_from"]["inputs"]
    return build_folder.strict(
        {
            "schema": manifest.SCHEMA,
            "name": name,
            "model": public_name(recipe.model),
            "sentence": sentence(recipe, results),
            "verdict": verdict,
            "exit_code": EXIT_CODE[verdict],
            "gates": gates,
            "figures": figures,
            "cells": cells,
            "stages": [vars(stage) for stage in done],
            "seconds": round(sum(stage.seconds for stage in done), 3),
            "versions": {"python": platform.python_version(), **manifest.versions()},
            "machine": machine(),
            "made_from": {
                "recipe": manifest.fingerprint(_public(recipe)),
                "model": calibrated["model"],
                "prompts": calibrated["prompts"],
            },
            "recipe": _public(recipe),
        }
    )


def _public(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.model_dump(mode="json", by_alias=True)
    settings["model"] = public_name(recipe.model)
    if isinstance(recipe.prompts, str):
        settings["prompts"] = Path(recipe.prompts).name
    return settings


def sentence(recipe: Recipe, results: dict[str, dict[str, Any]]) -> str:
    """The build in one sentence, which claims no speed that was not measured."""
    dense, slim = (results["slim"]["parameters"][side] for side in ("dense", "slim"))
    text = (
        f"slimdiff took {100 * (dense - slim) / dense:.1f} % of the parameters out of the denoiser of "
        f"{public_name(recipe.model)} ({amount(dense)} to {amount(slim)}) at {results['slim']['sites']} sites, "
        f"chosen by {_ALLOCATIONS[recipe.plan.allocation]}, without any training"
    )
    bench = results["bench"]
    if "skipped" in bench:
        return f"{text}."
    low, median, high = (bench["speedup"][k] for k in ("low", "median", "high"))
    if low <= 1 <= high:
        return (
            f"{text}; whether a denoiser call became faster was not settled (interval {low:.2f} to {high:.2f} times)."
        )
    pace = f"{median:.2f} times faster" if low > 1 else f"slower, at {median:.2f} times the dense speed"
    return f"{text}; one denoiser call is {pace} in {bench['runtime']}."
