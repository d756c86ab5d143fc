"""Whether a graph computes what its model does: parity of the output, finite values inside, and where it went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from exporters.validation.divergence import find_divergence, own_errors
from exporters.validation.fragments import OnnxFragments
from exporters.validation.overflow import explain_overflow, first_not_finite
from exporters.validation.parity import BOUNDS, Bounds, Precision, check, check_parity
from slimdiff.denoising.trajectory import Call, predict


def check_graph(
    onnx_file: Path | str,
    denoiser: nn.Module,
    calls: Sequence[Call],
    candidate: Callable[[Call], Tensor],
    precision: Precision,
    *,
    bounds: Bounds | None = None,
    every_module: bool = False,
    progress: str | None = None,
) -> dict[str, Any]:
    """`check_parity` of a graph with its model in torch, and what only a graph allows.

    An fp16 graph is also run node by node, and every tensor in it must be finite. Running it whole does not show that:
    ONNX Runtime's CPU provider computes fp16 nodes in fp32 and leaves out the casts between them, so scores beyond
    65504 survive there, and not on a GPU.

    Args:
        onnx_file: a graph that `export_unet` wrote.
        denoiser: its model in torch, float32.
        calls: recorded calls, in order of time.
        candidate: call -> output of the graph in its runtime.
        precision: the graph's.
        bounds: others than `BOUNDS[precision]`.
        every_module: check every module's own error too, on the call in the middle. That also finds, in an fp16 graph,
            a fault too small for the bounds of its output.
        progress: name of the progress bars on stderr; None: no bar.

    Returns:
        `check_parity`'s. The checks inside the graph are named `every tensor@t=981` (metric `finite`: count of values
        that are not) and by module (metric `own_relative_l2`). `divergence` is `explain`'s.
    """
    fragments = OnnxFragments(onnx_file)
    bounds = bounds or BOUNDS[precision]
    bar = None if progress is None else f"{progress}: locate"
    why = partial(explain, fragments, denoiser, bounds=bounds, precision=precision, progress=bar)
    result = check_parity(
        calls, partial(predict, denoiser), candidate, precision, bounds=bounds, explain=why, progress=progress
    )
    inside: list[tuple[Call, dict[str, Any]]] = []
    for call in calls if precision == "fp16" else ():
        found = first_not_finite(fragments, call, progress=progress and f"{progress}: finite at t={call.timestep}")
        row = check(f"every tensor@t={call.timestep}", "finite", found.not_finite if found else 0, 0, found is None)
        inside.append((call, row))
    if every_module:
        middle = calls[len(calls) // 2]
        for error in own_errors(fragments, denoiser, middle, progress=progress and f"{progress}: every module"):
            bound = bounds.relative_l2
            row = check(error.tensor, "own_relative_l2", error.relative_l2, bound, error.within(bound))
            inside.append((middle, row))
    result["checks"] += [row for _, row in inside]
    failed = next((call for call, row in inside if not row["passed"]), None)
    if failed is not None and result["passed"]:
        divergence = why(failed)
        result |= {"passed": False, "divergence": divergence, "first_diverging": divergence["tensor"]}
    return result


def explain(
    fragments: OnnxFragments,
    denoiser: nn.Module,
    call: Call,
    *,
    bounds: Bounds,
    precision: Precision,
    progress: str | None = None,
) -> dict[str, Any]:
    """What went wrong inside a graph, on one call.

    Returns:
        `kind`, `tensor` and more: `not finite` with `explain_overflow`'s figures (fp16), `own error` with
        `find_divergence`'s or, where every part of the graph is right within its bound and errors only add up,
        `accumulated` with no tensor and, as `largest`, the part with the largest own error.
    """
    if precision == "fp16":
        overflow = explain_overflow(fragments, denoiser, call, progress=progress)
        if overflow is not None:
            return {"kind": "not finite", **overflow}
    divergence = find_divergence(fragments, denoiser, call, bounds.relative_l2, progress=progress)
    if not divergence.pop("diverges"):
        return {"kind": "accumulated", "tensor": None, "largest": divergence}
    return {"kind": "own error", **divergence}
