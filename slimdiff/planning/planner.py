"""Choosing one rank per site under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial

import numpy as np
from torch import nn

from slimdiff.budget import BUDGETS, Budget, BudgetKind
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.int8 import input_ranges, rounded
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
from slimdiff.planning.offloaded import check_offloaded
from slimdiff.planning.papers import block_influences
from slimdiff.planning.pictures import Picture
from slimdiff.planning.precision import (
    byte_costs,
    choose_both,
    choose_int8,
    find_units,
    layer_plans,
    measure_int8,
)
from slimdiff.planning.replanning import iterate
from slimdiff.planning.search import smallest_within
from slimdiff.planning.sensitivity import measure_sensitivities
from slimdiff.settings import Forms, PlanSettings
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
        lambda costs: costs.work, "a budget of MACs needs a recorded denoiser call: it shows how many tokens there are"
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
    picture: Picture | None = None,
) -> Plan:
    """Choose ranks so that the budget is met with the least predicted error.

    Each site's error is its local error curve times a sensitivity measured by passes through the model; the choice is a
    multiple-choice knapsack, solved exactly (scipy's `milp`).

    Args:
        calls: recorded denoiser calls; a list of them is for sensitivities and MACs alone (`Calls.of`). Sensitivities
            and MACs that the statistics hold need none.
        latency: measured milliseconds by layer and rank, needed by a speedup.
        picture: by whose calls layers are weighed: MACs and the speedup are then of a whole picture.

    Raises:
        InputError: if the budget cannot be met by the sites there are, or something does not fit together.
    """
    return Planner(denoiser, statistics, settings, calls=calls, latency=latency, picture=picture).plan(budget)


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
        picture: Picture | None = None,
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
        check_offloaded(denoiser, self.settings, measured=self.is_measured)
        name = self.settings.allocation
        known = self.is_measured and not self.settings.replans
        if name in MEASURED and not known and not self.calls.gives("sensitivity"):
            raise InputError(f"the {name} allocation measures {MEASURED[name]}: give it recorded denoiser calls")
        if self.in_int8 and not self.knows_int8 and not self.calls.gives("sensitivity"):
            raise InputError("what int8 costs each layer is measured: give it recorded denoiser calls")
        self.layers = find_layers(self.chosen, self.settings.align)
        self.costs = Costs(denoiser, self.layers, statistics.macs, self._call, latency, picture)

    def _call(self) -> Call | None:
        return self.calls.sensitivity[0] if self.calls.gives("sensitivity") else None

    @property
    def is_measured(self) -> bool:
        """Whether the statistics hold what the allocation measures: the sites' sensitivities, with the usual forms."""
        known = self.statistics.sensitivities
        return keeps_measured(self.settings) and all(site.name in known for site in self.chosen)

    @property
    def in_int8(self) -> bool:
        """Whether precisions are chosen, too."""
        return self.settings.precision == "int8"

    @property
    def knows_int8(self) -> bool:
        """Whether the statistics hold what int8 costs each layer."""
        return bool(self.statistics.int8_errors) and self.statistics.int8_errors.keys() <= self.statistics.macs.keys()

    @cached_property
    def _int8(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        if self.knows_int8:
            return self.statistics.int8_errors, self.statistics.macs
        return measure_int8(self.denoiser, self.calls.sensitivity, self.settings.int8_error)

    @property
    def int8_errors(self) -> Mapping[str, float]:
        """By path of a linear or convolution, what int8 costs it alone."""
        return self._int8[0]

    @cached_property
    def size(self) -> CostTable:
        """What is small of a small model: parameters, or where precisions are chosen the bytes that they take."""
        return byte_costs(self.denoiser, self.layers, list(self.int8_errors)) if self.in_int8 else self.costs.parameters

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
        if self.in_int8:
            errors, products = self._int8
            statistics.int8_errors = dict(errors)
            statistics.macs = statistics.macs | {path: products[path] for path in errors}
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
        measured = self.sensitivities  # first: where calls are recorded for them, MACs are counted of one
        # A cut in parameters runs no model to count MACs alone.
        macs = self._macs() if budget.kind == "parameters" else self.costs.macs
        counted = self.costs.picture is None or budget.kind == "macs" or self.calls.has("sensitivity")
        work = self.costs.work if macs is not None and counted else None
        picks, int8, sensitivities = self._choose(table, removed, work, measured)
        ranks = {layer.path: layer.candidates[pick] for layer, pick in zip(self.layers, picks, strict=True)}
        tables = {t.name: t for t in (self.costs.parameters, macs, work, self.costs.latency, self.size, table) if t}
        costs = {name: {"dense": t.dense, "slim": t.of(ranks, int8)} for name, t in tables.items()}
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
            layers=layer_plans(self.denoiser, int8, self.int8_errors, table) if self.in_int8 else {},
            left_dense=self.left_dense,
            calibration=self.statistics.made_from,
        )

    def _choose(
        self, table: CostTable, removed: float, work: CostTable | None, sensitivities: Mapping[str, float]
    ) -> tuple[list[int], list[str], Mapping[str, float]]:
        """The index of each layer's candidate, the paths that go into int8, and the sensitivities that it was by."""
        by_error, together = self.settings.allocation not in ("uniform", "softmax"), self.in_int8 and bool(table.int8)
        if together and not by_error:
            raise InputError(
                f"ranks and int8 are chosen together by their errors, and the {self.settings.allocation} allocation "
                "knows none: take global, or a budget in parameters or MACs"
            )
        if self.in_int8 and not together and table.name.startswith("latency_ms"):
            raise InputError("the table of latencies does not know int8: measure it for a plan of this precision")
        savings = [table.savings(layer.path, layer.candidates) for layer in self.layers]
        shares = [] if by_error else distances(self.layers, savings, self.weights, removed)
        also = None
        if by_error and table.name == "parameters" and work is not None:
            also = [work.savings(layer.path, layer.candidates) for layer in self.layers]
        in_int8: dict[tuple[int, ...], list[str]] = {}

        def picked(by: Mapping[str, float]) -> list[int]:
            if not together:
                errors = [self._errors(layer, by) for layer in self.layers] if by_error else shares
                return choose(savings, errors, removed, also)
            errors_of, others = partial(self._errors, sensitivities=by), [site.path for site in self.sites]
            units = find_units(self.layers, errors_of, others, list(self.int8_errors))
            ranks, int8 = choose_both(units, table, removed, self.int8_errors)
            picks = [layer.candidates.index(ranks.get(layer.path, layer.dense_rank)) for layer in self.layers]
            in_int8[tuple(picks)] = int8
            return picks

        picks = picked(sensitivities)
        if self.settings.replans:
            picks, sensitivities = iterate(self, picks, picked)
        if self.in_int8 and not together:
            return picks, choose_int8(*self._int8, self.settings.int8_error), sensitivities
        return picks, in_int8.get(tuple(picks), []), sensitivities

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

    @contextmanager
    def as_planned(self, plan: Plan, slim: nn.Module | None = None) -> Iterator[nn.Module]:
        """The slim model of a plan, for the length of a block rounded where the plan puts it into int8.

        Args:
            slim: if it is made already.
        """
        slim = slim or self.slim(plan)
        if not (int8 := plan.int8()):
            yield slim
            return
        with rounded(slim, input_ranges(slim, int8, self.calls.sensitivity)):
            yield slim

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
