"""The four figures, dense to slim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.artifacts import numbers
from deploy.report.sections.latency import speedup_verdict


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`latency_tile`: the `interval` of the change and its `median`, a `doubt` about it, the `runtime`; or `missing`:
    why there is no such figure. The other figures are shown as they are.
    """
    bench = results["bench"]
    if results["build"]["figures"].get("latency_ms") is None or "skipped" in bench:
        return {"latency_tile": {"missing": str(bench.get("skipped") or "it was not measured")}}
    low, median, high = (bench["speedup"][k] for k in ("low", "median", "high"))
    doubt = ""
    if low <= 1 <= high:
        doubt = "Inconclusive: the interval holds 0 %, so neither model is shown to be faster."
    elif speedup_verdict(results) == "inconclusive":
        doubt = "Inconclusive against the gate: the interval holds its bound."
    tile = {
        "change": numbers.change(1 / median - 1),
        "interval": f"95 % interval {numbers.change(1 / high - 1)} to {numbers.change(1 / low - 1)}",
        "doubt": doubt,
        "note": f"median of one denoiser call, {bench.get('runtime') or 'ONNX Runtime'}; change from paired runs",
    }
    return {"latency_tile": tile}
