"""Statistics of the dense model's trajectories."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from deploy.artifacts import build_folder
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, write_result
from deploy.recipe.prompts import described

log = logging.getLogger("slimdiff")


def run(shop: Workshop, folder: Path) -> None:
    settings = shop.recipe.calibration
    shop.refuse_impossible()
    start = time.perf_counter()
    origin, steps = described(shop.prompts_from), settings.sampling.steps
    log.info("calibrate: %d prompts %s, %d steps each", len(shop.prompts), origin, steps)
    shop.new_compressor().statistics.save(folder / Path(build_folder.STATISTICS).name)
    source = shop.prompts_from
    sampling = settings.sampling
    write_result(
        folder,
        "calibrate",
        {
            "prompts": len(shop.prompts),
            "prompts_from": Path(source).name if isinstance(source, str) else "recipe",
            "calls": -(-len(shop.prompts) // sampling.batch) * sampling.steps,
            "sampling": sampling.model_dump(),
            "seconds": round(time.perf_counter() - start, 3),
        },
    )


STAGE = Stage(
    "calibrate",
    run,
    settings=lambda shop: shop.recipe.calibration.model_dump(),
    inputs=lambda shop: shop.core | shop.model_inputs,
    kind="statistics",
)
