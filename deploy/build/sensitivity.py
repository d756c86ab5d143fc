"""The stage that measures by forward passes what planning needs, whatever the budget: another budget then needs none.

Sensitivities and MACs are small: they lie beside the statistics as JSON, and `measured` puts both together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from slimdiff import Compressor, PlanSettings, Statistics
from slimdiff.planning.planner import keeps_measured
from slimdiff.storage import manifest

_DECIDING = {"allocation", "forms", "groups", "sensitivity_calls", "resnets", "fitting_calls"}


def deciding(planning: PlanSettings) -> dict[str, Any]:
    """The settings that the stage's result depends on."""
    return planning.model_dump(include=_DECIDING)


def write_sensitivity(compressor: Compressor, folder: Path) -> None:
    """Write `sensitivity.json` into the stage's folder: `sensitivities` by site, `macs` as `Statistics` has them.

    Where nothing can be kept for another budget, both are empty and `skipped` says why.
    """
    result: dict[str, Any] = {"sensitivities": {}, "macs": {}}
    if keeps_measured(compressor.planning):
        compressor.measure()
        result = {"sensitivities": compressor.statistics.sensitivities, "macs": compressor.statistics.macs}
    else:
        result["skipped"] = "only the global allocation with the usual forms keeps what it measures"
    manifest.write_json(folder / Path(build_folder.result_file("sensitivity")).name, result)


def measured(folder: Path) -> Statistics:
    """The statistics of a build's or a sweep's folder, with what was measured on them."""
    return recall(Statistics.load(folder / build_folder.STATISTICS), folder)


def recall(statistics: Statistics, folder: Path) -> Statistics:
    """The same statistics, with what the folder's sensitivity stage measured on them."""
    measured = build_folder.read(folder, "sensitivity")
    statistics.sensitivities, statistics.macs = measured["sensitivities"], measured["macs"]
    return statistics
