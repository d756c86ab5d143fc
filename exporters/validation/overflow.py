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
        and gives only what half precision can hold, or paths, with spaces between, of the fewest modules one after
        another that do; None if there are none) and `advice`; None if all is finite.
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


@dataclass(frozen=True)
class _Seen:
    """A call of a module by the module around it."""

    name: str
    takes: float
    """Largest magnitude among the tensors that it takes."""
    gives: float
    follows: bool
    """Whether it takes the very tensor that the call before it gave."""


@torch.no_grad()
def _to_keep(denoiser: nn.Module, call: Call, path: str) -> str | None:
    """The smallest module at or around `path` whose inputs and output fit half precision, with room to spare.

    Where modules hand one another what does not fit, as blocks do their residual stream, they are kept together: all
    from the one that takes what fits to the one that gives it, unless that is all of the module around them.
    """
    modules = dict(denoiser.named_modules())
    around = [path]
    while around[-1]:
        around.append(_caller(modules, around[-1]))
    for inner, calls in zip(around, _calls_within(modules, denoiser, call, around[1:]), strict=False):
        first = last = next((i for i, one in enumerate(calls) if one.name == inner), None)
        if first is None or last is None:
            continue
        while calls[first].takes >= LARGEST / 2 and calls[first].follows:
            first -= 1
        while calls[last].gives >= LARGEST / 2 and last + 1 < len(calls) and calls[last + 1].follows:
            last += 1
        run = calls[first : last + 1]
        if max(run[0].takes, run[-1].gives) < LARGEST / 2 and (len(run) == 1 or len(run) < len(calls)):
            return " ".join(dict.fromkeys(one.name for one in run))
    return None


def _caller(modules: dict[str, nn.Module], name: str) -> str:
    """The module around one, which calls it: no list of modules."""
    outer = name.rpartition(".")[0]
    return _caller(modules, outer) if isinstance(modules.get(outer), nn.ModuleList | nn.ModuleDict) else outer


def _calls_within(
    modules: dict[str, nn.Module], denoiser: nn.Module, call: Call, outer: list[str]
) -> list[list[_Seen]]:
    """Of each of these modules, the calls that it makes, in order."""
    found: dict[str, list[_Seen]] = {name: [] for name in outer}
    given: dict[str, Tensor | None] = {}

    def after(name: str, caller: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        takes, gives = (
            _tensors(nest) for nest in ([args, kwargs], output if isinstance(output, Tensor) else [*output])
        )
        follows = given.get(caller) is not None and any(tensor is given[caller] for tensor in takes)
        found[caller].append(_Seen(name, _largest(takes), _largest(gives), follows))
        given[caller] = next(iter(gives), None)

    with ExitStack() as hooks:
        for name, module in modules.items():
            caller = _caller(modules, name)
            if name and caller in found:
                hook = partial(after, name, caller)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        predict(denoiser, call)
    return list(found.values())


def _tensors(nest: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, nest)  # type: ignore[func-returns-value]
    return found


def _largest(tensors: list[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.is_floating_point() and t.numel()), default=0.0)
