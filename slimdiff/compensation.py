"""Sequential error compensation: the last linear of each layer, solved again for the slim model's own inputs.

Local forms take what a layer receives in the dense model for granted; in the slim one, the layers before it have
changed that already. So in execution order, each last linear is solved by least squares so that the layer gives out
what the dense layer gives out, `W' = (H'^T H' + lambda I)^-1 (H'^T Y + lambda W)`, and the next sees the mended model
(method: MoDeGPT's and SlimGPT's sequential pruning; the ridge towards the weights that were there is ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.plan import Plan
from slimdiff.sites import attention_linears, feed_forward_linears
from slimdiff.trajectory import Call

# Towards the weights that were there, as a share of the mean diagonal of H'^T H': few calls must not be overfitted.
RIDGE = 1e-3


class _Reached(Exception):
    """The layer that is watched has run: the rest of the forward pass is of no interest."""


@dataclass
class _Seen:
    received: Tensor
    given: Tensor


@torch.no_grad()
def compensate(
    dense: nn.Module, slim: nn.Module, plan: Plan, calls: Sequence[Call], progress: str | None = "compensate"
) -> None:
    """Mend a slim model's attention and feed-forward layers in place, one by one in the order in which they run.

    Args:
        slim: made from `dense` by `plan`; its last linears' weights are replaced.
        calls: recorded denoiser calls, with many more tokens in them than a layer has inner dimensions.
    """
    cut = {s.path for s in plan.sites.values() if s.rank < s.dense_rank and s.group != "resnet"}
    with tqdm([p for p in _order(slim, sorted(cut), calls[0])], desc=progress, disable=progress is None) as bar:
        for path in bar:
            linear = _last_linear(slim.get_submodule(path))
            gram: Tensor | float = 0.0
            cross: Tensor | float = 0.0
            for call in calls:
                wanted = _watch(dense, path, call).given
                seen = _watch(slim, path, call)
                received, wanted = seen.received.flatten(0, -2).double(), wanted.flatten(0, -2).double()
                if linear.bias is not None:
                    wanted = wanted - linear.bias.double()
                gram = gram + received.T @ received
                cross = cross + received.T @ wanted
            assert isinstance(gram, Tensor)
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            solved = torch.linalg.solve(gram + ridge, cross + ridge @ linear.weight.double().T)
            linear.weight.data = solved.T.to(linear.weight)


def _last_linear(layer: Any) -> nn.Linear:
    return attention_linears(layer)[3] if hasattr(layer, "to_q") else feed_forward_linears(layer)[1]


def _order(denoiser: nn.Module, paths: Sequence[str], call: Call) -> list[str]:
    """The layers in the order in which they run."""
    ran: list[str] = []
    handles = [
        denoiser.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path)) for path in paths
    ]
    try:
        _run(denoiser, call)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(ran))


def _watch(denoiser: nn.Module, path: str, call: Call) -> _Seen:
    """What a layer's last linear receives and gives in one call, which ends there."""
    seen: list[_Seen] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(_Seen(args[0].detach(), output.detach()))
        raise _Reached

    handle = _last_linear(denoiser.get_submodule(path)).register_forward_hook(hook)
    try:
        with suppress(_Reached):
            _run(denoiser, call)
    finally:
        handle.remove()
    return seen[0]


def _run(denoiser: nn.Module, call: Call) -> None:
    parameter = next(denoiser.parameters())
    denoiser(**call.to(parameter.device, parameter.dtype), return_dict=False)
