"""Paired latency of the dense and the slim graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of, write_result


def run(shop: Workshop, folder: Path) -> None:
    from exporters.latency.paired import paired_latency
    from exporters.runtimes.unet import UNet

    call = shop.trajectory[len(shop.trajectory) // 2]
    dense, slim = (UNet.open(shop.folder / "export" / name, shop.runtime) for name in ("dense", "slim"))
    bound = shop.recipe.gates.min_speedup
    gate = None if bound is None else f"speedup>={bound:g}"
    runtime = f"{slim.session.runtime}, {slim.session.precision}"
    sides = partial(dense.predict, call), partial(slim.predict, call)
    result = paired_latency(*sides, shop.recipe.bench, gate=gate, runtime=runtime, progress="bench")
    write_result(folder, "bench", result)


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    if "skipped" in result:
        return {"latency_ms": None}
    return {"latency_ms": {"dense": result["baseline"]["median_ms"], "slim": result["candidate"]["median_ms"]}}


STAGE = Stage(
    "bench",
    run,
    needs=("export",),
    settings=lambda shop: shop.recipe.bench.model_dump() | {"min_speedup": shop.recipe.gates.min_speedup},
    inputs=lambda shop: shop.exporting | shop.machine,
    kind="latency",
    packages=lambda shop: packages_of(shop.runtime),
    figures=_figures,
)
