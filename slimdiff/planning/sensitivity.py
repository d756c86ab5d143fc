"""How much each site matters: the change of the noise prediction when it alone is slimmed, by passes through it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.calibration import distributed
from slimdiff.denoising.calls import evenly
from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.replay import Change
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Evidence, Site
from slimdiff.planning.changes import affordable, is_large, squared_changes
from slimdiff.settings import Forms, ResnetSettings
from slimdiff.slimming.slim import Factors, fit_groups
from slimdiff.statistics import Statistics

log = logging.getLogger("slimdiff")


PORTION = 2
"""Calls that are measured before it is asked whether more are needed."""
FITTED_ON = 16
"""Calls that groups at half rank are fitted on: each goes through the model several times, and a slope needs no best
fit."""
STABLE = 0.05
"""More calls are measured until plans by what is known come this close to the best ones by all that is known then."""

Sensitivities = Mapping[str, float]


@torch.no_grad()
def measure_sensitivities(
    denoiser: nn.Module,
    statistics: Statistics,
    sites: Sequence[Site],
    factors: Factors,
    calls: Sequence[Call],
    forms: Forms | None = None,
    *,
    fitting_calls: Sequence[Call] = (),
    resnet_settings: ResnetSettings | None = None,
    regret: Callable[[Sensitivities, Sensitivities], float] | None = None,
) -> dict[str, float]:
    """How much the noise prediction moves per unit of a site's local error: one site at half rank at a time.

    Calls are taken a few at a time, early and late ones in turn; of large models a sample of each (`affordable`), in
    which all sites are measured together (`squared_changes`). Fitted groups are fitted on `FITTED_ON` of their calls.

    Under `torchrun` or `accelerate launch`, the processes share the sites out: each must call this, with the same
    arguments, and each returns all of them.

    Args:
        regret: how much worse a plan by the first sensitivities is than by the second, by the second. Below `STABLE`
            no more calls are taken. If not given, all are.

    Returns:
        by site name: relative mean squared change of the noise prediction over the relative local error.

    Raises:
        InputError: if the dense model predicts nothing, or something that is not finite.
    """
    process, processes = distributed.world()
    own = sites[process::processes]
    halves = {site: _half(site) for site in own}
    few = affordable(denoiser, evenly(list(fitting_calls), FITTED_ON)) if fitting_calls else ()
    fitted = fit_groups(denoiser, factors, halves, few, resnet_settings)
    ordered = affordable(denoiser, in_turn(calls))
    large = is_large(denoiser, ordered)

    def weights(site: Site) -> Mapping[str, Tensor]:
        if site.name in fitted:
            return fitted[site.name]
        evidence = Evidence(denoiser.get_submodule(site.path), site, statistics, forms or Forms())
        return GROUPS[site.group].emulate(evidence, _half(site), factors[site.name])

    changed, energy = dict.fromkeys((site.name for site in sites), 0.0), 0.0
    known: dict[str, float] = {}
    for number in range(0, len(ordered), PORTION):
        portion = ordered[number : number + PORTION]
        parts = distributed.agree(partial(_measure, denoiser, own, weights, portion, number, large))
        energy += parts[0][1]  # the same in every process
        for changes, _ in parts:
            for name, value in changes.items():
                changed[name] += value
        before = known
        # A site that loses nothing at half rank locally says nothing of its slope; the floor keeps it finite.
        known = {
            site.name: changed[site.name] / energy / max(float(factors[site.name].tail[_half(site)]), 1e-9)
            for site in sites
        }
        if before and regret is not None and (worse := regret(before, known)) < STABLE:
            taken = number + len(portion)
            log.info(
                "sensitivities from %d of %d calls: the last %d change a plan's error by %.1f %%",
                taken,
                len(ordered),
                len(portion),
                100 * worse,
            )
            break
    return known


def in_turn(calls: Sequence[Call]) -> list[Call]:
    """Calls of a trajectory in an order whose every beginning is spread over all of it."""
    golden = (math.sqrt(5) - 1) / 2
    return [calls[i] for i in sorted(range(len(calls)), key=lambda i: i * golden % 1)]


def _half(site: Site) -> int:
    return max(site.multiple, site.dense_rank // 2 // site.multiple * site.multiple)


def _measure(
    denoiser: nn.Module,
    sites: Sequence[Site],
    weights: Callable[[Site], Mapping[str, Tensor]],
    calls: Sequence[Call],
    number: int,
    large: bool,
) -> tuple[dict[str, float], float]:
    """By site name, the squared change of the output over some calls; and the squared output itself.

    Args:
        number: of calls measured before these.
    """

    def at_half(site: Site) -> AbstractContextManager[None]:
        return exchanged(denoiser.get_submodule(site.path), weights(site))

    def expected(seconds: float) -> None:
        if not number and not energy:
            count = len(calls)
            log.info("sensitivities of %d sites: about %.0f s for every %d calls", len(sites), count * seconds, count)

    energy, changed = 0.0, dict.fromkeys((site.name for site in sites), 0.0)
    changes = {site.name: Change(site.path, partial(at_half, site)) for site in sites}
    for index, call in enumerate(calls, number):  # one at a time, for what it left is held in memory
        how: Any = {"name": "sensitivity", "large": large, "number": index, "expected": expected}
        own, squared = squared_changes(denoiser, call, changes, **how)
        if not math.isfinite(squared):
            raise InputError("the dense model's noise prediction is not finite: the model overflows; use it in float32")
        energy += squared
        for name, value in own.items():
            changed[name] += value
    if not energy:
        raise InputError("the dense model's noise prediction is zero everywhere")
    return changed, energy
