"""Choosing one rank per site under a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import Bounds, LinearConstraint, brentq, milp
from scipy.sparse import lil_array
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.budget import Budget
from slimdiff.closed_forms import Forms
from slimdiff.costs import CostTable, mac_costs, parameter_costs
from slimdiff.errors import InputError
from slimdiff.influence import block_influences
from slimdiff.plan import Plan, site_plan
from slimdiff.resnets import ResnetSettings, exchanged_resnet
from slimdiff.search import smallest_within
from slimdiff.sites import GROUPS, Group, Site, find_sites
from slimdiff.slimming import Factors, check_statistics, emulated_weights, factorise, fit_resnets, slim_denoiser
from slimdiff.statistics import Statistics
from slimdiff.trajectory import Call, predict

log = logging.getLogger("slimdiff")

# A plan may remove this much more than the budget says, never less.
TOLERANCE = 0.004
# Candidate ranks per site are thinned to this many: the knapsack stays small, and neighbours differ by under 2 %.
MOST_CANDIDATES = 64
# What allocations measure by forward passes, and therefore need recorded calls for.
MEASURED = {"global": "sensitivities", "softmax": "how much each block changes its input"}
# Seconds that the solver may take for one choice; what it has by then is within a gap that is told.
SOLVE_SECONDS = 60.0
# Plans whose predicted errors differ by less than this are ties: the error is an estimate, and far from that exact.
SLACK = 0.005


Allocation = Literal["global", "local", "uniform", "softmax"]


class PlanSettings(BaseModel):
    """How ranks are chosen."""

    model_config = ConfigDict(extra="forbid")

    allocation: Allocation = "global"
    """`global`: the knapsack on local errors times measured sensitivities; `local`: on local errors alone; `uniform`:
    the same share of every site; `softmax`: shares by block influence (the papers)."""
    forms: Forms = Forms()
    """The closed forms that slim each group."""
    softmax_temperature: float = Field(0.1, gt=0)
    """Of the softmax allocation: the lower, the more the least influential blocks lose."""
    align: int = Field(8, ge=1)
    """Ranks are multiples of this: per head for attention, channels for feed_forward and resnet."""
    groups: tuple[Group, ...] = GROUPS
    """Which groups may be slimmed; query_key and value_output go together. `resnet` must be named to be slimmed."""
    sensitivity_calls: int = Field(16, ge=1)
    """Recorded denoiser calls on which sensitivities are measured."""
    resnets: ResnetSettings = ResnetSettings()
    """How slim resnets are fitted."""


@dataclass
class Layer:
    """Sites of one module, which share one rank, with the ranks it may take (rising; the last is the dense one)."""

    sites: list[Site]
    candidates: list[int]

    @property
    def path(self) -> str:
        return self.sites[0].path

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
    held: Sequence[Call] = (),
    resnet_calls: Sequence[Call] = (),
    latency: CostTable | None = None,
    factors: Factors | None = None,
    progress: str | None = "plan",
) -> Plan:
    """Choose ranks so that the budget is met with the least predicted error.

    Each site's error is its local error curve times a sensitivity measured by forward passes alone; the choice is a
    multiple-choice knapsack, solved exactly (scipy's `milp`).

    Args:
        calls: recorded denoiser calls (`record_calls`), needed by the global allocation and by a budget of MACs where
            the statistics do not hold what was measured on them (`Planner.remember`).
        held: recorded calls that neither calibration nor `calls` saw, on which `max_error` is measured.
        resnet_calls: recorded calls that slim resnets are fitted on, to see what they do and for `max_error`.
        latency: measured milliseconds by layer and rank, needed by a speedup.
        factors: from `factorise` on all sites, if they are there already.

    Raises:
        InputError: if the budget cannot be met by the sites there are, or something does not fit together.
    """
    planner = Planner(
        denoiser,
        statistics,
        settings,
        calls=calls,
        held=held,
        resnet_calls=resnet_calls,
        latency=latency,
        factors=factors,
        progress=progress,
    )
    return planner.plan(budget)


class Planner:
    """Plans of one model: what they have in common is computed once, when first needed, for any number of budgets.

    Arguments are those of `make_plan`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        statistics: Statistics,
        settings: PlanSettings | None = None,
        *,
        calls: Sequence[Call] = (),
        held: Sequence[Call] = (),
        resnet_calls: Sequence[Call] = (),
        latency: CostTable | None = None,
        factors: Factors | None = None,
        progress: str | None = "plan",
    ) -> None:
        self.denoiser = denoiser
        self.statistics = statistics
        self.settings = settings or PlanSettings()
        self.calls = calls
        self.held = held
        self.resnet_calls = resnet_calls
        self.latency = latency
        self.progress = progress
        check_statistics(denoiser, statistics)
        self.sites, left_dense = find_sites(denoiser)
        silent = {s.path: None for s in self.sites if not statistics.covers(s.name, s.group)}
        self.left_dense = left_dense + [{"site": path, "reason": "it never ran in calibration"} for path in silent]
        self.chosen = chosen_sites([s for s in self.sites if s.path not in silent], self.settings)
        name = self.settings.allocation
        if not calls and name in MEASURED and not is_measured(statistics, self.chosen, self.settings):
            raise InputError(f"the {name} allocation measures {MEASURED[name]}: give it recorded denoiser calls")
        self.layers = find_layers(self.chosen, self.settings.align)
        if factors is not None:
            self.factors = factors

    @cached_property
    def factors(self) -> Factors:
        """Every chosen site's basis or order."""
        told = self.told("factorise")
        return factorise(self.denoiser, self.statistics, self.chosen, told, self.settings.forms)

    @cached_property
    def sensitivities(self) -> dict[str, float]:
        """By site name; empty for the allocations that do not ask."""
        if self.settings.allocation != "global":
            return {}
        if is_measured(self.statistics, self.chosen, self.settings):
            return {site.name: self.statistics.sensitivities[site.name] for site in self.chosen}
        return measure_sensitivities(
            self.denoiser,
            self.statistics,
            self.chosen,
            self.factors,
            self.calls,
            self.told("sensitivity"),
            self.settings.forms,
            resnet_calls=self.resnet_calls,
            resnet_settings=self.settings.resnets,
        )

    @cached_property
    def weights(self) -> list[float]:
        """By layer, the share of it that goes in relation to other layers', where shares are not chosen by error."""
        if self.settings.allocation == "uniform":
            return [1.0] * len(self.layers)
        influences = block_influences(self.denoiser, [layer.path for layer in self.layers], self.calls)
        return softmax_weights(influences, self.settings.softmax_temperature)

    @cached_property
    def parameters(self) -> CostTable:
        return parameter_costs(self.denoiser, self.chosen)

    @cached_property
    def macs(self) -> CostTable | None:
        """None without recorded calls: how many tokens there are shows in a call alone."""
        known = self.statistics.macs
        if "" in known and all(layer.path in known for layer in self.layers):
            ranks = {layer.path: {0: 0.0, layer.dense_rank: known[layer.path]} for layer in self.layers}
            return CostTable("macs", known[""], ranks)
        return mac_costs(self.denoiser, self.chosen, self.calls[0]) if self.calls else None

    def remember(self, statistics: Statistics) -> None:
        """Keep with statistics what was measured by forward passes: planning from them then needs no recorded calls."""
        if self.settings.forms == Forms():  # others' local errors are others: their slopes are not kept
            statistics.sensitivities = statistics.sensitivities | self.sensitivities
        if self.macs is not None:
            layers = {path: costs[max(costs)] for path, costs in self.macs.layers.items()}
            statistics.macs = statistics.macs | {"": self.macs.dense, **layers}

    def table(self, budget: Budget) -> CostTable:
        """What the budget is counted in.

        Raises:
            InputError: if that was not given.
        """
        if budget.kind == "speedup":
            if self.latency is None:
                raise InputError("a speedup is planned on a measured table of latencies: give one")
            missing = [layer.path for layer in self.layers if layer.path not in self.latency.layers]
            if missing:
                raise InputError(f"the table of latencies does not know {missing[0]}: measure it for this model")
            return self.latency
        if budget.kind == "macs":
            if self.macs is None:
                raise InputError("a budget of MACs needs a recorded denoiser call: it shows how many tokens there are")
            return self.macs
        return self.parameters

    def most(self, table: CostTable) -> float:
        """The most that can go, in the table's unit."""
        return sum(float(table.savings(layer.path, layer.candidates[:1])[0]) for layer in self.layers)

    def plan(self, budget: Budget) -> Plan:
        """See `make_plan`."""
        if budget.kind == "max_error":
            return smallest_within(self, budget, self.held)
        table = self.table(budget)
        removed = budget.removed(table.dense)
        most = self.most(table)
        if removed > most:
            raise InputError(
                f"budget {_words(budget)} is {_amount(table, removed)}, but at most {_amount(table, most)} "
                f"({most / table.dense:.1%}) can go from the {len(self.chosen)} sites in "
                f"{', '.join(self.settings.groups)}"
            )
        return self.written(self.ranks(table, removed), budget, {table.name: table.dense - removed})

    def ranks(self, table: CostTable, removed: float) -> dict[str, int]:
        """Rank by module path, so that `removed` goes, in the table's unit, with the least predicted error."""
        savings = [table.savings(layer.path, layer.candidates) for layer in self.layers]
        if self.settings.allocation in ("uniform", "softmax"):
            picks = choose(savings, _distances(self.layers, savings, self.weights, removed), removed)
        else:
            also = None
            if table.name == "parameters" and self.macs is not None:
                also = [self.macs.savings(layer.path, layer.candidates) for layer in self.layers]
            picks = choose(savings, [self._errors(layer) for layer in self.layers], removed, also)
        return {layer.path: layer.candidates[pick] for layer, pick in zip(self.layers, picks, strict=True)}

    def _errors(self, layer: Layer) -> np.ndarray:
        slopes = [self.sensitivities.get(s.name, 1.0) for s in layer.sites]
        curves = [self.factors[s.name].tail[layer.candidates].numpy() for s in layer.sites]
        return np.sum([slope * curve for slope, curve in zip(slopes, curves, strict=True)], axis=0)

    def written(self, ranks: dict[str, int], budget: Budget, bounds: Mapping[str, float]) -> Plan:
        """The plan of these ranks (by module path); layers not named are dense.

        Args:
            budget: what was asked for.
            bounds: cost name -> what the slim model may cost.
        """
        sites = {}
        for site in self.sites:
            if site.path not in ranks:
                sites[site.name] = site_plan(site, site.dense_rank)
                continue
            rank = ranks[site.path]
            local = float(self.factors[site.name].tail[rank])
            sensitivity = self.sensitivities.get(site.name)
            predicted = None if sensitivity is None else sensitivity * local
            sites[site.name] = site_plan(
                site, rank, local_error=local, sensitivity=sensitivity, predicted_error=predicted
            )
        parameters = {"dense": round(self.parameters.dense), "slim": round(self.parameters.of(ranks))}
        if "parameters" in bounds:
            parameters["budget"] = round(bounds["parameters"])
        costs: dict[str, dict[str, float]] = {}
        for table in (self.macs, self.latency):
            if table is not None:
                costs[table.name] = {"dense": table.dense, "slim": table.of(ranks)}
                if table.name in bounds:
                    costs[table.name]["budget"] = bounds[table.name]
        return Plan(
            model_class=type(self.denoiser).__name__,
            model_hash=self.statistics.model_hash,
            allocation=self.settings.allocation,
            forms=self.settings.forms,
            align=self.settings.align,
            parameters=parameters,
            budget={budget.kind: getattr(budget, budget.kind)},
            costs=costs,
            sites=sites,
            left_dense=self.left_dense,
            calibration=self.statistics.made_from,
        )

    def slim(self, plan: Plan) -> nn.Module:
        """The slim model of one of these plans."""
        return slim_denoiser(
            self.denoiser,
            self.statistics,
            plan,
            self.factors,
            progress=None,
            resnet_calls=self.resnet_calls,
            resnet_settings=self.settings.resnets,
        )

    def told(self, what: str) -> str | None:
        """A progress bar's name, or None for no bar."""
        return self.progress and f"{self.progress}: {what}"


