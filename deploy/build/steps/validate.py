"""Parity with the fp32 torch model: the exported slim model, and the fp16 graph if there is one for the engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from deploy.artifacts.figures import denoiser_of
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of, spread
from exporters.registry import runtime_of
from exporters.runtimes.unet import UNet
from exporters.validation.graph import check_parity
from exporters.validation.parity import check_trajectory
from slimdiff.compression import with_denoiser

log = logging.getLogger("slimdiff")


def run(shop: Workshop, _: Path) -> dict[str, Any]:
    calls = spread(shop.trajectory, shop.recipe.validation.calls)
    graphs = [shop.folder / name for name in ("export/slim", "engine/onnx-fp16") if (shop.folder / name).is_dir()]
    captions, sampling = shop.together
    parts = []
    title = runtime_of(shop.runtime).title
    for graph in graphs:
        unet = UNet.open(graph, shop.runtime)
        precision = unet.session.precision
        log.info("validate: %s in %s against fp32 in torch, %d calls", precision, title, len(calls))
        found = check_parity(denoiser_of(shop.slim), unet, calls, graph=graph / "model.onnx")
        found = check_trajectory(found, shop.slim, with_denoiser(shop.slim, unet), captions, sampling)
        parts.append({"name": f"slim in {title} ({precision}) against slim in torch (fp32)", **found})
    return {
        "passed": all(part["passed"] for part in parts),
        "precision": parts[0]["precision"],
        "checks": [check for part in parts for check in part["checks"]],
        "first_diverging": next((p["first_diverging"] for p in parts if p["first_diverging"]), None),
        "divergence": next((p["divergence"] for p in parts if p["divergence"]), None),
        "calls": len(calls),
        "timesteps": [call.timestep for call in calls],
        "parts": parts,
    }


STAGE = Stage(
    "validate",
    run,
    needs=("slim", "export", "engine"),
    settings=lambda shop: shop.recipe.validation.model_dump() | shop.trajectory_settings,
    inputs=lambda shop: shop.exporting,
    kind="parity",
    packages=lambda shop: (*packages_of(shop.runtime), ("polygraphy", "onnx")),
)
