"""Paired latency of the dense and the slim graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.artifacts.kinds import graph_of
from deploy.build.stages import Stage
from deploy.build.steps.export import shapes
from deploy.build.workshop import Workshop, packages_of
from exporters.latency.decision import Gate
from exporters.latency.measure import bench
from exporters.latency.pair import Job


def run(shop: Workshop, _: Path) -> dict[str, Any]:
    inputs = shapes(shop.trajectory[len(shop.trajectory) // 2])  # where the graphs are open
    dense, slim = (
        Job(name, str(graph_of(str(shop.folder / "export" / name), verified=False)), shop.runtime, inputs)
        for name in ("dense", "slim")
    )
    bound = shop.recipe.gates.min_speedup
    gate = None if bound is None else Gate("speedup", bound)
    return bench(dense, slim, shop.recipe.bench, gate=gate)


STAGE = Stage(
    "bench",
    run,
    needs=("export",),
    settings=lambda shop: shop.recipe.bench.model_dump() | {"min_speedup": shop.recipe.gates.min_speedup},
    inputs=lambda shop: shop.exporting | shop.machine,
    kind="latency",
    packages=lambda shop: packages_of(shop.runtime),
    figures=lambda result: {
        "latency_ms": {"dense": result["baseline"]["median_ms"], "slim": result["candidate"]["median_ms"]}
    },
)
