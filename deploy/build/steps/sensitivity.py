"""What planning measures by forward passes, whatever the budget: planning for another budget then needs none.

Sensitivities and MACs are small: they lie beside the statistics as JSON. `Workshop.measured_compressor` has both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.build.stages import Stage
from deploy.build.workshop import Workshop
from slimdiff.planning.planner import keeps_measured

_DECIDING = {"allocation", "forms", "groups", "sensitivity_calls", "resnets", "fitting_calls"}
_DECIDING |= {"precision", "int8_error"}  # how many calls int8 is measured on depends on its bound
"""The settings of the plan that the result depends on."""


def run(shop: Workshop, _: Path) -> dict[str, Any]:
    """`sensitivities` by site, and `macs` and `int8_errors` as `Statistics` has them.

    Where nothing can be kept for another budget, all are empty and `skipped` says why.
    """
    shop.refuse_impossible()
    if not keeps_measured(shop.recipe.plan):
        why = "only the global allocation with the usual forms keeps what it measures"
        return {"sensitivities": {}, "macs": {}, "int8_errors": {}, "skipped": why}
    shop.compressor.measure()
    statistics = shop.compressor.statistics
    names = ("sensitivities", "macs", "int8_errors")
    return {name: getattr(statistics, name) for name in names}


STAGE = Stage(
    "sensitivity",
    run,
    needs=("calibrate",),
    settings=lambda shop: shop.recipe.plan.model_dump(include=_DECIDING),
    inputs=lambda shop: shop.core | shop.held_hash,
    kind="sensitivity",
)
