"""Where a graph parts from its model: the first tensor whose own error is over the bound, with its module and node.

The reference is the model in torch, float32. Its modules run under hooks, and each hook sees the value of one tensor
of the graph, whose nodes are named by module. Between two such tensors lie a few nodes: they run in ONNX Runtime on the
*reference's* values, so their error is their own, whatever came before them.

Bisection over marked outputs, as `polygraphy debug` does it, was the other way. It compares values that carry the
errors of everything before them, which a residual stream dilutes below the bound and half precision lifts above it, so
it names the wrong place; and it takes log2(n) runs of the graph, where this takes one, and that only up to the fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from exporters.graphs.export import unet_inputs
from exporters.graphs.reading import module_of, name_of
from exporters.validation.fragments import OnnxFragments
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call, predict, time_name
from slimdiff.errors import InputError
from slimdiff.progress import bar

if TYPE_CHECKING:
    import onnx_ir as ir

Place = tuple[str, str]
"""Module path, and `in` (what a module without children takes) or `out` (what a module gives)."""


@dataclass(frozen=True)
class Part:
    """Nodes between tensors whose values the reference has."""

    place: Place
    """Where the reference's value of `output` is seen."""
    output: str
    """Name of the tensor in the graph."""
    nodes: list[ir.Node]
    reads: list[str]
    """Names of the tensors that the nodes take."""


@dataclass(frozen=True)
class OwnError:
    """The error of one part of the graph on the reference's values."""

    tensor: str
    """Path of the module that gives it; of a tensor that no module gives (a sum, a softmax), the name of its node."""
    module: str
    """Path of the module whose node makes it."""
    relative_l2: float | None
    """`|candidate - reference| / |reference|`; None if they could not be compared."""
    not_finite: int
    """Values of the candidate that are NaN or infinite."""
    reference_max_abs: float
    problem: str | None
    """Why they could not be compared: another shape, or ONNX Runtime's words."""

    def within(self, bound: float) -> bool:
        """Whether the part computes what the module does."""
        return self.relative_l2 is not None and self.relative_l2 <= bound


def own_errors(fragments: OnnxFragments, denoiser: nn.Module, call: Call) -> list[OwnError]:
    """Run the graph part by part on the reference's values, in execution order.

    In memory are the values that parts still to come will read, and the weights of one part. The denoiser is the
    graph's model in torch, float32.
    """
    return [error for _, error in _run_parts(fragments, denoiser, call, _parts(fragments, denoiser, call), None)]


def find_divergence(fragments: OnnxFragments, denoiser: nn.Module, call: Call, bound: float) -> dict[str, Any]:
    """The first part, in execution order, whose own error is over the bound.

    The denoiser is the graph's model in torch, float32; the bound is one of the relative L2.

    Returns:
        `kind` and `tensor` with more. `own error`: `OwnError`'s fields, `bound` and `node`, the name of the part's
        first node from which on nothing is what the module computes. `accumulated`, where every part is right within
        the bound and errors only add up: no tensor and, as `largest`, these fields of the part with the largest error.
    """
    parts = _parts(fragments, denoiser, call)
    errors = _run_parts(fragments, denoiser, call, parts, bound)
    part, error = errors[-1]
    if not error.within(bound):
        node = _first_node(fragments, denoiser, call, parts, part, bound)
        return {"kind": "own error", **asdict(error), "bound": bound, "node": node.name}
    part, error = max(errors, key=lambda pair: pair[1].relative_l2 or 0.0)
    largest = {**asdict(error), "bound": bound, "node": part.nodes[-1].name}
    return {"kind": "accumulated", "tensor": None, "largest": largest}


class _Stop(Exception):
    """Ends a forward pass early."""


def _run_parts(
    fragments: OnnxFragments, denoiser: nn.Module, call: Call, parts: list[Part], bound: float | None
) -> list[tuple[Part, OwnError]]:
    last_use = {name: number for number, part in enumerate(parts) for name in part.reads}
    numbers = {part.place: number for number, part in enumerate(parts)}
    values = graph_inputs(call)
    errors: list[tuple[Part, OwnError]] = []

    def compare(place: Place, value: Tensor) -> None:
        if place not in numbers:
            return
        number = numbers[place]
        part = parts[number]
        reference = _as_in_graph(fragments, part.output, value.float().cpu().numpy().copy())
        error = _own_error(fragments, part, values, reference)
        errors.append((part, error))
        values[part.output] = reference
        for name in [n for n in values if last_use.get(n, -1) <= number]:
            del values[name]
        shown.update()
        if bound is not None and not error.within(bound):
            raise _Stop

    with bar(total=len(parts), name="tensors", unit="tensor") as shown:
        _watch(denoiser, call, compare)
    return errors


def _own_error(fragments: OnnxFragments, part: Part, values: dict[str, np.ndarray], reference: np.ndarray) -> OwnError:
    path, side = part.place
    node = part.nodes[-1]
    tensor = (path or part.output) if side == "out" else str(node.name)
    problem, distance, broken = None, None, 0
    try:
        (candidate,) = fragments.run(part.nodes, values, [part.output])
    except InputError as error:
        problem = str(error)
    else:
        broken = int(candidate.size - np.isfinite(candidate).sum())
        if candidate.shape != reference.shape:
            problem = f"its shape is {list(candidate.shape)}, the model's {list(reference.shape)}"
        elif not broken:
            distance = _relative_l2(candidate, reference)
    return OwnError(tensor, module_of(node), distance, broken, float(np.abs(reference).max(initial=0)), problem)


