"""Statistics of the dense model's trajectories."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop
from deploy.opening.distilled import warn_of_steps
from deploy.recipe.prompts import described

log = logging.getLogger("slimdiff")


def run(shop: Workshop, folder: Path) -> dict[str, Any]:
    source, sampling = shop.prompts_from, shop.calibration.sampling
    shop.refuse_impossible()
    warn_of_steps(shop.dense, shop.recipe.model, sampling)
    start = time.perf_counter()
    log.info("calibrate: %d prompts %s, %d steps each", shop.samples, described(source), sampling.steps)
    shop.new_compressor().statistics.save(folder / Path(build_folder.STATISTICS).name)
    return {
        "prompts": shop.samples,
        "prompts_from": Path(source).name if isinstance(source, str) else "recipe",
        "calls": -(-shop.samples // sampling.batch) * sampling.steps,
        "sampling": sampling.model_dump(),
        "seconds": round(time.perf_counter() - start, 3),
    }


STAGE = Stage(
    "calibrate",
    run,
    settings=lambda shop: shop.recipe.calibration.model_dump(),
    inputs=lambda shop: shop.core | shop.model_inputs,
    kind="statistics",
)
