"""Whether a graph's int8 layers are what they should be: held, one by one, against the model that the graph is of.

Of a right graph the weights are within half a step of the model's, and rounding an input to the graph's steps costs
about what rounding to the best ones does: those that the largest input of all calls just fits into. A wrong scale or
zero point breaks one of both, however little the image shows of it. A layer that should be in int8 and is not changes
no image at all: it is held against what the graph says of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graphs.int8_costs import in_int8
from exporters.graphs.int8_layers import Int8Layer, int8_layers, report_of
from exporters.graphs.reading import read_graph
from exporters.validation.parity import check
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.progress import bar

WEIGHT_STEPS = 0.51
"""Most that a weight may be from the model's, in steps of its channel: half of one, and the rounding of floats."""
STEPS_ERROR = 4.0
"""Most times the error of a layer with the best steps that it may have with the graph's own."""
FLOOR = 5e-3
"""Relative error of a layer below which its steps are right, whatever the best ones are."""
_SEVEN_BITS = 63


def check_int8_layers(
    graph: Path | str, unet: nn.Module, calls: Sequence[Call]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Hold every int8 layer of a graph against the model: its errors on the call in the middle.

    Args:
        unet: the graph's model in torch, float32.
        calls: whose largest inputs say what steps are best: of all times, for inputs grow and shrink with it.

    Returns:
        checks, and the fault of the first layer that fails one, in `find_divergence`'s form; empty if none does. Of
        each metric there is the row of its first failure, or of its largest value: `int8` (whether a layer is in int8
        that should be, and no other), `zero_point`, `weight_steps` (of the model's weight) and `int8_error` (of the
        layer's output, in units of that with the best steps).
    """
    model = read_graph(graph)
    layers, report = int8_layers(model), report_of(model)
    rows: list[tuple[str, dict[str, Any]]] = []
    said = list(layers) if report is None else report["layers"]
    for path in dict.fromkeys([*said, *layers]):
        rows.append((path, check(path, "int8", path in layers, path in said, (path in layers) == (path in said))))
    modules = dict(unet.named_modules())
    ours = {path: layer for path, layer in layers.items() if path in modules}
    for path, layer in ours.items() if report is not None else ():
        zero = max(int(np.abs(part.astype(np.int64)).max()) for part in layer.zero_points)
        rows.append((path, check(path, "zero_point", zero, 0, zero == 0)))
        steps = _weight_steps(layer, modules[path])
        rows.append((path, check(path, "weight_steps", steps, WEIGHT_STEPS, steps <= WEIGHT_STEPS)))
    errors = _own_errors(ours, unet, calls)
    for path, (own, best) in errors.items():
        times = own / best if best else float(own > 0)
        rows.append((path, check(path, "int8_error", times, STEPS_ERROR, times <= STEPS_ERROR or own <= FLOOR)))
    order = {path: number for number, path in enumerate(errors)}
    failed = [(path, row) for path, row in rows if not row["passed"]]
    first = min(failed, key=lambda pair: order.get(pair[0], len(order)), default=None)
    fault = {} if first is None else _fault(first[0], layers.get(first[0]), first[1], errors.get(first[0]))
    return _shown([row for _, row in rows]), fault


def _shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each metric the first failure, or the largest value."""
    by_metric: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    return [
        next((row for row in some if not row["passed"]), max(some, key=lambda row: row["value"]))
        for some in by_metric.values()
    ]


def _fault(
    path: str, layer: Int8Layer | None, row: dict[str, Any], errors: tuple[float, float] | None
) -> dict[str, Any]:
    problems = {
        "int8": "it should be in int8, and is not" if row["bound"] else "it is in int8, and should not be",
        "zero_point": f"its zero point is {row['value']}, where steps are symmetric",
        "weight_steps": f"a weight is {row['value']:.3g} steps from the model's" if layer else "",
        "int8_error": f"its error is {row['value']:.3g} times that of the best steps" if layer else "",
    }
    return {
        "kind": "own error",
        "tensor": path,
        "module": path,
        "node": layer.node.name if layer is not None else path,
        "relative_l2": None,
        "own_error": errors[0] if errors else None,
        "bound": row["bound"],
        "not_finite": 0,
        "problem": problems[row["metric"]],
    }


def _weight_steps(layer: Int8Layer, module: nn.Module) -> float:
    """How far a weight is from the model's at most, in steps of its channel; infinite for another shape."""
    own, weight = module.get_parameter("weight").detach().float().numpy(), layer.weight()
    if own.shape != weight.shape:
        return float("inf")
    scale = layer.scales[1].reshape(-1, *[1] * (own.ndim - 1)) if layer.scales[1].size > 1 else layer.scales[1]
    # Steps are held against the channel's own best ones too: too coarse ones would hide in themselves.
    best = np.abs(own).reshape(len(own), -1).max(1).reshape(-1, *[1] * (own.ndim - 1)) / _SEVEN_BITS
    steps = np.maximum(np.minimum(np.asarray(scale, np.float32), best * 1.02), np.finfo(np.float32).tiny)
    return float((np.abs(own - weight) / steps).max())


@torch.no_grad()
def _own_errors(layers: dict[str, Int8Layer], unet: nn.Module, calls: Sequence[Call]) -> dict[str, tuple[float, float]]:
    """Of each layer, on the model's own input: relative error with the graph's steps, and with the best ones."""
    largest, found = dict.fromkeys(layers, 0.0), dict[str, tuple[float, float]]()

    def measure(path: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        largest[path] = max(largest[path], float(args[0].abs().max()))

    def see(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if path in found:  # its own calls below, too
            return
        found[path] = 0.0, 0.0
        layer, norm = layers[path], float(output.norm()) or 1.0
        step = np.maximum(np.float32(largest[path] / 127), np.finfo(np.float32).tiny)
        zero = np.zeros(1, np.int8)
        best = replace(layer, scales=(step, layer.scales[1]), zero_points=(zero, layer.zero_points[1]))
        errors = []
        for steps in (layer, best):
            with in_int8(module, steps):
                errors.append(float((module(*args) - output).norm()) / norm)
        found[path] = errors[0], errors[1]

    with ExitStack() as hooks:
        for path in layers:
            hooks.enter_context(unet.get_submodule(path).register_forward_pre_hook(partial(measure, path)))
        for call in bar(calls, "int8 layers", "call"):
            predict(unet, call)
    with ExitStack() as hooks:
        for path in layers:
            hooks.enter_context(unet.get_submodule(path).register_forward_hook(partial(see, path)))
        predict(unet, calls[len(calls) // 2])
    return found
