"""Sequential error compensation: the last linear of each layer, solved again for the slim model's own inputs.

Local forms take what a layer receives in the dense model for granted; in the slim one, the layers before it have
changed that already. So in execution order, each last linear is solved by least squares so that the layer gives out
what the dense layer gives out, `W' = (H'^T H' + lambda I)^-1 (H'^T Y + lambda W)`, and what follows sees the mended
model (method: MoDeGPT's and SlimGPT's sequential pruning; the ridge towards the weights that were there is ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.errors import InputError
from slimdiff.plan import Plan
from slimdiff.sites import attention_linears, feed_forward_linears
from slimdiff.trajectory import Call, predict

# Towards the weights that were there, as a share of the mean diagonal of H'^T H': few calls must not be overfitted.
RIDGE = 1e-2


class _Reached(Exception):
    """The last layer that is watched has run: the rest of the forward pass is of no interest."""


@dataclass
class _Sums:
    """Over tokens: `received` H'^T H' `[n, n]`, `wanted` H'^T Y `[n, out]`, Y without the bias."""

    received: Tensor
    wanted: Tensor


@torch.no_grad()
def compensate(
    dense: nn.Module, slim: nn.Module, plan: Plan, calls: Sequence[Call], progress: str | None = "compensate"
) -> None:
    """Mend a slim model in place, one transformer block after the other, in the order in which they run.

    Args:
        slim: made from `dense` by `plan`; its last linears' weights are replaced.
        calls: recorded denoiser calls, with many more tokens in them than a layer has inner dimensions.

    Raises:
        InputError: if there is no call.
    """
    if not calls:
        raise InputError("errors are compensated on recorded denoiser calls: give some (slimdiff.trajectory)")
    cut = {site.path for site in plan.sites.values() if site.group != "resnet" and site.rank < site.dense_rank}
    blocks = [list(paths) for _, paths in groupby(_order(slim, cut, calls[0]), lambda path: path.rpartition(".")[0])]
    with tqdm(total=len(blocks) * len(calls), desc=progress, disable=progress is None, unit="call") as bar:
        for paths in blocks:
            sums: dict[str, _Sums] = {}
            for call in calls:
                given = _watch(dense, paths, call)
                for path, (received, _) in _watch(slim, paths, call).items():
                    _add(sums, path, received, given[path][1], _last_linear(slim, path))
                bar.update()
            for path in paths:
                _solve(_last_linear(slim, path), sums[path])


def _add(sums: dict[str, _Sums], path: str, received: Tensor, wanted: Tensor, linear: nn.Linear) -> None:
    h, y = received.flatten(0, -2).float(), wanted.flatten(0, -2).float()
    if linear.bias is not None:
        y = y - linear.bias.float()
    if path not in sums:
        sums[path] = _Sums(h.new_zeros(h.shape[1], h.shape[1]), h.new_zeros(h.shape[1], y.shape[1]))
    sums[path].received.addmm_(h.T, h)
    sums[path].wanted.addmm_(h.T, y)


def _solve(linear: nn.Linear, sums: _Sums) -> None:
    gram, cross = sums.received.double(), sums.wanted.double()
    ridge = RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    solved = torch.linalg.solve(gram, cross + ridge * linear.weight.double().T)
    linear.weight.data = solved.T.to(linear.weight)


def _last_linear(denoiser: nn.Module, path: str) -> nn.Linear:
    layer: Any = denoiser.get_submodule(path)
    return attention_linears(layer)[3] if hasattr(layer, "to_q") else feed_forward_linears(layer)[1]


def _order(denoiser: nn.Module, paths: set[str], call: Call) -> list[str]:
    """The layers in the order in which they run."""
    return list(_watch(denoiser, sorted(paths), call))


def _watch(denoiser: nn.Module, paths: Sequence[str], call: Call) -> Mapping[str, tuple[Tensor, Tensor]]:
    """What the layers' last linears receive and give in one call, in the order in which they run."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[path] = (args[0], output)
        if len(seen) == len(paths):
            raise _Reached

    with ExitStack() as stack:
        for path in paths:
            stack.callback(_last_linear(denoiser, path).register_forward_hook(partial(hook, path)).remove)
        with suppress(_Reached):
            predict(denoiser, call)
    return seen
