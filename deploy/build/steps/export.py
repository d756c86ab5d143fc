"""ONNX of the dense and the slim denoiser, with the shapes of the calls for one image or for a cell's images."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from deploy.artifacts.figures import denoiser_of
from deploy.artifacts.hashes import public_name
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop
from exporters.graphs.export import unet_inputs
from exporters.graphs.int8_layers import report_of
from exporters.graphs.precision import fp32_islands
from exporters.graphs.reading import read_graph
from exporters.graphs.scheduled import export_scheduled
from slimdiff.denoising.schedulers import with_scheduler
from slimdiff.schedule import FILE
from slimdiff.storage import manifest

log = logging.getLogger("slimdiff")


def run(shop: Workshop, folder: Path) -> dict[str, Any]:
    settings = shop.recipe.export
    result: dict[str, Any] = {"precision": settings.precision}
    for name in shop.exported:
        pipeline = with_scheduler(shop.dense if name == "dense" else shop.slim, shop.sampling)
        how = shop.exported_as(name)
        log.info("export: %s to ONNX, %s", name, how.precision)
        start = time.perf_counter()
        unet, call = denoiser_of(pipeline), shop.trajectory[0]
        more: Any = {"scheduler": pipeline.scheduler, "calibration": shop.trajectory}  # which int8 alone looks at
        own = shop.schedule if name == "slim" else None
        graph = export_scheduled(unet, folder / name, call, own, how, **more)[0]
        if own is not None:
            own.of_slim().save(folder / name / FILE)
        seconds = round(time.perf_counter() - start, 3)
        made_from = {"model": public_name(shop.recipe.model), "denoiser": name, "settings": how.model_dump()}
        made_from |= shop.usage
        inputs, wide = shapes(call), fp32_islands(graph)
        runs_on = {"precision": how.precision, "shapes": inputs, "opset": settings.opset, "fp32_islands": wide}
        int8 = report_of(read_graph(graph))
        runs_on |= {"int8": int8} if int8 else {}
        manifest.write_manifest(folder / name, "onnx", made_from, runs_on)
        result[name] = {
            "folder": f"export/{name}",
            "bytes": sum(f.stat().st_size for f in (folder / name).rglob("*.onnx*")),
            "inputs": inputs,
            "seconds": seconds,
            "fp32_islands": wide,
            **({"int8": int8} if int8 else {}),
        }
    return result


def shapes(call: Any) -> dict[str, list[int]]:
    """Shapes of the graph's inputs for a recorded call."""
    return {name: list(tensor.shape) for name, tensor in unet_inputs(call).items()}


def _shares(result: dict[str, Any]) -> dict[str, float]:
    """By side, the part of a graph's multiply-adds that is in int8; none where neither is, or one does not know."""
    reports = {name: result[name].get("int8") for name in ("dense", "slim") if name in result}
    shares: dict[str, Any] = {name: report["share"] if report else 0.0 for name, report in reports.items()}
    return shares if any(reports.values()) and None not in shares.values() else {}


STAGE = Stage(
    "export",
    run,
    needs=("slim",),
    settings=lambda shop: shop.recipe.export.model_dump() | shop.trajectory_settings | shop.scheduled,
    inputs=lambda shop: shop.exporting | shop.captions_hash,
    kind="onnx",
    figures=lambda result: {"int8_macs": shares} if (shares := _shares(result)) else {},
    runs_on=lambda result: {"precision": result["precision"], "shapes": result["slim"]["inputs"]},
    packages=lambda shop: (
        ("onnx", "onnx"),
        ("onnxscript", "onnx"),
        *([("nncf", "int8")] if shop.recipe.export.precision == "int8" else []),
    ),
)
