"""Sensitivities measured again at the ranks that a plan chose, and the plan made again by them.

One site slim alone says nothing of what the others' errors do to its own. So a site is measured twice at the plan's
rank: slim alone, and as the only one that is dense again in the slim model. With the model's error
`E = sum_i e_i + sum_i<j c_ij`, the first gives `e_i`, the second `e_i + sum_j c_ij`; their mean is the site's share,
and the shares add up to E (the Shapley value of a game of pairs). A site that the plan leaves dense is measured at half
rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimdiff.denoising.replay import Replay
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Evidence, Site
from slimdiff.planning.changes import affordable
from slimdiff.planning.sensitivity import _half, exchanged, in_turn
from slimdiff.progress import bar
from slimdiff.slimming.slim import fit_groups

if TYPE_CHECKING:
    from slimdiff.planning.planner import Planner

log = logging.getLogger("slimdiff")

MOST_CALLS = 4
"""Calls that sites are measured on: as many as plans are usually stable with (`sensitivity.STABLE`)."""

Picks = list[int]
Sensitivities = Mapping[str, float]


def iterate(
    planner: Planner, picks: Picks, choose_again: Callable[[Sensitivities], Picks]
) -> tuple[Picks, Sensitivities]:
    """As many plans more as the settings say, or until the ranks stay; of all their plans the one with the least error.

    Args:
        picks: index of each layer's candidate, by the planner's sensitivities; choose_again: the same by others.

    Returns:
        the picks, and sensitivities whose predicted errors add up to what the slim model was measured to err, before
        its errors are compensated, on calls that it was not fitted on where there are any.
    """
    held = planner.calls.held if planner.calls.gives("held") else planner.calls.sensitivity
    calls = affordable(planner.denoiser, in_turn(held))
    best: tuple[float, Picks, Sensitivities] | None = None
    for number in range(planner.settings.replans + 1):
        ranks = {
            site: layer.candidates[pick]
            for layer, pick in zip(planner.layers, picks, strict=True)
            for site in layer.sites
        }
        error, known = measure_at(planner, ranks, calls)
        log.info("plan %d: its slim model errs %.3g on %d calls", number, error, len(calls))
        if best is None or error < best[0]:
            best = error, picks, known
        picks, before = choose_again(known), picks
        if picks == before or error > best[0]:
            break
    assert best is not None
    return best[1:]


@torch.no_grad()
def measure_at(planner: Planner, ranks: Mapping[Site, int], calls: Sequence[Call]) -> tuple[float, dict[str, float]]:
    """The relative error of the slim model of these ranks, and by site name its share of that over its local error.

    Sites share the error out by what they do in the first `MOST_CALLS` calls.
    """
    at = {site: rank if rank < site.dense_rank else _half(site) for site, rank in ranks.items()}
    weights = _weights(planner, at)
    slim = {site: weights[site] for site, rank in ranks.items() if rank < site.dense_rank}
    alone, left = dict.fromkeys(ranks, 0.0), dict.fromkeys(ranks, 0.0)
    total = energy = 0.0
    denoiser = planner.denoiser
    paths = [site.path for site in ranks]
    few = calls[:MOST_CALLS]
    own = {site: _own(denoiser, site, weights[site]) for site in ranks}
    with bar(name="replan", unit="pass", total=2 * len(few) * len(ranks)) as done:
        for call in few:
            replay = Replay(denoiser, call, paths)
            dense = replay.output

            def error_of(replay: Replay, site: Site, values: Mapping[str, Tensor], dense: Tensor = dense) -> float:
                with exchanged(denoiser.get_submodule(site.path), values):
                    error = _squared(replay.predict(site.path) - dense)
                done.update()
                return error

            for site in ranks:
                alone[site] += error_of(replay, site, weights[site])
            with _exchanged(denoiser, slim):
                replay = Replay(denoiser, call, paths)
                error = _squared(replay.output - dense)
                for site in ranks:
                    toggled = error_of(replay, site, own[site] if site in slim else weights[site])
                    left[site] += error - toggled if site in slim else toggled - error
    for call in calls:
        dense = predict(denoiser, call)
        energy += _squared(dense)
        with _exchanged(denoiser, slim):
            total += _squared(predict(denoiser, call) - dense)
    # In other calls, and where errors make up for each other, the sum is another: it is the whole error that counts.
    shares = {site: max((alone[site] + left[site]) / 2, 0.05 * alone[site]) for site in ranks}
    scale = total / energy / (sum(shares[site] for site in slim) or 1.0)
    local = {site: max(float(planner.factors[site.name].tail[at[site]]), 1e-9) for site in ranks}
    return total / energy, {site.name: scale * shares[site] / local[site] for site in ranks}


@contextmanager
def _exchanged(denoiser: nn.Module, weights: Mapping[Site, Mapping[str, Tensor]]) -> Iterator[None]:
    """The denoiser with other weights at these sites for the length of a block."""
    with ExitStack() as stack:
        for site, own in weights.items():
            stack.enter_context(exchanged(denoiser.get_submodule(site.path), own))
        yield


def _weights(planner: Planner, ranks: Mapping[Site, int]) -> dict[Site, Mapping[str, Tensor]]:
    """By site, weights with which the dense module computes what it would with this site at its rank."""
    fitting = any(GROUPS[site.group].fitted for site in ranks)
    calls = planner.calls.fitting if fitting else ()
    fitted = fit_groups(planner.denoiser, planner.factors, ranks, calls, planner.settings.resnets)
    found: dict[Site, Mapping[str, Tensor]] = {}
    for site, rank in ranks.items():
        module = planner.denoiser.get_submodule(site.path)
        evidence = Evidence(module, site, planner.statistics, planner.settings.forms)
        own = fitted.get(site.name)
        weights = GROUPS[site.group].emulate(evidence, rank, planner.factors[site.name]) if own is None else own
        found[site] = {name: tensor.to(module.get_parameter(name)) for name, tensor in weights.items()}
    return found


def _own(denoiser: nn.Module, site: Site, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense weights of these names."""
    module = denoiser.get_submodule(site.path)
    return {name: module.get_parameter(name).data for name in weights}


def _squared(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
