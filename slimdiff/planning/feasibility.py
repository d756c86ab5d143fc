"""What a budget asks for against the most that can go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimdiff.errors import InputError
from slimdiff.planning.knapsack import Layer

if TYPE_CHECKING:
    from slimdiff.planning.costs import CostTable
    from slimdiff.settings import Budget

_NOUN = {"parameters": "parameters", "macs": "MACs", "latency_ms": "latencies"}


def most_removable(table: CostTable, layers: Sequence[Layer]) -> float:
    """The most that can go, in the table's unit: every layer at its smallest candidate."""
    return sum(float(table.savings(layer.path, layer.candidates[:1])[0]) for layer in layers)


def removed_within(budget: Budget, table: CostTable, layers: Sequence[Layer]) -> float:
    """What the budget takes out of the model, in the table's unit.

    Raises:
        InputError: if that is more than can go, or no amount at all, or the table is another model's.
    """
    missing = [layer.path for layer in layers if layer.path not in table.layers]
    if missing:
        raise InputError(f"the table of {_NOUN[table.name]} does not know {missing[0]}: measure it for this model")
    removed, most = budget.removed(table.dense), most_removable(table, layers)
    if removed > most:
        groups = dict.fromkeys(site.group for layer in layers for site in layer.sites)
        raise InputError(
            f"budget {_words(budget)} is {_amount(table, removed)}, but at most {_amount(table, most)} "
            f"({most / table.dense:.1%}) can go from the {sum(len(layer.sites) for layer in layers)} sites in "
            f"{', '.join(groups)}"
        )
    return removed


def _words(budget: Budget) -> str:
    value = getattr(budget, budget.kind)
    return f"{value:g}x" if budget.kind == "speedup" else repr(value)


def _amount(table: CostTable, value: float) -> str:
    return f"{value:.3g} ms" if table.name == "latency_ms" else f"{value:,.0f} {_NOUN[table.name]}"
