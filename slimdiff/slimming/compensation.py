"""Error compensation: linear layers behind what was slimmed, solved again for what they receive in the slim model.

Local forms take what a layer receives in the dense model for granted; in the slim one, what comes before it has changed
that already. So a layer is solved by least squares to give out what it gives out in the dense model,
`W' = argmin |Y - W' X' - c|^2 + lambda |W' - W|^2`, with X' from the slim model and Y from the dense one (sequential
re-solving is MoDeGPT's and SlimGPT's; which layers are worth it, and the ridge that other calls choose, are ours).

What pays is the projection at the end of a transformer: it sees the sum of all that its blocks got wrong, and the
stream that tells much of it. The last linears themselves, after their local solution, gain next to nothing so. With
`everything`, Y is the dense model's sum less the rest of the slim model's: each layer that joins the residual stream
also mends what that has lost before. A resnet's second convolution and its shortcut are one least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimdiff.algebra.least_squares import Sums, solve
from slimdiff.denoising.replay import Frontier, held_bytes
from slimdiff.denoising.samples import batch_size, some_of, spread
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.plan import Plan
from slimdiff.progress import bar
from slimdiff.slimming.streams import Layer, Spot, everything, output_projection

# Most memory for what the dense layers gave: of larger models, evenly spread tokens of each call are taken.
OUTPUT_BYTES = 512 * 2**20
# Most memory for what calls have computed before the layer whose turn it is.
HELD_BYTES = 2 * 2**30
SAMPLES = ""
"""Where `dense_rows` says which samples of a call it took: no layer has that path."""


class _Reached(Exception):
    """The last layer that is watched has run: the rest of the forward pass is of no interest."""


Stages = list[list[Layer]]
DenseOutputs = Callable[[tuple[Layer, ...]], list[dict[str, Tensor]]]
"""What layers give out in the dense model, or the sums that they join, as `dense_rows` has it."""


class _Seen(NamedTuple):
    """One call at one layer: what it receives, what it and the one beside it give, and the sum that they join."""

    received: list[Tensor]
    given: list[Tensor]
    total: Tensor | None


def stages(denoiser: nn.Module, plan: Plan, calls: Sequence[Call]) -> Stages:
    """The layers that are solved again: those of a stage together, the stages one after the other.

    Args:
        denoiser: the dense model.
        plan: whose `forms.compensate` says which: with `projections`, those behind slimmed blocks, in one stage; with
            `sequential`, in the order in which they run, each block's last linears, and each transformer's projection
            after its blocks; with `everything`, from the first that is slimmed on, each layer that joins the stream.

    Raises:
        InputError: if there is no call.
    """
    how = plan.forms.compensate
    slimmed = [site for site in plan.sites.values() if site.rank < site.dense_rank]
    modules = {site.path: denoiser.get_submodule(site.path) for site in slimmed}
    cut = {site.path: last for site in slimmed if (last := GROUPS[site.group].mended(modules[site.path]))}
    if how == "none" or not (slimmed if how == "everything" else cut):
        return []
    if not calls:
        raise InputError(
            "errors are compensated on recorded denoiser calls: give some (slimdiff.denoising.trajectory.record_calls)"
        )
    if how == "everything":
        layers = everything(denoiser, plan)
        places = {path: place for place, path in enumerate(_order(denoiser, layers, calls[0]))}
        layers = sorted((layer for layer in layers if layer.path in places), key=lambda layer: places[layer.path])
        touched = [any(layer.path.startswith(f"{site.path}.") for site in slimmed) for layer in layers]
        return [[layer] for layer in layers[touched.index(True) :]] if any(touched) else []
    projections = {path: output_projection(denoiser, path) for path in sorted(cut)}
    if how == "projections":
        found = dict.fromkeys(projection for projection in projections.values() if projection is not None)
        return [[Layer(path) for path in found]] if found else []
    lasts = {f"{path}.{cut[path]}": path for path in sorted(cut)}
    behind = [p for p in dict.fromkeys(projections.values()) if p]
    order = _order(denoiser, [Layer(path) for path in [*lasts, *behind]], calls[0])

    def block(name: str) -> str:
        return lasts[name].rpartition(".")[0] if name in lasts else name

    return [[Layer(path) for path in names] for _, names in groupby(order, block)]


def _order(denoiser: nn.Module, layers: Sequence[Layer], call: Call) -> list[str]:
    """Paths of layers in the order in which they run; those that do not are left out."""
    return list(_watch(denoiser, [Layer(layer.path) for layer in layers], call))


@torch.no_grad()
def dense_rows(denoiser: nn.Module, calls: Sequence[Call], layers: tuple[Layer, ...]) -> list[dict[str, Tensor]]:
    """What a dense model's layers give out, or the sums that they join: by call and path of the layer `[R, m]`.

    Of evenly spread tokens, float32 on the CPU. Where what the calls have computed before each layer is more than
    memory holds, of a few samples of each call: which ones, `SAMPLES` says.
    """
    taken = _samples(denoiser, calls[0], layers, len(calls))
    width = sum(len(denoiser.get_parameter(f"{layer.path}.weight")) * layer.share for layer in layers)
    most = OUTPUT_BYTES / (4 * width * len(calls))
    rows = []
    for number, call in enumerate(bar(calls, "dense outputs", "call")):
        here = {} if taken is None else {SAMPLES: spread(batch_size(call) or 1, taken, number)}
        seen = _watch(denoiser, layers, some_of(call, here[SAMPLES]) if here else call)
        for layer in layers:
            own = seen[layer.path]
            output = own.given[0] if own.total is None else own.total
            here[layer.path] = _rows(output, number, max(1, int(most * layer.share))).float().cpu()
        rows.append(here)
    return rows


@torch.no_grad()
def compensate(slim: nn.Module, stages: Stages, outputs: Sequence[Mapping[str, Tensor]], calls: Sequence[Call]) -> None:
    """Mend a slim model in place.

    Args:
        slim: whose layers of these stages get weights of their own, and biases where they have some.
        calls: recorded denoiser calls, with many more tokens in them than a layer has inputs.
    """
    calls = [some_of(c, own[SAMPLES]) if SAMPLES in own else c for c, own in zip(calls, outputs, strict=True)]
    every = [path for layers in stages for layer in layers for path in layer.paths]
    frontier = Frontier(slim, calls, every, HELD_BYTES) if len(stages) > 1 else None
    with bar(name="compensate", unit="call", total=len(stages) * len(calls)) as done:
        for layers in stages:
            halves: dict[str, tuple[Sums, Sums]] = {}
            for number, call in enumerate(calls):
                with frontier.before(number, layers[0].path) if frontier else nullcontext():
                    seen = _watch(slim, layers, call)
                for layer in layers:
                    x, y = _pair(slim, layer, seen[layer.path], outputs[number][layer.path], number)
                    if layer.path not in halves:
                        halves[layer.path] = tuple(Sums.zeros(x.shape[1], y.shape[1], x) for _ in range(2))  # type: ignore[assignment]
                    halves[layer.path][number % 2].add(x.T, y.T)
                done.update()
            for layer in layers:
                _solve([slim.get_submodule(path) for path in layer.paths], halves[layer.path])


def _samples(denoiser: nn.Module, call: Call, layers: Sequence[Layer], calls: int) -> int | None:
    """How many samples of each call are taken; None for all of them."""
    batch = batch_size(call)
    if batch is None or not any(layer.stream for layer in layers):
        return None
    taken = batch * HELD_BYTES // (calls * max(1, held_bytes(denoiser, call, [layer.path for layer in layers])))
    return None if taken >= batch else max(1, taken)


def _pair(slim: nn.Module, layer: Layer, seen: _Seen, dense: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """What a layer receives `[R, n]`, the one beside it too, and what it is to give out `[R, m]`."""
    most = len(dense)
    parts = []
    for path, received in zip(layer.paths, seen.received, strict=True):
        part: Any = slim.get_submodule(path)
        wide = isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1)
        parts.append((_patches if wide else _rows)(received, number, most).float())
    x = torch.cat(parts, 1)
    y = dense.to(x.device)
    if seen.total is not None:
        y = y - _rows(seen.total, number, most).float()
        for given in seen.given:
            y = y + _rows(given, number, most).float()
        if layer.beside and (bias := slim.get_submodule(layer.beside).bias) is not None:
            y = y - bias  # type: ignore[operator]
    return x, y


def _solve(layers: Sequence[nn.Module], halves: tuple[Sums, Sums]) -> None:
    """Solve a layer again, with the one beside it; the constant is the first one's bias."""
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    prior = torch.cat([weight.double().flatten(1) for weight in weights], 1).T
    solved, constant = solve(halves, prior, None, constant=layers[0].bias is not None)
    widths = [weight[0].numel() for weight in weights]
    # New parameters: what did not change is shared with the dense model.
    for layer, weight, own in zip(layers, weights, solved.split(widths), strict=True):
        layer.weight = nn.Parameter(own.T.reshape(weight.shape).to(weight), requires_grad=False)
    if layers[0].bias is not None:
        layers[0].bias = nn.Parameter(constant.to(weights[0]), requires_grad=False)


