"""The smallest model whose noise prediction stays close enough: predicted errors choose, measured ones decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimdiff.budget import Budget
from slimdiff.errors import InputError
from slimdiff.fidelity import HeldError
from slimdiff.plan import Plan
from slimdiff.planning.budgets import most_removable
from slimdiff.progress import bar

if TYPE_CHECKING:
    from slimdiff.planning.planner import Planner

# Sizes that are considered: this many equal steps from the dense model to the smallest there is.
STEPS = 128


def smallest_within(planner: Planner, budget: Budget) -> Plan:
    """The smallest plan whose measured error on held calls is at most the budget's.

    Small is of few parameters or, where precisions are chosen, of few bytes.

    Errors of sites do not simply add up, so models are made and measured: the amount of parameters that goes is
    bisected on a grid of `STEPS` steps, which takes eight models at most. The next step of the grid breaks the bound
    (or there is none). The same inputs give the same plan.

    Raises:
        InputError: if even the first step breaks the bound, or there are no calls to measure on.
    """
    bound, held = float(budget.value), HeldError(planner.denoiser, planner.calls.held)
    table, layers = planner.size, planner.costs.layers
    most = most_removable(table, layers)
    plans: dict[int, Plan] = {}
    holds, breaks = 0, STEPS + 1
    with bar(name="models", unit="model") as models:
        while breaks - holds > 1:
            step = (holds + breaks) // 2
            plan = planner.cut(table, most * step / STEPS, budget)
            with planner.as_planned(plan) as model:
                error = held.of(model)
            plans[step] = plan.model_copy(update={"noise_error": error})
            holds, breaks = (step, breaks) if error <= bound else (holds, step)
            models.update()
    if holds == 0:
        slim = plans[1].parameters["slim"] if table.name == "parameters" else plans[1].costs[table.name]["slim"]
        least = table.dense - slim
        raise InputError(
            f"max_error {bound:g} cannot be kept: the smallest step, {least:,.0f} {table.name} out of the "
            f"{sum(len(layer.sites) for layer in layers)} sites, makes an error of {plans[1].noise_error:.3g}; "
            "ask for more than that"
        )
    return plans[holds]