def is_measured(statistics: Statistics, sites: Sequence[Site], settings: PlanSettings) -> bool:
    """Whether the statistics hold what the allocation measures: the sites' sensitivities, with the usual forms."""
    measured = all(site.name in statistics.sensitivities for site in sites)
    return settings.allocation == "global" and settings.forms == Forms() and measured


def chosen_sites(sites: Sequence[Site], settings: PlanSettings) -> list[Site]:
    """Those in the groups that may be slimmed.

    Raises:
        InputError: if the groups name only one of query_key and value_output, or the model has nothing in them.
    """
    if ("query_key" in settings.groups) != ("value_output" in settings.groups):
        raise InputError("groups: query_key and value_output share one rank per layer: name both or neither")
    chosen = [s for s in sites if s.group in settings.groups]
    if not chosen:
        others = ", ".join(sorted({s.group for s in sites})) or "no group"
        raise InputError(f"there is nothing to slim in {', '.join(settings.groups)}: this model has sites in {others}")
    return chosen


def find_layers(sites: Sequence[Site], align: int) -> list[Layer]:
    """Sites by module; candidate ranks are multiples of `align` and a norm's groups, thinned to `MOST_CANDIDATES`."""
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    layers = []
    for members in by_path.values():
        dense = members[0].dense_rank
        step = math.lcm(align, members[0].multiple)
        ranks = list(range(step, dense, step))
        if len(ranks) > MOST_CANDIDATES:
            picks = np.unique(np.linspace(0, len(ranks) - 1, MOST_CANDIDATES).round().astype(int))
            ranks = [ranks[i] for i in picks]
        layers.append(Layer(members, [*ranks, dense]))
    return layers


