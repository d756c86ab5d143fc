"""The stage that measures by forward passes what planning needs, whatever the budget: another budget then needs none.

Sensitivities and MACs are small: they lie beside the statistics as JSON, and `measured` puts both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from slimdiff import CalibrationSettings, PlanSettings, Statistics
from slimdiff.compression import measure
from slimdiff.planning.planner import keeps_measured
from slimdiff.slimming.slim import Factors
from slimdiff.storage import manifest

_DECIDING = {"allocation", "forms", "groups", "sensitivity_calls", "resnets", "fitting_calls"}


def deciding(planning: PlanSettings) -> dict[str, Any]:
    """The settings that the stage's result depends on."""
    return planning.model_dump(include=_DECIDING)


def write_sensitivity(
    pipeline: Any,
    prompts: Sequence[str],
    calibration: CalibrationSettings,
    planning: PlanSettings,
    statistics: Statistics,
    folder: Path,
    factors: Factors | None = None,
) -> None:
    """Write `sensitivity.json` into the stage's folder: `sensitivities` by site, `macs` as `Statistics` has them.

    Where nothing can be kept for another budget, both are empty and `skipped` says why.
    """
    result: dict[str, Any] = {"sensitivities": {}, "macs": {}}
    if keeps_measured(planning):
        measure(pipeline, prompts, calibration, planning, statistics, factors, progress="sensitivity")
        result = {"sensitivities": statistics.sensitivities, "macs": statistics.macs}
    else:
        result["skipped"] = "only the global allocation with the usual forms keeps what it measures"
    manifest.write_json(folder / Path(build_folder.result_file("sensitivity")).name, result)


def measured(folder: Path) -> Statistics:
    """The statistics of a build's or a sweep's folder, with what was measured on them."""
    statistics, found = Statistics.load(folder / build_folder.STATISTICS), build_folder.read(folder, "sensitivity")
    statistics.sensitivities, statistics.macs = found["sensitivities"], found["macs"]
    return statistics
