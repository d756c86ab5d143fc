"""How a kind of budget is planned: the half that needs a model (`slimdiff.settings.BUDGETS` has the other).

A kind is counted in a cost table, of which an amount goes with the least predicted error (`ByTable`), or its plan is
searched for by measuring models (`BySearch`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import nn

from slimdiff.denoising.calls import Calls
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.plan import Plan
from slimdiff.planning.costs import CostTable, mac_costs, parameter_costs
from slimdiff.planning.knapsack import Layer
from slimdiff.settings import Budget

_NOUNS = {"parameters": "parameters", "macs": "MACs", "latency_ms": "latencies"}


class Costs:
    """What a model costs by the ranks of its layers, in each unit: counted when first asked for.

    Args:
        known: `Statistics.macs`, which save the counting.
        call: gives a denoiser call to count MACs of, or None: how many tokens there are shows in a call alone.
        latency: measured milliseconds by layer and rank.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layers: Sequence[Layer],
        *,
        known: Mapping[str, float] | None = None,
        call: Callable[[], Call | None] = lambda: None,
        latency: CostTable | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.layers = layers
        self.sites = [site for layer in layers for site in layer.sites]
        self.known = known or {}
        self.call = call
        self.latency = latency

    @cached_property
    def parameters(self) -> CostTable:
        return parameter_costs(self.denoiser, self.sites)

    @cached_property
    def macs(self) -> CostTable | None:
        """Multiply-accumulates, None without a call."""
        if self.knows_macs:
            ranks = {layer.path: {0: 0.0, layer.dense_rank: self.known[layer.path]} for layer in self.layers}
            return CostTable("macs", self.known[""], ranks)
        call = self.call()
        return None if call is None else mac_costs(self.denoiser, self.sites, call)

    @property
    def knows_macs(self) -> bool:
        """Whether MACs take no forward pass."""
        return "macs" in vars(self) or {"", *(layer.path for layer in self.layers)} <= self.known.keys()


class Cutter(Protocol):
    """What gives plans of one model at any size, and their slim models: a `Planner`."""

    denoiser: nn.Module
    calls: Calls

    @property
    def costs(self) -> Costs:
        """What its layers cost."""

    def cut(self, table: CostTable, removed: float, budget: Budget, *, bounds: bool = False) -> Plan:
        """The plan by which `removed` goes, in the table's unit, with the least predicted error.

        Args:
            budget: what was asked for.
            bounds: whether that bounds the cost by this table, for the plan to say.
        """

    def slim(self, plan: Plan) -> nn.Module:
        """A plan's slim model."""


@dataclass(frozen=True)
class ByTable:
    """An amount goes out of a cost table.

    Attributes:
        table: out of the costs; None where it is not known.
        missing: what an error then says.
    """

    table: Callable[[Costs], CostTable | None]
    missing: str = ""

    def plan(self, cutter: Cutter, budget: Budget) -> Plan:
        """The plan within the budget.

        Raises:
            InputError: if the table is missing, or as `removed_within` does.
        """
        table = self.table(cutter.costs)
        if table is None:
            raise InputError(self.missing)
        return cutter.cut(table, removed_within(budget, table, cutter.costs.layers), budget, bounds=True)

    def check(self, costs: Costs, budget: Budget) -> None:
        """Refuse a budget that cannot be met, as far as that is known."""
        table = self.table(costs)
        if table is not None:
            removed_within(budget, table, costs.layers)


@dataclass(frozen=True)
class BySearch:
    """A plan is searched for among those of a cutter: whether there is one shows only then."""

    search: Callable[[Cutter, Budget], Plan]

    def plan(self, cutter: Cutter, budget: Budget) -> Plan:
        """The plan that was found."""
        return self.search(cutter, budget)

    def check(self, costs: Costs, budget: Budget) -> None:
        """Nothing is known beforehand."""


def most_removable(table: CostTable, layers: Sequence[Layer]) -> float:
    """The most that can go, in the table's unit: every layer at its smallest candidate."""
    return sum(float(table.savings(layer.path, layer.candidates[:1])[0]) for layer in layers)


def removed_within(budget: Budget, table: CostTable, layers: Sequence[Layer]) -> float:
    """What the budget takes out of the model, in the table's unit.

    Raises:
        InputError: if that is more than can go, or no amount at all, or the table is another model's.
    """
    noun = _NOUNS.get(table.name, table.name)
    missing = [layer.path for layer in layers if layer.path not in table.layers]
    if missing:
        raise InputError(f"the table of {noun} does not know {missing[0]}: measure it for this model")
    removed, most = budget.removed(table.dense), most_removable(table, layers)
    if removed > most:

        def amount(value: float) -> str:
            return f"{value:.3g} ms" if table.name == "latency_ms" else f"{value:,.0f} {noun}"

        words = f"{budget.value:g}x" if budget.kind == "speedup" else repr(budget.value)
        groups = dict.fromkeys(site.group for layer in layers for site in layer.sites)
        raise InputError(
            f"budget {words} is {amount(removed)}, but at most {amount(most)} ({most / table.dense:.1%}) can go from "
            f"the {sum(len(layer.sites) for layer in layers)} sites in {', '.join(groups)}"
        )
    return removed