def _rows(tensor: Tensor, number: int, most: int) -> Tensor:
    """At most this many tokens of `[..., n]` or `[B, n, H, W]`, as `[R, n]`: evenly spread, others at each call."""
    flat = tensor.movedim(1, -1).flatten(0, -2) if tensor.ndim == 4 else tensor.flatten(0, -2)
    picks = _picks(len(flat), number, most)
    return flat if picks is None else flat[picks.to(flat.device)]


def _patches(tensor: Tensor, number: int, most: int) -> Tensor:
    """What a convolution of 3 x 3 sees at the pixels that `_rows` takes, as `[R, 9 n]`."""
    height, width = tensor.shape[2:]
    picks = _picks(len(tensor) * height * width, number, most)
    at = torch.arange(len(tensor) * height * width) if picks is None else picks
    at = at.to(tensor.device)
    image, row, column = at // (height * width), at // width % height, at % width
    padded = functional.pad(tensor, (1, 1, 1, 1))
    return torch.stack([padded[image, :, row + i, column + j] for i in range(3) for j in range(3)], 2).flatten(1)


def _picks(count: int, number: int, most: int) -> Tensor | None:
    """Which tokens of a call are taken; None for all."""
    if count <= most:
        return None
    step = count / most
    return (torch.arange(most, dtype=torch.float64) * step + number % max(int(step), 1)).long() % count


