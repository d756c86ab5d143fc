"""Ranks under the budget."""

from __future__ import annotations

from pathlib import Path

from deploy.artifacts import build_folder
from deploy.artifacts.figures import denoiser_of
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of
from exporters.latency.steps import measure_picture
from exporters.latency.table import measure_latency
from exporters.settings import TableSettings
from slimdiff.storage import manifest


def run(shop: Workshop, folder: Path) -> None:
    shop.refuse_impossible()
    recipe, latency = shop.recipe, None
    if _by_latency(shop):
        table = TableSettings(runtime=recipe.budget.runtime)
        picture = shop.compressor.picture
        if picture is None:
            latency = measure_latency(denoiser_of(shop.dense), shop.trajectory[0], recipe.plan, table)
        else:
            latency = measure_picture(shop.dense, picture, shop.calibration.sampling, recipe.plan, table)
        value = {"made_from": latency.made_from, "dense_ms": latency.dense}
        value |= {"layers": latency.layers, "int8": latency.int8}
        manifest.write_json(folder / "latency.json", build_folder.strict(value))
    plan = shop.measured_compressor().plan(recipe.budget.budget(), latency)
    plan.save(folder / Path(build_folder.PLAN).name)


def _by_latency(shop: Workshop) -> bool:
    return shop.recipe.budget.budget().kind == "speedup"


def _inputs(shop: Workshop) -> dict[str, str]:
    inputs = shop.core | shop.held_hash
    if _by_latency(shop):
        inputs |= shop.exporting | shop.machine | shop.captions_hash
    return inputs


STAGE = Stage(
    "plan",
    run,
    needs=("calibrate", "sensitivity"),
    settings=lambda shop: shop.recipe.budget.model_dump() | shop.recipe.plan.model_dump() | shop.scheduled,
    inputs=_inputs,
    kind="plan",
    packages=lambda shop: packages_of(shop.recipe.budget.runtime) if _by_latency(shop) else (),
)
