"""Budgets in every unit: what is predicted is what is counted, and what was asked for is met."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import PROMPTS, SAMPLING, tiny_unet

from slimdiff import Budget, InputError, PlanSettings, compress, slim_denoiser
from slimdiff.budget import BUDGETS
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.trajectory import record_calls
from slimdiff.fidelity import HeldError
from slimdiff.groups import find_sites
from slimdiff.planning.budgets import most_removable
from slimdiff.planning.costs import CostTable, batch_of, count_macs, count_parameters, mac_costs, parameter_costs
from slimdiff.planning.knapsack import TOLERANCE, _nearest, choose, find_layers
from slimdiff.planning.planner import Planner
from slimdiff.planning.search import STEPS
from slimdiff.slimming.skeleton import skeleton


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS[:2], SAMPLING)


@pytest.fixture(scope="module")
def planner(pipeline, compression, calls):
    recorded = Calls.of(calls[:2], fitting=calls[:2])
    return Planner(pipeline.unet, compression.statistics, PlanSettings(align=4), calls=recorded)


@pytest.mark.parametrize("kind", ["speedup", "max_error"])
def test_a_truth_value_is_no_number(kind):
    with pytest.raises(InputError, match="not True"):
        Budget(**{kind: True})


def table_of_milliseconds(planner: Planner) -> CostTable:
    """Latencies as a runtime might have them: not linear in the rank, not proportional to parameters."""
    layers = {
        layer.path: {
            r: (1 + i % 3) * (r / layer.dense_rank) ** 0.7 for r in (4, layer.dense_rank // 2, layer.dense_rank)
        }
        for i, layer in enumerate(planner.layers)
    }
    return CostTable("latency_ms", 2 * sum(max(costs.values()) for costs in layers.values()), layers)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"parameters": "5%", "macs": "5%"},
        {"speedup": 1.2, "max_error": 1e-3},
        {"speedup": 1.0},
        {"speedup": float("nan")},
        {"max_error": 0.0},
        {"max_error": float("inf")},
    ],
)
def test_a_budget_is_exactly_one_thing_that_can_be(given):
    with pytest.raises(InputError):
        Budget(**given)


def test_a_budget_may_be_a_count_or_a_share():
    assert Budget("12%").removed(1000) == Budget(parameters="-120").removed(1000) == 120
    assert Budget(macs="2G").removed(10e9) == 2e9
    assert Budget(speedup=1.25).removed(10.0) == pytest.approx(2.0)


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": (2, 4, 4), "use_linear_projection": True}])
def test_predicted_costs_are_counted_costs(calls, changes):
    """Every layer at another rank; attention products and every head count."""
    unet = tiny_unet(**changes)
    sites, _ = find_sites(unet)
    ranks = {layer.path: layer.candidates[i % len(layer.candidates)] for i, layer in enumerate(find_layers(sites, 4))}
    slim = skeleton(unet, ranks)
    assert parameter_costs(unet, sites).of(ranks) == count_parameters(slim)
    macs = mac_costs(unet, sites, calls[0])
    batch = batch_of(calls[0])
    assert macs.dense * batch == count_macs(unet, calls[0])
    assert macs.of(ranks) * batch == count_macs(slim, calls[0]) < count_macs(unet, calls[0])


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_budget_of_macs_is_met_and_counted(pipeline, compression, calls, planner, allocation):
    settings = PlanSettings(align=4, allocation=allocation)
    own = Planner(pipeline.unet, compression.statistics, settings, calls=calls[:1])
    own.factors = planner.factors
    plan = own.plan(Budget(macs="10%"))
    slim = slim_denoiser(pipeline.unet, compression.statistics, plan, planner.factors, fitting_calls=calls[:2])
    batch = batch_of(calls[0])
    dense, counted = count_macs(pipeline.unet, calls[0]) / batch, count_macs(slim, calls[0]) / batch
    assert plan.costs["macs"] == {"dense": dense, "slim": counted, "budget": dense - round(dense / 10)}
    assert 0.1 * dense <= round(dense - counted) + 1 and dense - counted <= 0.1 * dense * (1 + TOLERANCE) + 1
    assert slim.config["slim_plan"]["costs"] == plan.costs and slim.config["slim_plan"]["budget"] == {"macs": "10%"}


def test_each_budget_is_cheapest_in_its_own_unit(planner):
    """Plans for parameters, MACs and latency are different plans of the same knapsack."""
    planner.costs.latency = table_of_milliseconds(planner)
    plans = [planner.plan(b) for b in (Budget("8%"), Budget(macs="8%"), Budget(speedup=1.1))]
    assert len({tuple(p.ranks().values()) for p in plans}) == 3


@pytest.mark.parametrize("speedup", [1.03, 1.15])
def test_a_speedup_is_met_by_the_tables_own_prediction(planner, speedup):
    planner.costs.latency = table_of_milliseconds(planner)
    plan = planner.plan(Budget(speedup=speedup))
    costs = plan.costs["latency_ms"]
    assert costs["slim"] == pytest.approx(planner.costs.latency.of(plan.ranks()))
    assert costs["dense"] / costs["slim"] >= speedup * (1 - 1e-9)
    assert costs["budget"] == pytest.approx(costs["dense"] / speedup)


def test_more_than_can_go_is_refused_in_its_own_unit(planner):
    planner.costs.latency = table_of_milliseconds(planner)
    with pytest.raises(InputError, match=r"9x is .* ms, but at most"):
        planner.plan(Budget(speedup=9.0))
    with pytest.raises(InputError, match="MACs, but at most"):
        planner.plan(Budget(macs="95%"))


def test_more_than_can_go_is_refused_before_calibration(pipeline, planner):
    """Which would have complained first that there is no prompt."""
    table = table_of_milliseconds(planner)
    for budget in (Budget("70%"), Budget(speedup=9.0)):
        with pytest.raises(InputError, match="but at most") as early:
            compress(pipeline, [], budget, planning=PlanSettings(align=4), latency=table)
        planner.costs.latency = table
        with pytest.raises(InputError) as late:
            planner.plan(budget)
        assert str(early.value) == str(late.value)


def test_a_speedup_needs_the_models_own_table(pipeline, compression, calls):
    own = Planner(pipeline.unet, compression.statistics, PlanSettings(align=4), calls=calls[:1])
    with pytest.raises(InputError, match="measured table"):
        own.plan(Budget(speedup=1.1))
    own.costs.latency = CostTable("latency_ms", 10.0, {"elsewhere": {8: 1.0, 16: 2.0}})
    with pytest.raises(InputError, match="does not know"):
        own.plan(Budget(speedup=1.1))


@pytest.mark.parametrize("decades", [0, 16])
def test_the_knapsack_is_exact(decades):
    """Against every choice there is, also where errors span more decades than a solver's tolerances."""
    noise = np.random.default_rng(0)
    savings = [np.append(np.sort(noise.uniform(0, 10, 3))[::-1], 0.0) for _ in range(7)]
    errors = [
        np.append(np.sort(noise.uniform(0.1, 1, 3) * 10.0 ** -noise.uniform(0, decades, 3))[::-1], 0.0)
        for _ in range(7)
    ]
    for removed in (12.0, 20.0, 28.0):
        picks = choose(savings, errors, removed)

        def total(costs, chosen):
            return sum(c[i] for c, i in zip(costs, chosen, strict=True))

        inside = [
            c
            for c in itertools.product(range(4), repeat=7)
            if removed <= total(savings, c) <= removed * (1 + TOLERANCE)
        ]
        assert removed <= total(savings, picks)
        assert total(errors, picks) == pytest.approx(min(total(errors, c) for c in inside), rel=1e-3)


