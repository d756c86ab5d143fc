"""Running a build, from a recipe to a report and a verdict. `deploy.artifacts.build_folder` says what the folder holds.

A sweep alone is a build of the stages that lead to its points:

    sweep.json      the dense model's figures and every point's
    sweep.html      the same, drawn; one self-contained file
    calibrate/, sensitivity/, point-.../
    manifest.json   what it was made from
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from deploy.build import steps
from deploy.build.cells import CellWorkshop, build_cells, cells_of
from deploy.build.stages import Done, Stage, forced, keys, run_stages
from deploy.build.steps.compare import measures_of
from deploy.build.verdict import summary
from deploy.build.workshop import Workshop
from deploy.recipe.material import hash_of
from deploy.recipe.recipe import Recipe
from deploy.report.page import write_sweep_page
from slimdiff.errors import MissingPackageError, require
from slimdiff.storage import manifest
from slimdiff.storage.lock import locked

log = logging.getLogger("slimdiff")


def run_build(
    recipe: Recipe, name: str, folder: Path, force: Sequence[str] = (), ray: str | None = None
) -> dict[str, Any]:
    """Run all stages and log the gates; a stage that is done already and has not changed is skipped.

    Args:
        name: what the build is called in the report.
        force: stages to do again, with all that depend on them.
        ray: where the cells of a matrix are built: the address of a Ray cluster that sees the same files, or `local`;
            None: here, one after the other.

    Returns:
        the content of `build.json`; `exit_code` is 0, 1 or 4, as the gates decide.

    Raises:
        SlimdiffError: if a stage cannot be done; what was finished before it is kept.
    """
    stages = steps.stages_of(recipe)
    forced(stages, force)
    if ray is not None:
        require("ray", "ray")
    again = {s.name for s in stages if build_folder.SWEEP in force and s.name.startswith("point-")} | set(force)
    shop = Workshop(recipe, folder, force)
    cells = [CellWorkshop(cell, shop, again) for cell in cells_of(recipe)]
    _require_packages(shop, stages)
    for cell in cells:
        _require_packages(cell, cell.stages())
    if recipe.compare.metrics:
        measures_of(shop)  # what is wrong with weights or real images shows now, not after hours
    with locked(folder):
        *before, report = stages
        slim = keys(shop, before)["slim"]
        key = manifest.fingerprint({cell.cell.name: keys(cell, cell.stages(slim)) for cell in cells})
        stages = [*before, report.also_decided_by(cells=key, name=name)]
        done: list[Done] = []
        for stage in run_stages(shop, stages, again):
            done.append(stage)
            if stage.name == before[-1].name:  # the report is made of the cells and of the summary, too
                done += build_cells(shop, cells, slim, ray)
                manifest.write_json(folder / build_folder.BUILD, summary(recipe, folder, name, stages, done))
        whole = summary(recipe, folder, name, stages, done)
        manifest.write_json(folder / build_folder.BUILD, whole)
        with manifest.replacing(folder / build_folder.REPORT, is_file=True) as temporary:
            shutil.copyfile(folder / "report" / build_folder.REPORT, temporary)
    for gate in whole["gates"]:
        log.info("gate %s: %s (%s)", gate["gate"], gate["verdict"], gate["detail"])
    return whole


def _require_packages(shop: Workshop, stages: Sequence[Stage]) -> None:
    """Miss a package now rather than after an hour of calibration.

    Raises:
        MissingPackageError: naming the extra.
    """
    for module, extra in dict.fromkeys(package for stage in stages for package in stage.packages(shop)):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"{module} is not installed: pip install 'slimdiff[{extra}]'")


def run_sweep(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Measure every point of the recipe's sweep that is not there yet, and write `sweep.json` and `sweep.html`.

    Returns:
        the content of `sweep.json`; see `deploy.build.steps.sweep.frontier`.

    Raises:
        InputError: if a point cannot be met; a speedup that cannot be met shows when its point is planned, and points
            before it are kept.
    """
    assert recipe.sweep is not None
    shop = Workshop(recipe, folder)
    shop.budgets = shop.budgets[1:]  # those of the points: a sweep alone has no other
    points = steps.sweep.point_stages(recipe.sweep)
    with locked(folder, "sweep"):
        for _ in run_stages(shop, [steps.calibrate.STAGE, steps.sensitivity.STAGE, *points]):
            pass
        value = steps.sweep.frontier(shop, points)
        manifest.write_json(folder / "sweep.json", value)
        write_sweep_page(value, folder / "sweep.html")
        prompts = manifest.fingerprint([hash_of(shop.material), hash_of(steps.sweep.compared(shop))])
        made_from = {**shop.model_inputs, "prompts": prompts, "points": recipe.sweep.texts}
        manifest.write_manifest(folder, "sweep", made_from, {"runtime": value["runtime"]})
    return value
