"""Choosing one rank per site under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from torch import nn

from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS, fault_in, find_sites
from slimdiff.groups.group import Site
from slimdiff.plan import Plan, site_plan
from slimdiff.planning.costs import CostTable, mac_costs, parameter_costs
from slimdiff.planning.feasibility import most_removable, removed_within
from slimdiff.planning.knapsack import Layer, choose, distances, find_layers, softmax_weights
from slimdiff.planning.papers import block_influences
from slimdiff.planning.search import smallest_within
from slimdiff.planning.sensitivity import measure_sensitivities
from slimdiff.settings import Budget, Forms, PlanSettings
from slimdiff.slimming.compensation import DenseOutputs
from slimdiff.slimming.slim import Factors, check_statistics, factorise, slim_denoiser
from slimdiff.statistics import Statistics

# What allocations measure by forward passes, and therefore need recorded calls for.
MEASURED = {"global": "sensitivities", "softmax": "how much each block changes its input"}


def make_plan(
    denoiser: nn.Module,
    statistics: Statistics,
    budget: Budget,
    settings: PlanSettings | None = None,
    *,
    calls: Sequence[Call] = (),
    held: Sequence[Call] = (),
    fitting_calls: Sequence[Call] = (),
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
        fitting_calls: recorded calls that slim resnets are fitted on and errors compensated, needed where any are.
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
        fitting_calls=fitting_calls,
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
        fitting_calls: Sequence[Call] = (),
        latency: CostTable | None = None,
        factors: Factors | None = None,
        progress: str | None = "plan",
    ) -> None:
        self.denoiser = denoiser
        self.statistics = statistics
        self.settings = settings or PlanSettings()
        self.calls = calls
        self.held = held
        self.fitting_calls = fitting_calls
        self.dense_outputs = DenseOutputs(denoiser, fitting_calls)
        self.latency = latency
        self.progress = progress
        check_statistics(denoiser, statistics)
        self.sites, left_dense = find_sites(denoiser)
        silent = {s.path: None for s in self.sites if not GROUPS[s.group].covers(s, statistics)}
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
            fitting_calls=self.fitting_calls,
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
        if keeps_measured(self.settings):
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
            return self.latency
        if budget.kind == "macs":
            if self.macs is None:
                raise InputError("a budget of MACs needs a recorded denoiser call: it shows how many tokens there are")
            return self.macs
        return self.parameters

    def most(self, table: CostTable) -> float:
        """The most that can go, in the table's unit."""
        return most_removable(table, self.layers)

    def plan(self, budget: Budget) -> Plan:
        """See `make_plan`."""
        if budget.kind == "max_error":
            return smallest_within(self, budget, self.held)
        table = self.table(budget)
        removed = removed_within(budget, table, self.layers)
        return self.written(self.ranks(table, removed), budget, {table.name: table.dense - removed})

    def ranks(self, table: CostTable, removed: float) -> dict[str, int]:
        """Rank by module path, so that `removed` goes, in the table's unit, with the least predicted error."""
        savings = [table.savings(layer.path, layer.candidates) for layer in self.layers]
        if self.settings.allocation in ("uniform", "softmax"):
            picks = choose(savings, distances(self.layers, savings, self.weights, removed), removed)
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
            fitting_calls=self.fitting_calls,
            resnet_settings=self.settings.resnets,
            dense_outputs=self.dense_outputs,
        )

    def told(self, what: str) -> str | None:
        """A progress bar's name, or None for no bar."""
        return self.progress and f"{self.progress}: {what}"


def check_budgets(
    denoiser: nn.Module,
    budgets: Iterable[Budget],
    settings: PlanSettings,
    *,
    call: Callable[[], Call] | None = None,
    latency: CostTable | None = None,
) -> None:
    """Refuse a budget that no plan can meet, before the long work: no statistics are asked for.

    What cannot be told yet passes: an error; MACs without `call`; a speedup without `latency`; and sites that never run
    in calibration are taken for ones that do.

    Args:
        call: gives a denoiser call to count MACs of, if there is a budget of them.

    Raises:
        InputError: as `Planner.plan` does.
    """
    sites = chosen_sites(find_sites(denoiser)[0], settings)
    layers = find_layers(sites, settings.align)
    tables: dict[str, CostTable | None] = {"speedup": latency, "max_error": None}
    for budget in budgets:
        if budget.kind not in tables:
            if budget.kind == "parameters":
                tables[budget.kind] = parameter_costs(denoiser, sites)
            else:
                tables[budget.kind] = None if call is None else mac_costs(denoiser, sites, call())
        table = tables[budget.kind]
        if table is not None:
            removed_within(budget, table, layers)


def keeps_measured(settings: PlanSettings) -> bool:
    """Whether what the allocation measures is kept for other budgets: sensitivities are, with the usual forms."""
    # Others' local errors are others, and so are their slopes.
    return settings.allocation == "global" and settings.forms.local() == Forms().local()


def is_measured(statistics: Statistics, sites: Sequence[Site], settings: PlanSettings) -> bool:
    """Whether the statistics hold what the allocation measures: the sites' sensitivities, with the usual forms."""
    return keeps_measured(settings) and all(site.name in statistics.sensitivities for site in sites)


def chosen_sites(sites: Sequence[Site], settings: PlanSettings) -> list[Site]:
    """Those in the groups that may be slimmed.

    Raises:
        InputError: if the groups have a fault (`fault_in`), or the model has nothing in them.
    """
    if fault := fault_in(settings.groups):
        raise InputError(f"groups: {fault}")
    chosen = [s for s in sites if s.group in settings.groups]
    if not chosen:
        others = ", ".join(sorted({s.group for s in sites})) or "no group"
        raise InputError(f"there is nothing to slim in {', '.join(settings.groups)}: this model has sites in {others}")
    return chosen
