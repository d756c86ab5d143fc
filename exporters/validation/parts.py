"""A denoiser in parts, part by part: which of them, if any, computes something else than the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graphs.export import unet_inputs
from exporters.graphs.reading import read_graph
from exporters.graphs.split import crossing
from exporters.layout import ENGINE, STEP
from exporters.runtimes.denoiser import GraphDenoiser
from exporters.runtimes.module import feed_of
from exporters.runtimes.split import SplitSession
from exporters.validation.fragments import OnnxFragments
from exporters.validation.parity import Bounds, at_time, check
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError

EXACT = Bounds(cosine=0.99999, relative_l2=1e-6)
"""Of the whole graph and its parts in one runtime, fp32: they compute the same, but for the order of sums."""
Arrays = dict[str, np.ndarray]


def bounds_for(reference: nn.Module, candidate: nn.Module) -> Bounds | None:
    """`EXACT` where both are graphs in fp32 in one runtime, and the candidate alone is in parts; None otherwise."""
    if not (isinstance(reference, GraphDenoiser) and isinstance(candidate, GraphDenoiser)):
        return None
    whole, parts = reference.session, candidate.session
    alike = whole.runtime == parts.runtime and whole.precision == parts.precision == "fp32"
    return EXACT if alike and isinstance(parts, SplitSession) and not isinstance(whole, SplitSession) else None


def check_parts(
    result: dict[str, Any], reference: nn.Module, parts: SplitSession, calls: Sequence[Call], bounds: Bounds
) -> dict[str, Any]:
    """Hold every part against what the reference has in its place.

    The parts of prompt and time get a call's inputs, and their answers are held against the reference's tensors there;
    the step gets the reference's tensors. So a fault shows in its own part alone.

    Args:
        result: `check_calls`'s of the same two.
        reference: the model in torch, or a UNet in a runtime, whole or in parts.

    Returns:
        the result with a check per call and part, named after the part and the tensor that is farthest off (`prompt:
        mid_block.attentions.0.transformer_blocks.0.attn2.to_k@t=981`), metric `relative_l2`. The first that fails is
        what `first_diverging` names.
    """
    if isinstance(reference, GraphDenoiser) and reference.session.source.endswith(ENGINE):
        return result  # nothing is seen of its inside
    tensors_of, rows = _tensors_of(reference, parts), []
    for call in calls:
        right, feed = tensors_of(call), feed_of(parts, unet_inputs(call))
        own: Arrays = {}  # what the reference has no tensor of: a module in torch that gives several
        for part, session in parts.parts.items():
            if part == STEP:
                taken = parts.inputs_of(part, feed | own | right)
                taken = {name: array.astype(session.dtypes[name]) for name, array in taken.items()}
                outputs, expected = session.run(taken), {"out_sample": predict(reference, call).numpy()}
            else:
                outputs, expected = parts.answer(part, feed), right
                own |= outputs
            errors = {name: _error(expected[name], outputs[name]) for name in outputs if name in expected}
            if not errors:
                continue
            worst = max(errors, key=lambda name: errors[name])
            row = at_time(f"{part}: {worst}", call)
            rows.append(
                check(row, "relative_l2", errors[worst], bounds.relative_l2, errors[worst] <= bounds.relative_l2)
            )
    failed = next((row["tensor"] for row in rows if not row["passed"]), None)
    return result | {
        "passed": result["passed"] and failed is None,
        "checks": [*result["checks"], *rows],
        "first_diverging": failed or result["first_diverging"],
    }


def _error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Relative L2; infinite for other shapes and where either is not finite."""
    if reference.shape != candidate.shape:
        return np.inf
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    error = float(np.linalg.norm(b - a) / (np.linalg.norm(a) or 1.0))
    return error if np.isfinite(error) else np.inf


def _tensors_of(reference: nn.Module, parts: SplitSession) -> Callable[[Call], Arrays]:
    """A function from a call to what a reference has in the places of what the step takes from the other parts."""
    names = [name for part, session in parts.parts.items() if part != STEP for name in session.outputs]
    if not isinstance(reference, GraphDenoiser):
        return partial(_in_torch, reference, names)
    if isinstance(own := reference.session, SplitSession):
        others = [part for part in own.parts if part != STEP]
        return lambda call: {
            name: array for part in others for name, array in own.answer(part, feed_of(own, unet_inputs(call))).items()
        }
    fragments, values = OnnxFragments(own.source), crossing(read_graph(own.source))
    if lacking := [name for name in names if name not in values]:
        raise InputError(
            f"{parts.source} is not in parts as {own.source} is: it has {lacking[0]}; export one of them again"
        )
    inputs = fragments.inputs
    nodes, _ = fragments.between(inputs, values.values())

    def in_graph(call: Call) -> Arrays:
        arrays = fragments.run(nodes, feed_of(own, unet_inputs(call)), list(values.values()))
        return dict(zip(values, arrays, strict=True))

    return in_graph


def _in_torch(denoiser: nn.Module, names: Sequence[str], call: Call) -> Arrays:
    """What modules of these names give; the second call of one is named `NAME_2`, as in the graph."""
    seen: Arrays = {}
    modules: Mapping[str, nn.Module] = dict(denoiser.named_modules())
    calls: Counter[str] = Counter()

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        calls[name] += 1
        if isinstance(output, Tensor):
            key = name if calls[name] == 1 else f"{name}_{calls[name]}"
            seen[key] = output.detach().cpu().float().numpy()

    handles = [modules[name].register_forward_hook(partial(keep, name)) for name in names if name in modules]
    try:
        with torch.no_grad():
            predict(denoiser, call)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in names if name in seen}