def _as_in_graph(fragments: OnnxFragments, name: str, array: np.ndarray) -> np.ndarray:
    """A module's tensor in the shape that the graph has it in: the exporter joins the module's last reshape with what
    comes after it, so that heads may be apart already (`[B, L, H, d]` of `[B, L, H d]`).

    The array as it is where the graph's dims are not the array's, some of them taken apart.
    """
    dims = [array.shape[0] if axis == 0 else dim for axis, dim in enumerate(fragments.shape(name))]
    sizes = [dim for dim in dims if isinstance(dim, int)]
    if len(sizes) < len(dims) or prod(sizes) != array.size or len(sizes) <= array.ndim:
        return array
    ends = {prod(sizes[:axis]) for axis in range(len(sizes) + 1)}
    apart = all(prod(array.shape[:axis]) in ends for axis in range(array.ndim + 1))
    return array.reshape(sizes) if apart else array


def _relative_l2(candidate: np.ndarray, reference: np.ndarray) -> float:
    norm = np.linalg.norm(reference.ravel().astype(np.float64)) or 1.0
    return float(np.linalg.norm((candidate.astype(np.float64) - reference).ravel()) / norm)


def graph_inputs(call: Call) -> dict[str, np.ndarray]:
    """A recorded call as arrays by the names of the graph's inputs, float32; a VAE's has their names already."""
    inputs = call.to("cpu", torch.float32)
    if time_name(inputs):
        inputs = unet_inputs(Call(call.step, call.timestep, inputs))
    return {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}


def _parts(fragments: OnnxFragments, denoiser: nn.Module, call: Call) -> list[Part]:
    """The graph as parts, in the order in which the reference reaches their outputs."""
    places: list[Place] = []
    _watch(denoiser, call, lambda place, _: places.append(place))
    times = Counter(places)  # of a module that is called more than once, the graph doesn't tell which call a node is
    modules = dict(denoiser.named_modules())
    outputs = fragments.module_outputs(modules) | {"": fragments.outputs[0]}
    inputs = fragments.module_inputs(path for path, module in modules.items() if not [*module.children()])
    parts, known = [], set(fragments.inputs)
    for place in places:
        path, side = place
        name = (inputs if side == "in" else outputs).get(path)
        if name is None or name in known or times[place] > 1:
            continue
        nodes, reads = fragments.between(known, [name])
        parts.append(Part(place, name, nodes, reads))
        known.add(name)
    return parts


@torch.no_grad()
def _watch(denoiser: nn.Module, call: Call, see: Callable[[Place, Tensor], None]) -> None:
    """Run the model; show `see` every module's output and every childless module's one input, as they come."""

    def after(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        # Of several tensors side by side (both streams of joint attention), the graph does not tell which is which.
        several = output.values() if isinstance(output, Mapping) else output
        values = [output] if isinstance(output, Tensor) else list(several)
        if isinstance(values[0], Tensor) and not any(isinstance(other, Tensor) for other in values[1:]):
            see((path, "out"), values[0])

    def before(path: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            see((path, "in"), args[0])

    with ExitStack() as hooks, suppress(_Stop):
        for path, module in denoiser.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(after, path)))
            if not [*module.children()]:
                hooks.enter_context(module.register_forward_pre_hook(partial(before, path)))
        predict(denoiser, call)


class _Record(TorchDispatchMode):
    """Keeps what torch computes, operator by operator, from when `kept` is set to a list."""

    kept: list[np.ndarray] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if self.kept is not None and isinstance(value, Tensor) and value.is_floating_point():
                self.kept.append(value.detach().float().cpu().numpy().ravel())
        return result


def _first_node(
    fragments: OnnxFragments, denoiser: nn.Module, call: Call, parts: list[Part], part: Part, bound: float
) -> ir.Node:
    """The first node of a part that went wrong, by the values that torch computes between the same two tensors.

    Not every node has its like in torch (the exporter writes some operators as several), so a node counts as right if
    anything computed from it is.
    """
    names = [name_of(node.outputs[0]) for node in part.nodes]
    if len(names) == 1:
        return part.nodes[0]
    values, kept = _values_within(fragments, denoiser, call, parts, part)
    try:
        results = dict(zip(names, fragments.run(part.nodes, values, names), strict=True))
    except InputError:
        return part.nodes[0]
    right: set[str] = set()
    for node, name in zip(reversed(part.nodes), reversed(names), strict=True):
        value = results[name].ravel()
        alike = any(k.size == value.size and _relative_l2(value, k) <= bound for k in kept)
        if name != part.output and (alike or name in right):
            right.update(fragments.reads(node))
            right.add(name)
    return next(node for node, name in zip(part.nodes, names, strict=True) if name not in right)


def _values_within(
    fragments: OnnxFragments, denoiser: nn.Module, call: Call, parts: list[Part], part: Part
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The reference's values of what a part reads, and all that torch computes from the last of them to the output."""
    outputs = {other.place: other.output for other in parts if other.output in part.reads}
    values = {name: value for name, value in graph_inputs(call).items() if name in part.reads}
    # The attention kernels show nothing of their inside; the plain one computes what the graph does.
    with own_torch_state(), sdpa_kernel(SDPBackend.MATH), _Record() as record:

        def see(place: Place, value: Tensor) -> None:
            if place == part.place:
                raise _Stop
            if name := outputs.get(place):
                values[name] = _as_in_graph(fragments, name, value.float().cpu().numpy().copy())
                record.kept = []

        _watch(denoiser, call, see)
    return values, record.kept or []
