"""Error compensation: linear layers behind what was slimmed, solved again for what they receive in the slim model.

Local forms take what a layer receives in the dense model for granted; in the slim one, what comes before it has changed
that already. So a layer is solved by least squares to give out what it gives out in the dense model,
`W' = argmin |Y - W' X' - c|^2 + lambda |W' - W|^2`, with X' from the slim model and Y from the dense one (sequential
re-solving is MoDeGPT's and SlimGPT's; which layers are worth it, and the ridge that other calls choose, are ours).

What pays is the projection at the end of a transformer: it sees the sum of all that its blocks got wrong, and the
stream that tells much of it. The last linears themselves, after their local solution, gain next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from slimdiff.algebra.least_squares import Sums, solve
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.plan import Plan
from slimdiff.progress import bar

# Most memory for what the dense layers gave: of larger models, evenly spread tokens of each call are taken.
OUTPUT_BYTES = 512 * 2**20


class _Reached(Exception):
    """The last layer that is watched has run: the rest of the forward pass is of no interest."""


Stages = list[list[str]]
DenseOutputs = Callable[[tuple[str, ...]], list[dict[str, Tensor]]]
"""What layers of these paths give out in the dense model, as `dense_rows` has it."""


def stages(denoiser: nn.Module, plan: Plan, calls: Sequence[Call]) -> Stages:
    """Paths of the layers that are solved again: those of a stage together, the stages one after the other.

    Args:
        denoiser: the dense model.
        plan: whose `forms.compensate` says which: with `projections`, those behind slimmed blocks, in one stage; with
            `sequential`, in the order in which they run, each block's last linears, and each transformer's projection
            after its blocks.

    Raises:
        InputError: if there is no call.
    """
    how = plan.forms.compensate
    slimmed = [site for site in plan.sites.values() if site.rank < site.dense_rank]
    modules = {site.path: denoiser.get_submodule(site.path) for site in slimmed}
    cut = {site.path: last for site in slimmed if (last := GROUPS[site.group].mended(modules[site.path]))}
    if how == "none" or not cut:
        return []
    if not calls:
        raise InputError(
            "errors are compensated on recorded denoiser calls: give some (slimdiff.denoising.trajectory.record_calls)"
        )
    projections = {path: _output_projection(denoiser, path) for path in sorted(cut)}
    if how == "projections":
        found = dict.fromkeys(projection for projection in projections.values() if projection is not None)
        return [list(found)] if found else []
    lasts = {f"{path}.{cut[path]}": path for path in sorted(cut)}
    order = list(_watch(denoiser, [*lasts, *(p for p in dict.fromkeys(projections.values()) if p)], calls[0]))

    def block(name: str) -> str:
        return lasts[name].rpartition(".")[0] if name in lasts else name

    return [list(names) for _, names in groupby(order, block)]


def _output_projection(denoiser: nn.Module, path: str) -> str | None:
    """Path of the projection (linear, or a convolution of 1 x 1) at the end of the transformer that a module is in.

    None where there is none: a transformer's blocks then add to a stream that goes on.
    """
    while path:
        path = path.rpartition(".")[0]
        last = getattr(denoiser.get_submodule(path), "proj_out", None)
        if type(last) is nn.Linear or (type(last) is nn.Conv2d and last.kernel_size == (1, 1) and last.groups == 1):
            return f"{path}.proj_out".lstrip(".")
    return None


@torch.no_grad()
def dense_rows(denoiser: nn.Module, calls: Sequence[Call], names: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """What a dense model's layers give out: by call and layer `[R, m]`, of evenly spread tokens, float32 on the CPU."""
    widths = sum(denoiser.get_parameter(f"{name}.weight").shape[0] for name in names)
    most = OUTPUT_BYTES // (4 * widths * len(calls))
    rows = []
    for number, call in enumerate(bar(calls, "dense outputs", "call")):
        seen = _watch(denoiser, names, call)
        rows.append({name: _rows(output, number, most).float().cpu() for name, (_, output) in seen.items()})
    return rows


@torch.no_grad()
def compensate(slim: nn.Module, stages: Stages, outputs: Sequence[Mapping[str, Tensor]], calls: Sequence[Call]) -> None:
    """Mend a slim model in place.

    Args:
        slim: whose layers of these stages get weights of their own, and biases where they have some.
        calls: recorded denoiser calls, with many more tokens in them than a layer has inputs.
    """
    with bar(name="compensate", unit="call", total=len(stages) * len(calls)) as done:
        for names in stages:
            halves: dict[str, tuple[Sums, Sums]] = {}
            for number, call in enumerate(calls):
                for name, (received, _) in _watch(slim, names, call).items():
                    dense = outputs[number][name]
                    x = _rows(received, number, len(dense)).float()
                    if name not in halves:
                        halves[name] = tuple(Sums.zeros(x.shape[1], dense.shape[1], x) for _ in range(2))  # type: ignore[assignment]
                    halves[name][number % 2].add(x.T, dense.to(x.device).T)
                done.update()
            for name in names:
                _solve(slim.get_submodule(name), halves[name])


def _solve(layer: nn.Module, halves: tuple[Sums, Sums]) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    solved, constant = solve(halves, weight.double().flatten(1).T, None, constant=layer.bias is not None)
    # New parameters: what did not change is shared with the dense model.
    layer.weight = nn.Parameter(solved.T.reshape(weight.shape).to(weight), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(constant.to(weight), requires_grad=False)


def _rows(tensor: Tensor, number: int, most: int) -> Tensor:
    """At most this many tokens of `[..., n]` or `[B, n, H, W]`, as `[R, n]`: evenly spread, others at each call."""
    flat = tensor.movedim(1, -1).flatten(0, -2) if tensor.ndim == 4 else tensor.flatten(0, -2)
    if len(flat) <= most:
        return flat
    step = len(flat) / most
    picks = (torch.arange(most, dtype=torch.float64) * step + number % max(int(step), 1)).long() % len(flat)
    return flat[picks.to(flat.device)]


def _watch(denoiser: nn.Module, names: Sequence[str], call: Call) -> Mapping[str, tuple[Tensor, Tensor]]:
    """What layers receive and give in one call, in the order in which they run."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str, _module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        seen[name] = (args[0] if args else named["input"], output)
        if len(seen) == len(names):
            raise _Reached

    with ExitStack() as stack:
        for name in names:
            layer = denoiser.get_submodule(name)
            stack.enter_context(layer.register_forward_hook(partial(hook, name), with_kwargs=True))
        with suppress(_Reached):
            predict(denoiser, call)
    return seen
