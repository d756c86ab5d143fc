"""Choosing one rank per site under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial

import numpy as np
from torch import nn

from slimdiff.denoising.calls import Calls
from slimdiff.denoising.modules import working_copy
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS, fault_in, find_sites
from slimdiff.groups.group import Site
from slimdiff.groups.maps import Maps
from slimdiff.plan import Plan, SitePlan, site_plan
from slimdiff.planning.budgets import Costs, PlannedBy
from slimdiff.planning.costs import CostTable
from slimdiff.planning.knapsack import Layer, choose, distances, find_layers, softmax_weights
from slimdiff.planning.papers import block_influences
from slimdiff.planning.replanning import iterate
from slimdiff.planning.search import smallest_within
from slimdiff.planning.sensitivity import measure_sensitivities
from slimdiff.settings import BUDGETS, Budget, BudgetKind, Forms, PlanSettings
from slimdiff.slimming.compensation import DenseOutputs, dense_rows
from slimdiff.slimming.slim import Factors, check_statistics, factorise, slim_denoiser
from slimdiff.statistics import Statistics

# What allocations measure by forward passes, and therefore need recorded calls for.
MEASURED = {"global": "sensitivities", "softmax": "how much each block changes its input"}

CUTS = (0.15, 0.4)
"""Shares of all that can go, at which plans are held against each other."""

PLANNED: dict[str, PlannedBy] = {
    "parameters": PlannedBy(lambda costs: costs.parameters),
    "macs": PlannedBy(
        lambda costs: costs.macs, "a budget of MACs needs a recorded denoiser call: it shows how many tokens there are"
    ),
    "speedup": PlannedBy(
        lambda costs: costs.latency, "a speedup is planned on a measured table of latencies: give one"
    ),
    "max_error": PlannedBy(search=smallest_within),
}
"""How each kind of budget is planned, by name."""


def register_budget(kind: BudgetKind, planned: PlannedBy) -> None:
    """Add a kind of budget: `Budget(<name>=...)` is then read by the one half and planned by the other.

    Raises:
        InputError: if there is one of this name.
    """
    if kind.name in BUDGETS:
        raise InputError(f"there is a budget {kind.name} already: name another")
    BUDGETS[kind.name], PLANNED[kind.name] = kind, planned


@own_torch_state()
def make_plan(
    denoiser: nn.Module,
    statistics: Statistics,
    budget: Budget,
    settings: PlanSettings | None = None,
    *,
    calls: Calls | Sequence[Call] = (),
    latency: CostTable | None = None,
) -> Plan:
    """Choose ranks so that the budget is met with the least predicted error.

    Each site's error is its local error curve times a sensitivity measured by forward passes alone; the choice is a
    multiple-choice knapsack, solved exactly (scipy's `milp`).

    Args:
        calls: recorded denoiser calls; a list of them is for sensitivities and MACs alone (`Calls.of`). Sensitivities
            and MACs that the statistics hold need none.
        latency: measured milliseconds by layer and rank, needed by a speedup.

    Raises:
        InputError: if the budget cannot be met by the sites there are, or something does not fit together.
    """
    return Planner(denoiser, statistics, settings, calls=calls, latency=latency).plan(budget)


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
        calls: Calls | Sequence[Call] = (),
        latency: CostTable | None = None,
    ) -> None:
        self.denoiser = denoiser = working_copy(denoiser)
        self.statistics = statistics
        self.settings = settings or PlanSettings()
        self.calls = calls if isinstance(calls, Calls) else Calls.of(calls)
        check_statistics(denoiser, statistics)
        self.sites, left_dense = find_sites(denoiser)
        silent = {s.path: None for s in self.sites if not GROUPS[s.group].covers(s, statistics)}
        self.left_dense = left_dense + [{"site": path, "reason": "it never ran in calibration"} for path in silent]
        self.chosen = chosen_sites([s for s in self.sites if s.path not in silent], self.settings)
        name = self.settings.allocation
        known = self.is_measured and not self.settings.replans
        if name in MEASURED and not known and not self.calls.gives("sensitivity"):
            raise InputError(f"the {name} allocation measures {MEASURED[name]}: give it recorded denoiser calls")
        self.layers = find_layers(self.chosen, self.settings.align)
        self.costs = Costs(denoiser, self.layers, statistics.macs, self._call, latency)

    def _call(self) -> Call | None:
        return self.calls.sensitivity[0] if self.calls.gives("sensitivity") else None

    @property
    def is_measured(self) -> bool:
        """Whether the statistics hold what the allocation measures: the sites' sensitivities, with the usual forms."""
        known = self.statistics.sensitivities
        return keeps_measured(self.settings) and all(site.name in known for site in self.chosen)

    @cached_property
    def factors(self) -> Factors:
        """Every chosen site's basis or order, computed now unless those of an earlier `factorise` were assigned."""
        return factorise(self.denoiser, self.statistics, self.chosen, self.settings.forms)

    @cached_property
    def sensitivities(self) -> dict[str, float]:
        """By site name; empty for the allocations that do not ask."""
        if self.settings.allocation != "global":
            return {}
        if self.is_measured:
            return {site.name: self.statistics.sensitivities[site.name] for site in self.chosen}
        return measure_sensitivities(
            self.denoiser,
            self.statistics,
            self.chosen,
            self.factors,
            self.calls.sensitivity,
            self.settings.forms,
            fitting_calls=self.calls.fitting if any(GROUPS[name].fitted for name in self.settings.groups) else (),
            resnet_settings=self.settings.resnets,
            regret=self._regret,
        )

    def _regret(self, known: Mapping[str, float], better: Mapping[str, float]) -> float:
        """How much more plans by sensitivities err than the best ones, by better sensitivities: the worst of `CUTS`.

        Shares of what the smallest ranks would remove are cut, in parameters.
        """
        savings = [self.costs.parameters.savings(layer.path, layer.candidates) for layer in self.layers]
        most = float(sum(saved.max() for saved in savings))
        before, after = ([self._errors(layer, by) for layer in self.layers] for by in (known, better))

        def error(by: list[np.ndarray], share: float) -> float:
            picks = choose(savings, by, share * most)
            return float(sum(errors[pick] for errors, pick in zip(after, picks, strict=True)))

        return max(error(before, share) / max(error(after, share), 1e-300) - 1 for share in CUTS)

    @cached_property
    def weights(self) -> list[float]:
        """By layer, the share of it that goes in relation to other layers', where shares are not chosen by error."""
        if self.settings.allocation == "uniform":
            return [1.0] * len(self.layers)
        influences = block_influences(self.denoiser, [layer.path for layer in self.layers], self.calls.sensitivity)
        return softmax_weights(influences, self.settings.softmax_temperature)

    @cached_property
    def dense_outputs(self) -> DenseOutputs:
        """What dense layers give out in the fitting calls, kept for other slim models of the same layers."""
        return lru_cache(1)(partial(dense_rows, self.denoiser, self.calls.fitting))

    @own_torch_state()
    def remember(self, statistics: Statistics, *, macs_too: bool = False) -> None:
        """Keep with statistics what was measured by forward passes: planning from them then needs no recorded calls.

        Args:
            macs_too: even if a call has to be recorded for them alone.
        """
        if keeps_measured(self.settings):
            statistics.sensitivities = statistics.sensitivities | self.sensitivities
        macs = self.costs.macs if macs_too else self._macs()
        if macs is not None:
            layers = {path: costs[max(costs)] for path, costs in macs.layers.items()}
            statistics.macs = statistics.macs | {"": macs.dense, **layers}

    def _macs(self) -> CostTable | None:
        """MACs by rank, if nothing has to be recorded for them alone."""
        return self.costs.macs if "macs" in vars(self.costs) or self.calls.has("sensitivity") else None

    @own_torch_state()
    def plan(self, budget: Budget) -> Plan:
        """See `make_plan`."""
        return PLANNED[budget.kind].plan(self, budget)

    def cut(self, table: CostTable, removed: float, budget: Budget, *, bounds: bool = False) -> Plan:
        """The plan by which `removed` goes, in the table's unit, with the least predicted error.

        Args:
            bounds: whether that bounds the cost by this table, for the plan to say.
        """
        savings = [table.savings(layer.path, layer.candidates) for layer in self.layers]
        by_error = self.settings.allocation not in ("uniform", "softmax")
        sensitivities: Mapping[str, float] = self.sensitivities
        shares = [] if by_error else distances(self.layers, savings, self.weights, removed)
        # A cut in parameters runs no model to count MACs alone.
        macs = self._macs() if budget.kind == "parameters" else self.costs.macs
        also = None
        if by_error and table.name == "parameters" and macs is not None:
            also = [macs.savings(layer.path, layer.candidates) for layer in self.layers]

        def picked(by: Mapping[str, float]) -> list[int]:
            errors = [self._errors(layer, by) for layer in self.layers] if by_error else shares
            return choose(savings, errors, removed, also)

        picks = picked(sensitivities)
        if self.settings.replans:
            picks, sensitivities = iterate(self, picks, picked)
        ranks = {layer.path: layer.candidates[pick] for layer, pick in zip(self.layers, picks, strict=True)}
        tables = {t.name: t for t in (self.costs.parameters, macs, self.costs.latency, table) if t is not None}
        costs = {name: {"dense": t.dense, "slim": t.of(ranks)} for name, t in tables.items()}
        if bounds:
            costs[table.name]["budget"] = table.dense - removed
        return Plan(
            model_class=type(self.denoiser).__name__,
            model_hash=self.statistics.model_hash,
            allocation=self.settings.allocation,
            forms=self.settings.forms,
            align=self.settings.align,
            parameters={name: round(value) for name, value in costs.pop("parameters").items()},
            budget={budget.kind: budget.value},
            costs=costs,
            sites={site.name: self._site_plan(site, ranks.get(site.path), sensitivities) for site in self.sites},
            left_dense=self.left_dense,
            calibration=self.statistics.made_from,
        )

    def _errors(self, layer: Layer, sensitivities: Mapping[str, float]) -> np.ndarray:
        curves = ((s.name, self.factors[s.name].tail[layer.candidates].numpy()) for s in layer.sites)
        return np.sum([sensitivities.get(name, 1.0) * curve for name, curve in curves], axis=0)

    def _site_plan(self, site: Site, rank: int | None, sensitivities: Mapping[str, float]) -> SitePlan:
        """What a site keeps; None if it was not to be slimmed."""
        if rank is None:
            return site_plan(site, site.dense_rank)
        local = float(self.factors[site.name].tail[rank])
        sensitivity = sensitivities.get(site.name)
        predicted = None if sensitivity is None else sensitivity * local
        return site_plan(site, rank, local_error=local, sensitivity=sensitivity, predicted_error=predicted)

    def knows(self, plan: Plan) -> bool:
        """Whether the plan is of these forms and slims chosen sites alone, whoever made it."""
        cut = {name for name, site in plan.sites.items() if site.rank < site.dense_rank}
        return plan.forms.local() == self.settings.forms.local() and cut <= {site.name for site in self.chosen}

    @own_torch_state()
    def slim(self, plan: Plan, *, release_dense: bool = False, maps: Maps | None = None) -> nn.Module:
        """The slim model of a plan that it `knows` (`slim_denoiser`)."""
        fitted = plan.is_fitted()
        return slim_denoiser(
            self.denoiser,
            self.statistics,
            plan,
            self.factors,
            fitting_calls=self.calls.fitting if fitted else (),
            resnet_settings=self.settings.resnets,
            dense_outputs=self.dense_outputs if fitted else None,
            release_dense=release_dense,
            maps=maps,
        )


def keeps_measured(settings: PlanSettings) -> bool:
    """Whether what the allocation measures is kept for other budgets: sensitivities are, with the usual forms."""
    # Others' local errors are others, and so are their slopes.
    return settings.allocation == "global" and settings.forms.local() == Forms().local()


def chosen_sites(sites: Sequence[Site], settings: PlanSettings) -> list[Site]:
    """Those in the groups that may be slimmed.

    Raises:
        InputError: if the groups have a fault (`fault_in`), the model has nothing in them, or plans are to be made
            again by an allocation that measures no sensitivities.
    """
    if fault := fault_in(settings.groups):
        raise InputError(f"groups: {fault}")
    if settings.replans and settings.allocation != "global":
        raise InputError(
            f"replans measure sensitivities again, and the {settings.allocation} allocation has none: leave replans "
            "out, or take the global allocation"
        )
    chosen = [s for s in sites if s.group in settings.groups]
    if not chosen:
        others = ", ".join(sorted({s.group for s in sites})) or "no group"
        raise InputError(f"there is nothing to slim in {', '.join(settings.groups)}: this model has sites in {others}")
    return chosen
