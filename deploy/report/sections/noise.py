"""The noise-prediction error over timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.artifacts import numbers
from deploy.report.plots import Scale, Tick, line, log_scale
from deploy.report.sections.gates import gate_of


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`noise`: the chart of the error over timesteps; None if the error is zero everywhere."""
    return {"noise": _chart(results["compare"]["noise_error"], gate_of(results, "noise_error").get("bound"))}


def _chart(noise: Mapping[str, Any], bound: float | None) -> dict[str, Any] | None:
    values = [(t, v) for t, v in noise["by_timestep"] if v is not None]
    overall = noise["relative_mse"]
    y = log_scale([*(v for _, v in values), overall, bound])
    drawn = [(t, v) for t, v in values if v > 0]
    if y is None or not drawn:
        return None

    first, last = max(t for t, _ in values), min(t for t, _ in values)
    x = Scale(first, min(0, last) if first > 0 else last - 1)  # in the order of sampling: from noise to image
    points = [(x.at(t), y.below(v), f"t = {t:g}: {numbers.digits(v)}") for t, v in drawn]
    rising = Scale(x.high, x.low)
    ends = [extreme(drawn, key=lambda p: p[1]) for extreme in (min, max)]
    least, most = (f"at t{numbers.NBSP}={numbers.NBSP}{t:g} ({numbers.digits(v)})" for t, v in ends)
    return {
        "path": line((px, py) for px, py, _ in points),
        "points": points,
        "rows": [(f"{t:g}", numbers.digits(v)) for t, v in values],
        "x": [Tick(round(100 - tick.at, 2), tick.label) for tick in reversed(rising.ticks())],
        "y": [Tick(100 - tick.at, tick.label) for tick in y.ticks()],
        "overall": y.below(overall) if overall else None,
        "bound": y.below(bound) if bound else None,
        "summary": f"smallest {least}, largest {most}",
    }
