"""Whether a graph computes what its model does: parity of the output, finite values inside, and where it went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from exporters.dtypes import PRECISIONS
from exporters.layout import GRAPH, read_config
from exporters.registry import runtime_of
from exporters.runtimes.denoiser import GraphDenoiser, denoiser_in, open_denoiser
from exporters.runtimes.opening import open_session
from exporters.runtimes.split import SplitSession
from exporters.validation.divergence import find_divergence, own_errors
from exporters.validation.fragments import OnnxFragments
from exporters.validation.int8 import check_int8_layers
from exporters.validation.overflow import explain_overflow, first_not_finite
from exporters.validation.parity import BOUNDS, Bounds, Precision, at_time, check, check_calls, compare
from exporters.validation.parts import bounds_for, check_parts
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError

AS_WRITTEN = Bounds(cosine=0.995, relative_l2=6e-2)
"""Of a runtime's answer against that of an int8 graph's own floats. Numbers on the edge of a step fall either way: a
right runtime's relative L2 was up to 0.02, and 0.04 in bf16; one that clips sums had 0.07 on three layers."""


def check_parity(
    reference: nn.Module,
    candidate: nn.Module | Path | str,
    calls: Sequence[Call],
    *,
    precision: Precision | None = None,
    bounds: Bounds | None = None,
    graph: Path | str | None = None,
    every_module: bool = False,
) -> dict[str, Any]:
    """Hold one artifact of a model against another on recorded calls.

    A denoiser in parts is also checked part by part (`exporters.validation.parts`), and against the whole graph in the
    same runtime, both fp32, bounds are those of exactness.

    Of a graph with its model in torch, the inside is checked too. An fp16 graph is run node by node, and every tensor
    in it must be finite. Running it whole does not show that: ONNX Runtime's CPU provider computes fp16 nodes in fp32
    and leaves out the casts between them, so scores beyond 65504 survive there, and not on a GPU. Of an int8 graph,
    each layer is held against the model's (`exporters.validation.int8`), and the runtime against the graph as written.

    Args:
        reference: the denoiser in float32: the model in torch, or one that is open in a runtime.
        candidate: the other one, or the folder or file of a graph, which is opened in ONNX Runtime.
        calls: from `record_calls`, in order of time.
        precision: chooses the bounds; the candidate's own if not given.
        bounds: others than `BOUNDS[precision]`.
        graph: whose inside is checked; by default the candidate's, if ONNX Runtime runs it and the reference is a model
            in torch.
        every_module: check every module's own error in the graph too, on the call in the middle. That also finds, in an
            fp16 graph, a fault too small for the bounds of its output.

    Returns:
        `passed`, `precision`, `checks` (`tensor`, `metric`, `value`, `bound`, `passed`), `first_diverging` and
        `divergence` (`explain`'s): see `check_calls`. The checks inside the graph are named `every tensor@t=981`
        (metric `finite`: count of values that are not) and by module (metric `own_relative_l2`).

    Raises:
        InputError: without calls, for a candidate that is no denoiser, or for `every_module` without a graph and its
            model.
        MissingPackageError: without polygraphy, or onnxruntime for a graph.
    """
    side = candidate if isinstance(candidate, nn.Module) else open_denoiser(candidate)
    session = side.session if isinstance(side, GraphDenoiser) else None
    own = session.precision if session else PRECISIONS[str(next(side.parameters()).dtype).removeprefix("torch.")]
    precision = precision or cast(Precision, own)
    runs_graph = session is not None and session.runtime.startswith("ONNX Runtime")
    if session is not None and precision == "int8" and session.source.endswith(GRAPH):
        runs_graph = True  # its layers are held against the model's, and the runtime against what it says
    if graph is None and session and not isinstance(reference, GraphDenoiser) and runs_graph:
        graph = session.source
    if graph is None:
        if every_module:
            raise InputError("every_module is for a graph in ONNX Runtime and its model in torch")
        bounds = bounds or bounds_for(reference, side)
        result = check_calls(calls, partial(predict, reference), partial(predict, side), precision, bounds=bounds)
    else:
        every = every_module
        result = check_graph(OnnxFragments(graph), reference, partial(predict, side), calls, precision, bounds, every)
    if not isinstance(session, SplitSession):
        return result
    return check_parts(result, reference, session, calls, bounds or BOUNDS[precision])


