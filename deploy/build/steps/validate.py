"""Parity with the fp32 torch model: the exported slim model, and the fp16 graph if there is one for the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploy.artifacts.figures import denoiser_of
from deploy.artifacts.kinds import graph_of
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of, spread
from exporters.graphs.vae import HALVES, export_vae, is_half
from exporters.registry import runtime_of
from exporters.runtimes.denoiser import open_denoiser
from exporters.runtimes.scheduled import schedule_graphs
from exporters.runtimes.vae import VAE
from exporters.settings import ExportSettings
from exporters.validation.graph import check_parity
from exporters.validation.parity import BOUNDS, check_trajectory
from exporters.validation.scheduled import check_shallow
from exporters.validation.vae import check_vae, watch_vae
from slimdiff.compression import with_denoiser
from slimdiff.denoising.scheduled import schedule_pipeline
from slimdiff.denoising.trajectory import Call

log = logging.getLogger("slimdiff")


def run(shop: Workshop, _: Path) -> dict[str, Any]:
    calls = spread(shop.trajectory, shop.recipe.validation.calls)
    graphs = [shop.folder / name for name in ("export/slim", "engine/onnx-fp16") if (shop.folder / name).is_dir()]
    captions, sampling = shop.together
    parts = []
    title = runtime_of(shop.runtime).title
    for graph in (graph_of(str(folder), verified=False) for folder in graphs):
        unet = open_denoiser(graph, shop.runtime)
        precision = unet.session.precision
        log.info("validate: %s in %s against fp32 in torch, %d calls", precision, title, len(calls))
        found = check_parity(denoiser_of(shop.slim), unet, calls, graph=graph)
        ours, theirs = shop.slim, with_denoiser(shop.slim, unet)
        if (schedule := shop.schedule) is not None:
            ours, theirs = schedule_pipeline(ours, schedule), schedule_graphs(theirs, schedule, graph, shop.runtime)
            if schedule.depth is not None:
                passes: list[Any] = [side.unet.passes for side in (ours, theirs)]  # type: ignore[attr-defined]
                found = check_shallow(found, passes[0], passes[1], calls, schedule.depth, BOUNDS[precision])
        with watch_vae(getattr(shop.slim, "vae", None)) as seen:
            found = check_trajectory(found, ours, theirs, captions, sampling)
        parts.append({"name": f"slim in {title} ({precision}) against slim in torch (fp32)", **found})
        half = shop.recipe.export.model_copy(update={"precision": precision})
        if precision == "fp16" and seen and is_half(shop.slim.vae, half):
            parts.append(
                {"name": f"VAE in {title} ({precision}) against VAE in torch (fp32)", **_vae(shop, half, seen)}
            )
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


def _vae(shop: Workshop, settings: ExportSettings, seen: Mapping[str, Call]) -> dict[str, Any]:
    """Parity of the VAE that bundles of this build get, exported for that alone."""
    log.info("validate: the VAE in %s", settings.precision)
    nothing: dict[str, Any] = {"passed": True, "checks": [], "first_diverging": None, "divergence": None}
    with TemporaryDirectory() as folder:
        for name in HALVES:
            export_vae(shop.slim.vae, Path(folder) / name, shop.slim, shop.trajectory[0], settings)
        vae = VAE.open(folder, shop.runtime)
        return check_vae({**nothing, "precision": vae.session.precision}, shop.slim.vae, vae, seen)


STAGE = Stage(
    "validate",
    run,
    needs=("slim", "export", "engine"),
    settings=lambda shop: shop.recipe.validation.model_dump() | shop.trajectory_settings | shop.scheduled,
    inputs=lambda shop: shop.exporting,
    kind="parity",
    packages=lambda shop: (*packages_of(shop.runtime), ("polygraphy", "onnx")),
)