def softmax_weights(scores: Sequence[float], temperature: float) -> list[float]:
    """The papers' allocation: shares that go in proportion to `softmax(-score / temperature)`, of mean 1.

    Args:
        scores: per layer, how much it changes its input.
    """
    raised = np.exp(-(np.array(scores) - min(scores)) / temperature)
    return [float(w) for w in raised / raised.mean()]


def _distances(
    layers: Sequence[Layer], savings: Sequence[np.ndarray], weights: Sequence[float], removed: float
) -> list[np.ndarray]:
    """How far each candidate is from the share that should go from its layer, in proportion to the layer's weight.

    No layer loses more than its smallest candidate; what it cannot, the others do.
    """
    shares = [1 - np.array(layer.candidates) / layer.dense_rank for layer in layers]
    most = np.array([share[0] for share in shares])
    # What a layer would save if it went wholly, from what its smallest candidate saves.
    whole = np.array([s[0] / share[0] if share[0] > 0 else 0.0 for s, share in zip(savings, shares, strict=True)])

    def missing(scale: float) -> float:
        return float((np.minimum(scale * np.array(weights), most) * whole).sum()) - removed

    high = 1.0
    while missing(high) < 0 and high < 1e12:
        high *= 2
    scale = brentq(missing, 0, high) if missing(high) > 0 else high
    wanted = np.minimum(scale * np.array(weights), most)
    return [(share - want) ** 2 * weight for share, want, weight in zip(shares, wanted, whole, strict=True)]


