"""Which tensor of a graph stops being finite first, and what would keep it finite."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graphs.reading import module_of, name_of
from exporters.validation.divergence import graph_inputs
from exporters.validation.fragments import OnnxFragments
from slimdiff.denoising.trajectory import Call, map_tensors, predict
from slimdiff.progress import bar

LARGEST = float(np.finfo(np.float16).max)
"""Of finite half-precision numbers: 65504."""


@dataclass(frozen=True)
class NotFinite:
    """The first node whose output holds NaN or infinite values."""

    node: str
    """Its name; what is before the slash is the module's path."""
    module: str
    operator: str
    not_finite: int
    """Count of such values."""
    input_max_abs: float
    """Largest magnitude among the node's inputs, its weights aside; half precision ends at 65504."""


def first_not_finite(fragments: OnnxFragments, call: Call) -> NotFinite | None:
    """Run a graph node by node, on its own values, up to the first that is not finite.

    In memory are the values that nodes still to come will read, and the weights of one node.

    Returns:
        None if every tensor of the graph is finite.
    """
    last_use = {name: i for i, node in enumerate(fragments.nodes) for name in fragments.reads(node)}
    values = graph_inputs(call)
    for index, node in enumerate(bar(fragments.nodes, name="finite values", unit="node")):
        names = [name_of(value) for value in node.outputs if value.name]
        outputs = dict(zip(names, fragments.run([node], values, names), strict=True))
        broken = sum(int(v.size - np.isfinite(v).sum()) for v in outputs.values() if v.dtype.kind == "f")
        if broken:
            inputs = [values[name] for name in fragments.reads(node)]
            largest = max((float(np.abs(v.astype(np.float64)).max(initial=0)) for v in inputs), default=0.0)
            return NotFinite(str(node.name), module_of(node), node.op_type, broken, largest)
        values |= outputs
        for name in [n for n in values if last_use.get(n, -1) <= index]:
            del values[name]
    return None


def explain_overflow(fragments: OnnxFragments, denoiser: nn.Module, call: Call) -> dict[str, Any] | None:
    """The first tensor in the graph of `denoiser` (float32) that is not finite, and the module to keep in fp32.

    Returns:
        `NotFinite`'s fields, `tensor` (the node's name), `keep_fp32` (path of the smallest module around it that takes
        and gives only what half precision can hold; None if there is none) and `advice`; None if all is finite.
    """
    found = first_not_finite(fragments, call)
    if found is None:
        return None
    keep = _to_keep(denoiser, call, found.module)
    large = "already large" if found.input_max_abs > LARGEST / 16 else "not large"
    if keep is None:
        what = "no module around it stays within the range of fp16, so export the model in fp32"
    else:
        what = f"keep {keep} in fp32 (--keep-fp32 {keep}, in a recipe export.keep_fp32)"
    advice = f"its input was {large} (up to {found.input_max_abs:.4g}; fp16 ends at {LARGEST:.0f}): {what}"
    return {"tensor": found.node, **asdict(found), "keep_fp32": keep, "advice": advice}


@torch.no_grad()
def _to_keep(denoiser: nn.Module, call: Call, path: str) -> str | None:
    """The smallest module at or around `path` whose inputs and output fit half precision, with room to spare."""
    largest: dict[str, float] = {}

    def see(path: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel():
            largest[path] = max(largest.get(path, 0.0), float(tensor.abs().max()))
        return tensor

    def after(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        map_tensors(partial(see, path), [args, kwargs, output if isinstance(output, Tensor) else list(output)])

    around = [path]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    modules = dict(denoiser.named_modules())
    with ExitStack() as hooks:
        for name in (name for name in around[:-1] if name in modules):
            hooks.enter_context(modules[name].register_forward_hook(partial(after, name), with_kwargs=True))
        predict(denoiser, call)
    return next((name for name in around if name in largest and largest[name] < LARGEST / 2), None)
