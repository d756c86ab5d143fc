"""What changes inside a denoiser do to its output, each alone: the passes that sensitivities and int8's costs take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from slimdiff.denoising.projection import project_changes
from slimdiff.denoising.replay import Change, Replay
from slimdiff.denoising.samples import batch_size, one_branch, some_of
from slimdiff.denoising.trajectory import Call
from slimdiff.planning.costs import count_macs
from slimdiff.progress import bar

MOST_MACS = 1e11
"""Multiply-accumulates of a pass (`count_macs`), where samples can be taken out of a call. One sample of Stable
Diffusion 1.5 at 512 pixels makes more: of such a model changes are projected."""
DRAWS = 8
"""Projections of a call of a large model."""


def affordable(denoiser: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """The calls, each of as many samples as `MOST_MACS` allow and one at least; both branches of guidance take turns.

    More calls say more than more samples of each, and a pass through a large model takes seconds. Choose the calls
    before: of every second one of these, all may be of one branch. A call whose samples cannot be told apart is taken
    whole.
    """
    batches = [batch_size(call) or 1 for call in calls]
    largest = max(batches, default=1)
    if largest == 1:
        return list(calls)
    of_one = count_macs(denoiser, calls[batches.index(largest)]) / largest
    taken = max(1, int(MOST_MACS / max(of_one, 1)))
    return [
        call if batch <= taken else some_of(call, one_branch(batch, taken, number))
        for number, (call, batch) in enumerate(zip(calls, batches, strict=True))
    ]


def is_large(denoiser: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether one sample of the first call makes more than `MOST_MACS`: then its changes are projected."""
    return bool(calls) and count_macs(denoiser, calls[0]) > MOST_MACS * (batch_size(calls[0]) or 1)


@torch.no_grad()
def squared_changes(
    denoiser: nn.Module,
    call: Call,
    changes: Mapping[str, Change],
    *,
    name: str,
    large: bool,
    number: int,
    expected: Callable[[float], None],
) -> tuple[dict[str, float], float]:
    """By change, the squared change of the denoiser's output that it makes alone; and the squared output itself.

    A pass for each change computes what lies behind its module (`Replay`). Of a large model they are estimated, all by
    the same passes (`project_changes`): to first order, with a relative standard deviation of a half for one sample
    and `DRAWS` projections.

    Args:
        name: of the progress bar.
        number: of the call, for projections of its own.
        expected: is told how many seconds it takes, when that is known.
    """
    if large:
        found, output = project_changes(denoiser, call, changes, DRAWS, number, expected, name)
        return found, float(output.double().square().sum())
    paths = [change.path for change in changes.values()]
    replay = Replay(denoiser, call, paths)
    expected(replay.seconds * sum(map(replay.share, paths)))
    found = {}
    for key, change in bar(changes.items(), name, "pass"):
        with change.made():
            found[key] = float((replay.predict(change.path) - replay.output).double().square().sum())
    return found, float(replay.output.double().square().sum())