def choose(
    savings: Sequence[np.ndarray],
    errors: Sequence[np.ndarray],
    removed: float,
    also: Sequence[np.ndarray] | None = None,
) -> list[int]:
    """One candidate per layer, least total error, at least `removed` and at most 0.4 % more saved: exactly.

    Args:
        savings: per layer, what each candidate saves, in any unit.
        errors: per layer, each candidate's error.
        removed: what must go, above 0.
        also: per layer, what else each candidate saves: as much as possible of that goes among the choices whose error
            is within `SLACK` of the least.

    Returns:
        the index of each layer's candidate.
    """
    owner = np.concatenate([np.full(len(s), i) for i, s in enumerate(savings)])
    starts = np.searchsorted(owner, np.arange(len(savings)))
    one_each = lil_array((len(savings), len(owner)))
    one_each[owner, np.arange(len(owner))] = 1
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    saving = np.concatenate(list(savings)) / removed
    error = np.concatenate(list(errors))

    def solve(objective: np.ndarray, allowed: np.ndarray, *more: LinearConstraint) -> np.ndarray | None:
        whole, most = np.ones(len(owner)), allowed.astype(float)
        found = milp(
            objective,
            constraints=[*constraints, *more],
            integrality=whole,
            bounds=Bounds(0, most),
            options={"time_limit": SOLVE_SECONDS},
        )
        if found.status == 1 and found.x is not None:
            log.warning("the choice of ranks was stopped after %g s, %.2g from the best", SOLVE_SECONDS, found.mip_gap)
        return None if found.x is None else np.flatnonzero(found.x > 0.5)

    window = LinearConstraint(saving[None, :], 1, 1 + TOLERANCE)
    # The solver stops within 1e-6 of the least, and errors span a dozen decades: so the unit is what the choice costs,
    # and what alone costs more than a known choice is left out, until the two are of one size.
    unit, allowed = max(float(error.max()), 1e-300), np.ones(len(owner), dtype=bool)
    picked = solve(error / unit, allowed, window)
    while picked is not None and 0 < (best := float(error[picked].sum())) < 1e-2 * unit:
        unit, allowed = best, error <= best
        better = solve(np.where(allowed, error, 0) / unit, allowed, window)
        if better is None or error[better].sum() > best:
            break
        picked = better
    if picked is None:
        # Without a window that any combination of ranks fits, come as close to the budget as the ranks allow.
        least = LinearConstraint(saving[None, :], 1, np.inf)
        picked = solve(saving + 1e-3 * error / unit, allowed, least)
    elif also is not None and (best := float(error[picked].sum())) > 0:
        other = np.concatenate(list(also))
        allowed = error <= (1 + SLACK) * best
        near = LinearConstraint(np.where(allowed, error, 0)[None, :] / best, -np.inf, 1 + SLACK)
        better = solve(-other / max(other.max(), 1e-300), allowed, window, near)
        picked = picked if better is None else better
    if picked is None:
        raise InputError(f"no choice of ranks removes {removed:,.6g}")
    return [int(index) for index in picked - starts]


