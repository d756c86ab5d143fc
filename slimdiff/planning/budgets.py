"""How a kind of budget is planned: the half that needs a model (`slimdiff.budget.BUDGETS` has the other)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from slimdiff.budget import Budget
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.plan import Plan
from slimdiff.planning.costs import CostTable, mac_costs, parameter_costs
from slimdiff.planning.knapsack import Layer
from slimdiff.planning.pictures import Picture

if TYPE_CHECKING:
    from slimdiff.planning.planner import Planner

_NOUNS = {
    "parameters": "parameters",
    "macs": "MACs",
    "latency_ms": "latencies",
    "bytes": "bytes",
    "macs_per_image": "MACs of an image",
    "latency_ms_per_image": "latencies of an image",
}


@dataclass
class Costs:
    """What a model costs by the ranks of its layers, in each unit: counted when first asked for.

    Attributes:
        known: `Statistics.macs`, which save the counting.
        call: gives a denoiser call to count MACs of, or None: how many tokens there are shows in a call alone.
        latency: measured milliseconds by layer and rank; of a whole picture where there is one.
        picture: the calls that a budget is of, if it is of a whole picture.
    """

    denoiser: nn.Module
    layers: Sequence[Layer]
    known: Mapping[str, float]
    call: Callable[[], Call | None]
    latency: CostTable | None
    picture: Picture | None = None

    def __post_init__(self) -> None:
        if self.latency is not None and (self.picture is not None) != (self.latency.name == "latency_ms_per_image"):
            one, other = ("a call", "a whole picture") if self.picture else ("a whole picture", "a call")
            raise InputError(f"this table of latencies is of {one}, and the budget is of {other}")
        self.sites = [site for layer in self.layers for site in layer.sites]
        if {"", *(layer.path for layer in self.layers)} <= self.known.keys():
            ranks = {layer.path: {0: 0.0, layer.dense_rank: self.known[layer.path]} for layer in self.layers}
            self.macs = CostTable("macs", self.known[""], ranks)

    @cached_property
    def parameters(self) -> CostTable:
        return parameter_costs(self.denoiser, self.sites)

    @cached_property
    def macs(self) -> CostTable | None:
        """Multiply-accumulates, None without a call."""
        call = self.call()
        return None if call is None else mac_costs(self.denoiser, self.sites, call)

    @cached_property
    def work(self) -> CostTable | None:
        """Multiply-accumulates of what is budgeted: of a picture by its schedule, else of a sample."""
        if self.picture is None or self.macs is None:
            return self.macs
        call = self.call()
        return None if call is None else self.picture.macs(self.denoiser, self.macs, call)


@dataclass(frozen=True)
class PlannedBy:
    """How one kind of budget is planned: out of a table goes what it says; or its plan is searched for.

    Attributes:
        table: what it is counted in, out of the costs; None where that is not known.
        missing: what an error then says.
        search: the plan among those that a planner cuts; whether there is one shows only then.
    """

    table: Callable[[Costs], CostTable | None] = lambda _: None
    missing: str = ""
    search: Callable[[Planner, Budget], Plan] | None = None

    def plan(self, planner: Planner, budget: Budget) -> Plan:
        """The plan within the budget.

        Raises:
            InputError: if there is none, or the table is missing.
        """
        if self.search is not None:
            return self.search(planner, budget)
        table = self.table(planner.costs)
        if table is None:
            raise InputError(self.missing)
        return planner.cut(table, removed_within(budget, table, planner.costs.layers), budget, bounds=True)

    def check(self, costs: Costs, budget: Budget) -> None:
        """Refuse a budget that cannot be met, as far as that is known."""
        table = self.table(costs)
        if table is not None:
            removed_within(budget, table, costs.layers)


def most_removable(table: CostTable, layers: Sequence[Layer]) -> float:
    """The most that can go, in the table's unit."""
    return table.most_removable({layer.path: layer.candidates for layer in layers})


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
            return f"{value:.3g} ms" if table.name.startswith("latency_ms") else f"{value:,.0f} {noun}"

        words = f"{budget.value:g}x" if budget.kind == "speedup" else repr(budget.value)
        groups = dict.fromkeys(site.group for layer in layers for site in layer.sites)
        raise InputError(
            f"budget {words} is {amount(removed)}, but at most {amount(most)} ({most / table.dense:.1%}) can go from "
            f"the {sum(len(layer.sites) for layer in layers)} sites in {', '.join(groups)}"
            + (" and int8" if table.int8 else "")
        )
    return removed
