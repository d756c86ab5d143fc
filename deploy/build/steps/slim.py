"""The slim model, a diffusers pipeline directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from deploy.artifacts.figures import compression_result, costs, denoiser_of
from deploy.artifacts.files import copy_licenses, save_pipeline
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop
from slimdiff.groups.maps import Maps
from slimdiff.planning.costs import count_bytes
from slimdiff.schedule import FILE
from slimdiff.slimming.map_file import save_maps
from slimdiff.storage import manifest


def run(shop: Workshop, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    maps: Maps = {}
    slim = shop.compressor.slim(shop.plan, maps=maps)
    seconds = round(time.perf_counter() - start, 3)
    held = shop.load_held()
    whole = shop.finish(slim, held)
    save_pipeline(whole, folder, shop.recipe)
    save_maps(folder, maps, denoiser_of(whole))
    copy_licenses(shop.recipe.model, folder)
    if shop.schedule is not None:
        shop.schedule.of_slim().save(folder / FILE)
    call = shop.trajectory[0]
    dense = {**costs(denoiser_of(shop.dense), call), "bytes": count_bytes(denoiser_of(held))}
    calibrated, sensitivity, planned = (
        manifest.read_manifest(shop.folder / stage)["made_from"]["seconds"]
        for stage in ("calibrate", "sensitivity", "plan")
    )
    took = {"calibrate": calibrated, "plan": round(sensitivity + planned, 3), "slim": seconds}
    return compression_result(shop.plan, dense, costs(denoiser_of(whole), call), took)


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: {side: result[key][side] for side in ("dense", "slim")} for key in ("parameters", "macs", "bytes")}


STAGE = Stage(
    "slim",
    run,
    needs=("plan",),
    settings=lambda shop: {**shop.trajectory_settings, **shop.weight_settings, **shop.usage, **shop.scheduled},
    inputs=lambda shop: shop.core,
    kind="slim-model",
    figures=_figures,
)