def test_where_no_choice_fits_the_window_it_begins_at_the_nearest_that_does():
    """Layers of a few sizes, as resnets are: against every choice there is."""
    noise = np.random.default_rng(0)
    fits = []
    for removed in (500.0, 1400.0, 2701.0, 5000.0, 9001.0):
        savings = [np.append(np.sort(noise.integers(1, 40, 3))[::-1] * 96.0, 0.0) for _ in range(5)]
        errors = [np.append(np.sort(noise.uniform(0.1, 1, 3))[::-1], 0.0) for _ in range(5)]
        totals = np.array([sum(choice) for choice in itertools.product(*savings)])
        costs = np.array([sum(choice) for choice in itertools.product(*errors)])
        nearest = totals[totals >= removed].min()
        assert _nearest(savings, removed) == nearest
        fits.append(nearest <= removed * (1 + TOLERANCE))
        start = removed if fits[-1] else nearest
        picks = choose(savings, errors, removed)
        inside = (totals >= start) & (totals <= start * (1 + TOLERANCE))
        assert sum(e[i] for e, i in zip(errors, picks, strict=True)) == pytest.approx(costs[inside].min())
    assert any(fits) and not all(fits)
    assert _nearest([np.array([0.5, 0.0])], 0.1) == 0.1  # not whole: left to the solver


