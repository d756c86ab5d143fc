"""The four figures, dense to slim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.artifacts import numbers
from deploy.report.sections.latency import speedup_verdict


def build(results: Mapping[str, Any], _folder: Path) -> dict[str, Any]:
    """`figures`: parameters, MACs, bytes and latency.

    Each has `dense`, `slim`, their `share` and `change`, `exact` digits and a `note` that says what is counted; latency
    has the `interval` of the change and a `doubt` about it too, or else `missing`: why there is no such figure.
    """
    counts, figures = results["build"]["figures"], []
    for key, name, unit, note in (
        ("parameters", "Parameters", "", "in the denoiser"),
        ("macs", "MACs", "", "multiply-accumulates of one denoiser call at batch 1"),
        ("bytes", "Bytes", "B", "denoiser weights stored as float32 safetensors"),
    ):
        dense, slim = counts[key]["dense"], counts[key]["slim"]
        figures.append(
            {
                "name": name,
                "note": note,
                "dense": numbers.scaled(dense, unit),
                "slim": numbers.scaled(slim, unit),
                "exact": f"{numbers.exact(dense)} dense, {numbers.exact(slim)} slim",
                "share": slim / dense if dense else 1.0,
                "change": numbers.change(slim / dense - 1) if dense else "",
            }
        )
    latency = _latency(counts.get("latency_ms"), results["bench"], speedup_verdict(results))
    return {"figures": [*figures, latency]}


def _latency(figure: Mapping[str, float] | None, bench: Mapping[str, Any], verdict: str | None) -> dict[str, Any]:
    if figure is None or "skipped" in bench:
        return {"name": "Latency", "missing": str(bench.get("skipped") or "it was not measured")}
    low, median, high = (bench["speedup"][k] for k in ("low", "median", "high"))
    doubt = ""
    if low <= 1 <= high:
        doubt = "Inconclusive: the interval holds 0 %, so neither model is shown to be faster."
    elif verdict == "inconclusive":
        doubt = "Inconclusive against the gate: the interval holds its bound."
    return {
        "name": "Latency",
        "note": f"median of one denoiser call, {bench.get('runtime') or 'ONNX Runtime'}; change from paired runs",
        "dense": numbers.milliseconds(figure["dense"]),
        "slim": numbers.milliseconds(figure["slim"]),
        "exact": f"{figure['dense']} ms dense, {figure['slim']} ms slim",
        "share": figure["slim"] / figure["dense"],
        "change": numbers.change(1 / median - 1),
        "interval": f"95 % interval {numbers.change(1 / high - 1)} to {numbers.change(1 / low - 1)}",
        "doubt": doubt,
    }
