"""A new kind of budget is two halves, registered from outside: how it is read, and what it is counted in."""

from __future__ import annotations

from functools import partial

import pytest
from conftest import PROMPTS

from slimdiff import Budget, InputError, Plan, PlanSettings, compress
from slimdiff.planning.budgets import Costs, PlannedBy
from slimdiff.planning.costs import CostTable
from slimdiff.planning.planner import PLANNED, register_budget
from slimdiff.settings import BUDGETS, BudgetKind, read_amount, removed_amount

# The half without torch: bytes of the weights in half precision.
KIND = BudgetKind("bytes", "what goes out of the weights in fp16", read_amount, partial(removed_amount, noun="bytes"))


def table(costs: Costs) -> CostTable:
    """The planning half."""
    layers = {path: {r: 2 * c for r, c in ranks.items()} for path, ranks in costs.parameters.layers.items()}
    return CostTable("bytes", 2 * costs.parameters.dense, layers)  # type: ignore[arg-type]


@pytest.fixture
def registered():
    register_budget(KIND, PlannedBy(table))
    yield
    del BUDGETS["bytes"], PLANNED["bytes"]


def test_a_registered_budget_compresses_and_its_plan_opens_again(
    pipeline, calibration, compression, registered, tmp_path
):
    settings = {"calibration": calibration, "planning": PlanSettings(align=4), "statistics": compression.statistics}
    budget = Budget(bytes="-300k")
    assert str(budget) == "bytes -300k" and KIND.flag == "--bytes"
    made = compress(pipeline, PROMPTS, budget, **settings)
    costs = made.plan.costs["bytes"]
    assert costs["budget"] == costs["dense"] - 300_000 and 300_000 <= costs["dense"] - costs["slim"] <= 302_000
    assert costs["slim"] == sum(2 * p.numel() for p in made.pipeline.unet.parameters())
    with pytest.raises(InputError, match="99%.* bytes, but at most .* bytes"):
        compress(pipeline, [], Budget(bytes="99%"), **settings)
    with pytest.raises(InputError, match="there is a budget bytes already"):
        register_budget(KIND, PlannedBy(table))
    made.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made.plan and made.plan.budget == {"bytes": "-300k"}


def test_what_is_not_registered_is_no_budget():
    assert "bytes" not in BUDGETS
    with pytest.raises(InputError, match="exactly one of parameters, macs, speedup, max_error; given: bytes"):
        Budget(bytes="1M")