def _words(budget: Budget) -> str:
    value = getattr(budget, budget.kind)
    return f"{value:g}x" if budget.kind == "speedup" else repr(value)


def _amount(table: CostTable, value: float) -> str:
    noun = {"parameters": "parameters", "macs": "MACs"}.get(table.name)
    return f"{value:,.0f} {noun}" if noun else f"{value:.3g} ms"


@torch.no_grad()
def measure_sensitivities(
    denoiser: nn.Module,
    statistics: Statistics,
    sites: Sequence[Site],
    factors: Factors,
    calls: Sequence[Call],
    progress: str | None = None,
    forms: Forms | None = None,
    *,
    resnet_calls: Sequence[Call] = (),
    resnet_settings: ResnetSettings | None = None,
) -> dict[str, float]:
    """How much the noise prediction moves per unit of a site's local error: one site at half rank at a time.

    Returns:
        by site name: relative mean squared change of the noise prediction over the relative local error.
    """
    modules = dict(denoiser.named_modules())
    reference = [predict(denoiser, call) for call in calls]
    energy = sum(float(r.double().square().sum()) for r in reference)
    halves = {site: max(site.multiple, site.dense_rank // 2 // site.multiple * site.multiple) for site in sites}
    fitted = fit_resnets(denoiser, factors, halves, resnet_calls, resnet_settings, progress)
    result = {}
    for site, rank in tqdm(halves.items(), desc=progress, disable=progress is None, unit="site"):
        module = modules[site.path]
        if site.name in fitted:
            slim = exchanged_resnet(module, fitted[site.name])
        else:
            slim = exchanged(module, emulated_weights(module, site, rank, factors[site.name], statistics, forms))
        with slim:
            changed = sum(
                float((predict(denoiser, call) - r).double().square().sum())
                for call, r in zip(calls, reference, strict=True)
            )
        # A site that loses nothing at half rank locally tells nothing about its slope; the floor keeps it finite.
        result[site.name] = (changed / energy) / max(float(factors[site.name].tail[rank]), 1e-9)
    return result


@contextmanager
def exchanged(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A module with other weights of the same shapes (by parameter name), for the length of a block."""
    before = {name: module.get_parameter(name).data for name in weights}
    try:
        for name, tensor in weights.items():
            module.get_parameter(name).data = tensor.to(before[name])
        yield
    finally:
        for name, data in before.items():
            module.get_parameter(name).data = data
