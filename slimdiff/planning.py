"""Choosing one rank per site under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.calibration import Statistics
from slimdiff.costs import count_parameters
from slimdiff.errors import InputError
from slimdiff.plan import Budget, Plan, site_plan
from slimdiff.sites import GROUPS, Group, Site, find_sites
from slimdiff.slimming import Factors, check_statistics, emulated_weight, factorise
from slimdiff.trajectory import Call, predict

# A plan may remove this much more than the budget says, never less.
TOLERANCE = 0.004
# Candidate ranks per site are thinned to this many: the knapsack stays small, and neighbours differ by under 2 %.
MOST_CANDIDATES = 64


class PlanSettings(BaseModel):
    """How ranks are chosen."""

    model_config = ConfigDict(extra="forbid")

    allocation: Literal["global", "uniform"] = "global"
    """`global`: the knapsack on measured sensitivities; `uniform`: the same share of every site."""
    align: int = Field(8, ge=1)
    """Ranks are multiples of this: per head for attention, channels for feed_forward."""
    groups: tuple[Group, ...] = GROUPS
    """Which groups may be slimmed; query_key and value_output go together."""
    sensitivity_calls: int = Field(16, ge=1)
    """Recorded denoiser calls on which sensitivities are measured."""


@dataclass
class _Layer:
    """Sites of one module, which share one rank, with the ranks it may take."""

    sites: list[Site]
    candidates: list[int]

    @property
    def cost(self) -> int:
        return sum(s.cost for s in self.sites)

    @property
    def dense_rank(self) -> int:
        return self.sites[0].dense_rank


def make_plan(
    denoiser: nn.Module,
    statistics: Statistics,
    budget: Budget,
    settings: PlanSettings | None = None,
    *,
    calls: Sequence[Call] = (),
    factors: Factors | None = None,
    progress: str | None = "plan",
) -> Plan:
    """Choose ranks so that the budget is met with the least predicted error.

    Each site's error is its local error curve times a sensitivity measured by forward passes alone; the choice is a
    multiple-choice knapsack, solved exactly (scipy's `milp`).

    Args:
        calls: recorded denoiser calls (`record_calls`), needed by the global allocation.
        factors: from `factorise` on all sites, if they are there already.

    Raises:
        InputError: if the budget cannot be met by the sites there are, or something does not fit together.
    """
    settings = settings or PlanSettings()
    check_statistics(denoiser, statistics)
    if ("query_key" in settings.groups) != ("value_output" in settings.groups):
        raise InputError("groups: query_key and value_output share one rank per layer: name both or neither")
    sites, left_dense = find_sites(denoiser)
    chosen = [s for s in sites if s.group in settings.groups]
    total = count_parameters(denoiser)
    removed = budget.removed(total)
    layers = _layers(chosen, settings.align)
    most = sum((layer.dense_rank - layer.candidates[0]) * layer.cost for layer in layers)
    if removed > most:
        raise InputError(
            f"budget {budget.parameters!r} is {removed:,} parameters, but at most {most:,} ({most / total:.1%}) "
            f"can go from the {len(chosen)} sites in {', '.join(settings.groups)}"
        )
    factors = factors or factorise(denoiser, statistics, chosen, progress and f"{progress}: factorise")
    sensitivities: dict[str, float] = {}
    if settings.allocation == "global":
        if not calls:
            raise InputError("the global allocation measures sensitivities: give it recorded denoiser calls")
        sensitivities = measure_sensitivities(
            denoiser, statistics, chosen, factors, calls, progress and f"{progress}: sensitivity"
        )
        errors = [_errors(layer, factors, sensitivities) for layer in layers]
    else:
        share = removed / sum(layer.dense_rank * layer.cost for layer in layers)
        errors = [
            np.array(
                [(1 - r / layer.dense_rank - share) ** 2 * layer.cost * layer.dense_rank for r in layer.candidates]
            )
            for layer in layers
        ]
    ranks = _knapsack(layers, errors, removed)
    plan = Plan(
        model_class=type(denoiser).__name__,
        model_hash=statistics.model_hash,
        allocation=settings.allocation,
        align=settings.align,
        parameters={"dense": total, "slim": total, "budget": total - removed},
        sites={},
        left_dense=left_dense,
        calibration=statistics.made_from,
    )
    rank_of = {site.name: rank for layer, rank in zip(layers, ranks, strict=True) for site in layer.sites}
    for site in sites:
        rank = rank_of.get(site.name, site.dense_rank)
        if site.name not in rank_of:
            plan.sites[site.name] = site_plan(site, rank)
            continue
        local = float(factors[site.name].tail[rank])
        sensitivity = sensitivities.get(site.name)
        predicted = None if sensitivity is None else sensitivity * local
        plan.sites[site.name] = site_plan(
            site, rank, local_error=local, sensitivity=sensitivity, predicted_error=predicted
        )
    return plan.recount()


def _layers(sites: Sequence[Site], align: int) -> list[_Layer]:
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    layers = []
    for members in by_path.values():
        dense = members[0].dense_rank
        ranks = list(range(align, dense, align)) or []
        if len(ranks) > MOST_CANDIDATES:
            picks = np.unique(np.linspace(0, len(ranks) - 1, MOST_CANDIDATES).round().astype(int))
            ranks = [ranks[i] for i in picks]
        layers.append(_Layer(members, [*ranks, dense]))
    return layers


def _errors(layer: _Layer, factors: Factors, sensitivities: dict[str, float]) -> np.ndarray:
    curves = [sensitivities[s.name] * factors[s.name].tail[layer.candidates].numpy() for s in layer.sites]
    return np.sum(curves, axis=0)


def _knapsack(layers: Sequence[_Layer], errors: Sequence[np.ndarray], removed: int) -> list[int]:
    """One candidate per layer, least total error, at least `removed` and at most 0.4 % more parameters gone."""
    owner = np.concatenate([np.full(len(layer.candidates), i) for i, layer in enumerate(layers)])
    saving = np.concatenate(
        [[(layer.dense_rank - r) * layer.cost for r in layer.candidates] for layer in layers]
    ).astype(float)
    error = np.concatenate(list(errors))
    one_each = lil_array((len(layers), len(owner)))
    one_each[owner, np.arange(len(owner))] = 1
    choose = LinearConstraint(one_each.tocsr(), 1, 1)
    # Scaled to about one, or the solver's absolute tolerances would decide.
    error = error / max(error.max(), 1e-300)
    for limit in (1 + TOLERANCE, np.inf):
        amount = LinearConstraint((saving / removed)[None, :], 1, limit)
        # Without a window that any combination of ranks fits, come as close to the budget as the ranks allow.
        objective = error if np.isfinite(limit) else saving / removed + 1e-3 * error
        found = milp(objective, constraints=[choose, amount], integrality=np.ones(len(owner)), bounds=Bounds(0, 1))
        if found.x is not None:
            picked = np.flatnonzero(found.x > 0.5)
            return [layers[owner[i]].candidates[i - int(np.searchsorted(owner, owner[i]))] for i in picked]
    raise InputError(f"no choice of ranks removes {removed:,} parameters")


@torch.no_grad()
def measure_sensitivities(
    denoiser: nn.Module,
    statistics: Statistics,
    sites: Sequence[Site],
    factors: Factors,
    calls: Sequence[Call],
    progress: str | None = None,
) -> dict[str, float]:
    """How much the noise prediction moves per unit of a site's local error: one site at half rank at a time.

    Returns:
        by site name: relative mean squared change of the noise prediction over the relative local error.
    """
    modules = dict(denoiser.named_modules())
    reference = [predict(denoiser, call) for call in calls]
    energy = sum(float(r.double().square().sum()) for r in reference)
    result = {}
    for site in tqdm(sites, desc=progress, disable=progress is None, unit="site"):
        rank = max(1, site.dense_rank // 2)
        name, weight, bias = emulated_weight(modules[site.path], site, rank, factors[site.name], statistics)
        with exchanged(modules[site.path].get_submodule(name), weight, bias):
            changed = sum(
                float((predict(denoiser, call) - r).double().square().sum())
                for call, r in zip(calls, reference, strict=True)
            )
        # A site that loses nothing at half rank locally tells nothing about its slope; the floor keeps it finite.
        result[site.name] = (changed / energy) / max(float(factors[site.name].tail[rank]), 1e-9)
    return result


@contextmanager
def exchanged(linear: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Iterator[None]:
    """A linear layer with another weight (and bias) of the same shape, for the length of a block."""
    before = {name: p.data for name, p in linear.named_parameters()}
    try:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                linear.get_parameter(name).data = tensor.to(before[name])
        yield
    finally:
        for name, data in before.items():
            linear.get_parameter(name).data = data