def test_among_ties_more_macs_go(planner):
    """The second saving is a tie-breaker: it never costs more than the slack."""
    savings, errors = [np.array([4.0, 0.0])] * 2, [np.array([1.0, 0.0]), np.array([1.001, 0.0])]
    assert choose(savings, errors, 4.0) == [0, 1]
    assert choose(savings, errors, 4.0, [np.array([1.0, 0.0]), np.array([2.0, 0.0])]) == [1, 0]
    errors[1] = np.array([1.1, 0.0])
    assert choose(savings, errors, 4.0, [np.array([1.0, 0.0]), np.array([2.0, 0.0])]) == [0, 1]


def test_an_edited_plan_makes_no_claims_of_the_old_one(planner):
    plan = planner.plan(Budget(macs="5%"))
    assert plan.recount().costs == plan.costs
    edited = plan.model_copy(deep=True)
    site = next(s for s in edited.sites.values() if s.group == "feed_forward" and s.rank > 4)
    site.rank -= 4
    assert edited.recount().costs == {}


@pytest.fixture(scope="module")
def held(pipeline):
    return record_calls(pipeline, PROMPTS[2:], SAMPLING.model_copy(update={"seed": 77}))


def test_the_smallest_model_below_an_error(pipeline, planner, held):
    """It holds, and what is one step smaller does not."""
    planner.calls.held, held_error = held[:2], HeldError(pipeline.unet, held[:2])
    table = planner.costs.parameters
    step = most_removable(table, planner.layers) / STEPS

    def plan_of(steps: int):
        return planner.cut(table, steps * step, Budget("1%"))

    limits = [held_error.of(planner.slim(plan_of(steps))) for steps in (20, 100)]
    assert limits[0] < limits[1]
    bound = (limits[0] * limits[1]) ** 0.5
    plan = planner.plan(Budget(max_error=bound))
    slim = planner.slim(plan)
    assert held_error.of(slim) == pytest.approx(plan.noise_error) and plan.noise_error <= bound
    assert slim.config["slim_plan"]["noise_error"] == plan.noise_error
    smaller = plan_of(round((table.dense - plan.parameters["slim"]) / step) + 1)
    assert smaller.parameters["slim"] < plan.parameters["slim"]
    assert held_error.of(planner.slim(smaller)) > bound
    assert planner.plan(Budget(max_error=bound)) == plan


def test_the_smallest_model_there_is_if_the_error_allows_it(planner, held):
    planner.calls.held = held[:1]
    plan = planner.plan(Budget(max_error=1e6))
    ranks = plan.ranks()
    assert all(ranks[layer.path] == layer.candidates[0] for layer in planner.layers)


def test_an_error_that_nothing_keeps_is_refused_with_what_the_least_step_costs(planner, held):
    planner.calls.held = held[:1]
    with pytest.raises(InputError, match=r"1e-13 cannot be kept: the smallest step, [\d,]+ parameters"):
        planner.plan(Budget(max_error=1e-13))
    del planner.calls.held
    with pytest.raises(InputError, match="max_error is measured on recorded denoiser calls"):
        planner.plan(Budget(max_error=1e-3))


def test_a_budget_that_is_none_is_refused_when_it_is_written():
    for text in ("lots", "5 apples", ""):
        with pytest.raises(InputError, match=f"budget '{text}': write a count such as 100M or a share such as 25%"):
            Budget(text)
    with pytest.raises(InputError, match="a speedup is dense latency over slim latency, such as 1.35, not 'fast'"):
        Budget(speedup="fast")
    with pytest.raises(InputError, match="exactly one of parameters, macs, speedup, max_error; given: size"):
        Budget(size="5%")
    assert [kind.flag for kind in BUDGETS.values()] == ["--reduce", "--macs", "--speedup", "--max-error"]
