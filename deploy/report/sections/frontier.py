"""The frontier: noise-prediction error against the costs of slim models. For a sweep's page and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.artifacts import numbers
from deploy.report.plots import Tick, line, linear_scale, log_scale


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`charts`: error against size, work and latency; none if there is no sweep or nothing was lost anywhere."""
    if results["sweep"] is None:
        return {"charts": []}
    points, dense = results["sweep"]["points"], results["sweep"]["dense"]
    sizes, work = ([(p[key] / dense[key],) for p in points] for key in ("parameters", "macs"))
    times = [tuple(1 / p["speedup"][key] for key in ("median", "high", "low")) for p in points]
    charts = [
        _chart("Size", "parameters kept, % of dense", points, sizes),
        _chart("Work", "MACs per sample kept, % of dense", points, work),
        _chart("Latency", "time of one denoiser call, % of dense", points, times),
    ]
    return {"charts": [chart for chart in charts if chart]}


def _chart(
    name: str, axis: str, points: Sequence[Mapping[str, Any]], shares: Sequence[tuple[float, ...]]
) -> dict[str, Any] | None:
    """Error against the share of a cost that is left, with an interval where shares are median, low and high."""
    y = log_scale(p["noise_error"] for p in points)
    if y is None:  # nothing was lost anywhere: nothing to draw on a logarithmic axis
        return None
    x = linear_scale([100 * v for share in shares for v in share])
    drawn = []
    for p, share in zip(points, shares, strict=True):
        if p["noise_error"] > 0:
            text = f"{p['budget']}: {100 * share[0]:.1f} %, error {numbers.digits(p['noise_error'])}"
            drawn.append((x.at(100 * share[0]), y.below(p["noise_error"]), text, share))
    drawn.sort(key=lambda point: point[0])
    return {
        "name": name,
        "axis": axis,
        # A line through measured times would draw their noise.
        "path": "" if len(shares[0]) > 1 else line((left, top) for left, top, _, _ in drawn),
        "points": [point[:3] for point in drawn],
        "spans": [(x.at(100 * s[1]), x.at(100 * s[2]), top) for _, top, _, s in drawn if len(s) > 1],
        "x": x.ticks(),
        "y": [Tick(100 - tick.at, tick.label) for tick in y.ticks()],
    }
