"""A new kind of budget is two halves, registered from outside: how it is read, and what it is counted in."""

from __future__ import annotations

import json
from functools import partial

import pytest
from conftest import PROMPTS

from deploy.artifacts.files import save_pipeline
from deploy.build.stages import run_stages
from deploy.build.steps import stages_of
from deploy.build.workshop import Workshop
from deploy.cli.app import main
from deploy.recipe.recipe import load_recipe
from slimdiff import Budget, InputError, Plan, PlanSettings, compress
from slimdiff.budget import BUDGETS, BudgetKind, read_amount, removed_amount
from slimdiff.planning.budgets import Costs, PlannedBy
from slimdiff.planning.costs import CostTable
from slimdiff.planning.planner import PLANNED, register_budget

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


RECIPE = """
model: tiny
prompts: prompts.txt
calibration: {samples: 2, sampling: {steps: 1, batch: 2}}
budget: {bytes: 8%}
plan: {sensitivity_calls: 1, allocation: local}
"""


@pytest.fixture
def workspace(pipeline, tmp_path):
    """A folder with `tiny` (a diffusers directory), `prompts.txt` and `recipe.yaml`."""
    save_pipeline(pipeline, tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def is_kept(costs, share):
    return costs["budget"] == costs["dense"] - round(share * costs["dense"]) >= costs["slim"]


def test_a_registered_budget_is_a_flag(registered, workspace, capsys):
    argv = ["compress", workspace / "tiny", "--prompts", workspace / "prompts.txt", "--out", workspace / "slim"]
    argv += ["--samples", "2", "--steps", "1", "--batch", "2", "--allocation", "local", "--groups", "feed_forward"]
    assert main([*map(str, argv), "--json", "--bytes", "2%"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["budget"] == {"bytes": "2%"} and is_kept(value["predicted"]["bytes"], 0.02)
    assert main([*map(str, argv), "--bytes", "some"]) == 2
    assert "--bytes: budget 'some': write a count" in capsys.readouterr().err


def test_a_registered_budget_is_a_key_of_recipes(registered, workspace):
    recipe = load_recipe(workspace / "recipe.yaml")
    others = {"reduce": None, "macs": None, "speedup": None, "max_error": None, "runtime": "onnxruntime"}
    assert recipe.budget.model_dump() == {"bytes": "8%", **others}
    *_, planned = run_stages(Workshop(recipe, workspace / "build"), stages_of(recipe)[:3])
    plan = Plan.load(workspace / "build" / planned.name / "plan.json")
    assert plan.budget == {"bytes": "8%"} and is_kept(plan.costs["bytes"], 0.08)
    (workspace / "recipe.yaml").write_text(RECIPE.replace("8%", "some"))
    with pytest.raises(InputError, match="budget.bytes: budget 'some': write a count such as 100M"):
        load_recipe(workspace / "recipe.yaml")
    (workspace / "recipe.yaml").write_text(RECIPE.replace("8%", "8%, reduce: 8%"))
    with pytest.raises(InputError, match="exactly one of reduce, .*, bytes; here are reduce and bytes"):
        load_recipe(workspace / "recipe.yaml")


def test_what_is_not_registered_is_no_budget():
    assert "bytes" not in BUDGETS
    with pytest.raises(InputError, match="exactly one of parameters, macs, speedup, max_error; given: bytes"):
        Budget(bytes="1M")


def test_what_is_not_registered_is_no_key_of_a_recipe(workspace):
    with pytest.raises(InputError, match="unknown key 'bytes'.*known here: reduce, macs, speedup, max_error, runtime"):
        load_recipe(workspace / "recipe.yaml")