def check_graph(
    fragments: OnnxFragments,
    reference: nn.Module,
    candidate: Callable[[Call], Tensor],
    calls: Sequence[Call],
    precision: Precision,
    bounds: Bounds | None = None,
    every_module: bool = False,
    part: str = "",
) -> dict[str, Any]:
    """Hold a graph, inside and out, against its model in torch (float32): see `check_parity`.

    Args:
        candidate: call -> the graph's output.
        part: of the pipeline that it is, for the checks' names; the denoiser if not given.
    """
    bounds = bounds or BOUNDS[precision]
    why = partial(explain, fragments, reference, bounds=bounds, precision=precision)
    output, within = (part, f"every tensor of {part}") if part else ("out_sample", "every tensor")
    result = check_calls(
        calls, partial(predict, reference), candidate, precision, bounds=bounds, explain=why, output=output
    )
    inside: list[tuple[Call, dict[str, Any]]] = []
    for call in calls if precision == "fp16" else ():
        found = first_not_finite(fragments, call)
        row = check(at_time(within, call), "finite", found.not_finite if found else 0, 0, found is None)
        inside.append((call, row))
    if every_module:
        middle, bound = calls[len(calls) // 2], bounds.relative_l2
        for error in own_errors(fragments, reference, middle):
            row = check(error.tensor, "own_relative_l2", error.relative_l2, bound, error.within(bound))
            inside.append((middle, row))
    result["checks"] += [row for _, row in inside]
    failed = next((call for call, row in inside if not row["passed"]), None)
    if failed is not None and result["passed"]:
        divergence = why(failed)
        result |= {"passed": False, "divergence": divergence, "first_diverging": divergence["tensor"]}
    return _with_int8(result, fragments, reference, candidate, calls) if precision == "int8" else result


def _with_int8(
    result: dict[str, Any],
    fragments: OnnxFragments,
    reference: nn.Module,
    candidate: Callable[[Call], Tensor],
    calls: Sequence[Call],
) -> dict[str, Any]:
    """The result with checks of the int8 layers, and of the runtime against the graph as it is written."""
    middle = calls[len(calls) // 2]
    rows, fault = check_int8_layers(fragments.file, reference, calls)
    onnxruntime = runtime_of("onnxruntime")
    as_written = replace(onnxruntime, options={**onnxruntime.options, "as_written": True})
    written = denoiser_in(open_session(fragments.file, as_written), read_config(fragments.file)).predict(middle)
    pair = written.double().numpy(), candidate(middle).double().numpy()
    rows += compare(at_time("out_sample as written", middle), *pair, AS_WRITTEN)
    failed = next((row["tensor"] for row in rows if not row["passed"]), None)
    return result | {
        "passed": result["passed"] and failed is None,
        "checks": [*result["checks"], *rows],
        "first_diverging": fault.get("tensor") or result["first_diverging"] or failed,
        "divergence": fault or result["divergence"],
    }


def explain(
    fragments: OnnxFragments, denoiser: nn.Module, call: Call, *, bounds: Bounds, precision: Precision
) -> dict[str, Any]:
    """The fault inside a graph, on one call.

    Returns:
        `kind`, `tensor` and more: `not finite` with `explain_overflow`'s figures (fp16), else `find_divergence`'s.
    """
    if precision == "fp16" and (overflow := explain_overflow(fragments, denoiser, call)):
        return {"kind": "not finite", **overflow}
    return find_divergence(fragments, denoiser, call, bounds.relative_l2)
