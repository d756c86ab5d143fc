"""The latency of dense and slim, and the interval of the speedup on its axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.report.plots import Tick, linear_scale
from deploy.report.sections.gates import gate_of


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`speedup`: places on the axis; `speedup_verdict`: of the recipe's gate, or else of the bench's own, None if there
    is none."""
    bench, gate = results["bench"], gate_of(results, "speedup")
    verdict = gate.get("verdict") or (bench["verdict"] if bench.get("gate") else None)
    return {"speedup": _plot(bench["speedup"], gate.get("bound")), "speedup_verdict": verdict}


def _plot(speedup: Mapping[str, float], bound: float | None) -> dict[str, Any]:
    places = {"same": 1.0, **{key: speedup[key] for key in ("low", "median", "high")}}
    axis = linear_scale([*places.values(), *([] if bound is None else [bound])])
    return {
        **{name: axis.at(value) for name, value in places.items()},
        "bound": None if bound is None else axis.at(bound),
        "ticks": [Tick(t.at, f"{t.label}\u00d7") for t in axis.ticks(5)],
    }