def _watch(denoiser: nn.Module, layers: Sequence[Layer], call: Call) -> Mapping[str, _Seen]:
    """What layers receive and give in one call, by path, in the order in which they run."""
    received: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    totals: dict[Spot, Tensor] = {}
    spots = {layer.stream for layer in layers if layer.stream is not None}
    paths = [path for layer in layers for path in layer.paths]

    def reached() -> None:
        if len(given) == len(paths) and len(totals) == len(spots):
            raise _Reached

    def of_layer(path: str, _module: nn.Module, args: tuple[Tensor, ...], named: Any, output: Tensor) -> None:
        received[path], given[path] = args[0] if args else named["input"], output
        reached()

    def of_sum(spot: Spot, _module: nn.Module, args: tuple[Tensor, ...], output: Any = None) -> None:
        value = args[0] if spot.received else output if isinstance(output, Tensor) else output[0]
        totals[spot] = value * spot.scale if spot.scale != 1 else value
        reached()

    with ExitStack() as stack:
        for path in paths:
            layer = denoiser.get_submodule(path)
            stack.enter_context(layer.register_forward_hook(partial(of_layer, path), with_kwargs=True))
        for spot in spots:
            module, hook = denoiser.get_submodule(spot.path), partial(of_sum, spot)
            watch = module.register_forward_pre_hook if spot.received else module.register_forward_hook
            stack.enter_context(watch(hook))  # type: ignore[operator]
        with suppress(_Reached):
            predict(denoiser, call)
    order = [layer for path in given for layer in layers if layer.path == path]
    return {
        layer.path: _Seen(
            [received[p] for p in layer.paths],
            [given[p] for p in layer.paths],
            totals.get(layer.stream),  # type: ignore[arg-type]
        )
        for layer in order
    }
