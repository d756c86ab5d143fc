"""The stages of a build, one file each. A new one is its file here and a line in `STAGES`."""

from __future__ import annotations

from collections.abc import Callable

from deploy.build.stages import Stage
from deploy.build.steps import bench, calibrate, compare, engine, export, plan, report, sensitivity, slim
from deploy.build.steps import sweep as sweep
from deploy.build.steps import validate as validate
from deploy.recipe.recipe import Recipe

STAGES: tuple[Stage | Callable[[Recipe], list[Stage]], ...] = (
    calibrate.STAGE,
    sensitivity.STAGE,
    plan.STAGE,
    slim.STAGE,
    export.STAGE,
    engine.STAGE,
    validate.STAGE,
    compare.STAGE,
    bench.STAGE,
    sweep.stages,
    report.STAGE,
)
"""In the order of a build; functions give the stages that only some recipes have. The report comes last."""


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe's build, each after those it needs."""
    found: list[Stage] = []
    for entry in STAGES:
        found += [entry] if isinstance(entry, Stage) else entry(recipe)
    return found
