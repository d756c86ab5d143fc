"""Precision beside ranks: what int8 is measured to cost, one knapsack over both, and the plan that comes of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROMPTS, SAMPLING

from slimdiff import Budget, InputError, Plan, PlanSettings
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.int8 import count_layer_macs, input_ranges, product_layers, rounded
from slimdiff.denoising.projection import project_changes
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import HeldError
from slimdiff.planning import changes, precision
from slimdiff.planning.costs import CostTable, count_parameters
from slimdiff.planning.knapsack import TOLERANCE
from slimdiff.planning.planner import Planner
from slimdiff.planning.precision import NOTHING_TO_GAIN, SLOWER, TOO_DEAR, Unit, choose_both, choose_int8, measure_int8

IN_INT8 = PlanSettings(align=4, precision="int8")


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS[:2], SAMPLING)


@pytest.fixture(scope="module")
def planner(pipeline, compression, calls):
    recorded = Calls.of(calls[:2], fitting=calls[:2], held=calls[2:3])
    return Planner(pipeline.unet, compression.statistics, IN_INT8, calls=recorded)


def table_of_milliseconds(planner: Planner, gain: float = 0.3) -> CostTable:
    """Latencies in which int8 saves a share of every layer's, more of the first ones."""
    layers = {layer.path: {0: 0.0, layer.dense_rank: 1.0 + i % 3} for i, layer in enumerate(planner.layers)}
    int8 = {path: {0: 0.0, 64: gain * (1 + i % 2)} for i, path in enumerate(planner.int8_errors)}
    return CostTable("latency_ms", 4 * len(layers), layers, int8=int8)


def test_layers_of_one_row_a_sample_are_left_out(pipeline, calls):
    macs = count_layer_macs(pipeline.unet, calls[0])
    assert set(macs) < set(product_layers(pipeline.unet))
    assert not any("time_emb" in path for path in macs) and "conv_in" in macs
    weight = pipeline.unet.conv_in.weight
    assert macs["conv_in"] == calls[0].arguments["sample"][:, :1].numel() * weight.numel()


def test_rounding_is_undone_and_finer_steps_err_less(pipeline, calls, monkeypatch):
    unet, call = pipeline.unet, calls[0]
    before = predict(unet, call)
    ranges = input_ranges(unet, count_layer_macs(unet, call), [call])
    with rounded(unet, ranges):
        coarse = predict(unet, call)
    monkeypatch.setattr("slimdiff.denoising.int8.WEIGHT_STEPS", 64 * 64)
    monkeypatch.setattr("slimdiff.denoising.int8.ACTIVATION_STEPS", 127 * 64)
    with rounded(unet, ranges):
        fine = predict(unet, call)
    assert torch.equal(predict(unet, call), before)
    assert 0 < (fine - before).norm() < 0.1 * (coarse - before).norm() < 0.1 * before.norm()


def test_a_channel_of_zeros_has_no_steps_and_stays_zero():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4))
    torch.nn.init.zeros_(layer[0].weight[1:2])
    x = torch.randn(3, 8)
    with torch.no_grad(), rounded(layer, {"0": (-4.0, 4.0)}):
        weight, output = layer[0].weight.clone(), layer(x)
    assert torch.isfinite(output).all() and not weight[1].any() and weight[0].any()


def test_an_input_that_is_not_finite_is_named(pipeline, calls):
    arguments = calls[0].arguments
    bad = replace(calls[0], arguments={**arguments, "sample": arguments["sample"] * float("inf")})
    with pytest.raises(InputError, match=r"input of conv_in is not finite at t="):
        input_ranges(pipeline.unet, ["conv_in"], [bad])


def test_each_layer_is_measured_alone(pipeline, calls):
    errors, macs = measure_int8(pipeline.unet, calls[:2])
    assert errors.keys() == macs.keys() and all(error > 0 for error in errors.values())
    path = "conv_in"
    ends = input_ranges(pipeline.unet, [path], calls[:2])
    with rounded(pipeline.unet, ends):
        alone = [predict(pipeline.unet, call) for call in calls[:2]]
    dense = [predict(pipeline.unet, call) for call in calls[:2]]
    changed = sum(float((a - d).double().square().sum()) for a, d in zip(alone, dense, strict=True))
    assert errors[path] == pytest.approx(changed / sum(float(d.double().square().sum()) for d in dense), rel=1e-6)


def test_of_a_large_model_layers_are_measured_on_both_branches_and_ranged_on_all(pipeline, monkeypatch):
    """Of 16 calls of one guided image, every fourth is taken: their numbers are all even."""
    calls = record_calls(pipeline, PROMPTS[:1], SAMPLING.model_copy(update={"steps": 16, "batch": 1}))
    assert len(calls) == 16 and all(len(call.arguments["sample"]) == 2 for call in calls)
    taken, ranged = [], []

    def seen(denoiser, call, *_others, **_more):
        taken.append(call)
        return project_changes(denoiser, call, *_others, **_more)

    def ranges_of(denoiser, paths, some):
        ranged.extend(some)
        return input_ranges(denoiser, paths, some)

    monkeypatch.setattr(changes, "project_changes", seen)
    monkeypatch.setattr(precision, "input_ranges", ranges_of)
    monkeypatch.setattr(changes, "MOST_MACS", 1.0)
    measure_int8(pipeline.unet, calls)
    branches = []
    for one in taken:
        texts = next(c.arguments["encoder_hidden_states"] for c in calls if c.timestep == one.timestep)
        (text,) = one.arguments["encoder_hidden_states"]
        branches.append([torch.equal(text, branch) for branch in texts].index(True))
    assert branches == [0, 1, 0, 1]
    assert ranged == calls


def test_one_knapsack_is_as_good_as_trying_everything():
    units = [
        Unit("a", (1, 2, 4), np.array([5.0, 2.0, 0.0]), ("a.x", "a.y")),
        Unit("b", (2, 4), np.array([1.0, 0.0]), ("b.x",)),
        Unit("c", (1,), np.zeros(1), ("c",)),
    ]
    layers = {"a": {0: 0.0, 4: 8.0}, "b": {0: 0.0, 4: 4.0}}
    int8 = {"a.x": {0: 0.0, 4: 2.0}, "a.y": {0: 0.0, 4: 1.0}, "b.x": {0: 0.0, 4: 1.5}, "c": {1: 1.0}}
    table, errors = CostTable("latency_ms", 20.0, layers, int8=int8), {"a.x": 0.6, "a.y": 0.5, "b.x": 0.2, "c": 3.0}

    def worth(ranks, chosen):
        rank_error = sum(float(u.errors[u.ranks.index(ranks[u.path])]) for u in units if u.path in ranks)
        return table.dense - table.of(ranks, chosen), rank_error + sum(errors[path] for path in chosen)

    for removed in (1.0, 3.0, 5.5, 8.0):
        best = min(
            error
            for a, b in itertools.product((1, 2, 4), (2, 4))
            for count in range(5)
            for chosen in itertools.combinations(int8, count)
            for saved, error in [worth({"a": a, "b": b}, chosen)]
            if removed <= saved <= removed * (1 + TOLERANCE) or (saved == removed)
        )
        saved, error = worth(*choose_both(units, table, removed, errors))
        assert removed <= saved * (1 + 1e-9) and error <= best + 1e-9


def test_a_speedup_is_met_by_ranks_and_int8_together(planner):
    table = table_of_milliseconds(planner)
    planner.costs.latency = table
    plan = planner.plan(Budget(speedup=1.25))
    ranks, int8 = plan.ranks(), plan.int8()
    assert int8 and plan.costs["latency_ms"]["slim"] == pytest.approx(table.of(ranks, int8))
    assert table.dense / 1.25 * (1 - TOLERANCE) <= plan.costs["latency_ms"]["slim"] <= table.dense / 1.25 * (1 + 1e-6)
    by_ranks = Planner(
        planner.denoiser, planner.statistics, PlanSettings(align=4), calls=planner.calls, latency=table
    ).plan(Budget(speedup=1.25))

    def predicted(some: Plan) -> float:
        sites = sum(site.predicted_error or 0.0 for site in some.sites.values())
        return sites + sum(some.layers[path].noise_error or 0.0 for path in some.int8())

    assert predicted(plan) <= predicted(by_ranks) * (1 + 1e-6) and not by_ranks.layers


def test_every_layer_is_listed_with_what_kept_it(planner):
    plan = planner.plan(Budget("10%"))
    assert set(plan.layers) == set(product_layers(planner.denoiser))
    kept = {layer.reason for layer in plan.layers.values() if layer.precision == "own"}
    assert NOTHING_TO_GAIN in kept
    total = sum(plan.layers[path].noise_error for path in plan.int8())
    assert set(plan.int8()) == set(choose_int8(*planner._int8, 1e-3))
    assert 0 < total <= planner.settings.int8_error
    tight = Planner(
        planner.denoiser,
        planner.statistics,
        IN_INT8.model_copy(update={"int8_error": total / 2}),
        calls=planner.calls,
    ).plan(Budget("10%"))
    assert len(tight.int8()) < len(plan.int8()) and TOO_DEAR in {layer.reason for layer in tight.layers.values()}


def test_where_int8_is_slower_it_is_planned_without_and_said(planner, caplog):
    planner.costs.latency = table_of_milliseconds(planner, gain=-0.1)
    plan = planner.plan(Budget(speedup=1.1))
    assert not plan.int8() and "int8 makes no layer faster" in caplog.text
    assert SLOWER in {layer.reason for layer in plan.layers.values()}


def test_an_error_is_bounded_over_ranks_and_int8(planner, calls):
    plan = planner.plan(Budget(max_error=2e-2))
    assert plan.int8() and plan.costs["bytes"]["slim"] < plan.costs["bytes"]["dense"]
    slim = planner.slim(plan)
    sizes = {path: slim.get_submodule(path).weight.numel() for path in plan.int8()}
    assert plan.costs["bytes"]["slim"] == 4 * count_parameters(slim) - 3 * sum(sizes.values())
    with rounded(slim, input_ranges(slim, plan.int8(), planner.calls.sensitivity)):
        measured = HeldError(planner.denoiser, planner.calls.held).of(slim)
    assert plan.noise_error == pytest.approx(measured) and measured <= 2e-2


def test_what_was_measured_serves_another_budget_without_calls(planner, pipeline, tmp_path):
    planner.remember(planner.statistics)
    planner.statistics.save(tmp_path / "statistics.safetensors")
    stored = type(planner.statistics).load(tmp_path / "statistics.safetensors")
    again = Planner(pipeline.unet, stored, IN_INT8)
    assert again.int8_errors == planner.int8_errors
    assert again.plan(Budget("10%")).int8() == planner.plan(Budget("10%")).int8()


def test_settings_that_say_nothing_are_refused(planner, pipeline, compression):
    with pytest.raises(ValueError, match="give precision int8"):
        PlanSettings(int8_error=1e-4)
    with pytest.raises(InputError, match="what int8 costs each layer is measured"):
        fresh = type(compression.statistics)(**{**vars(compression.statistics), "int8_errors": {}})
        Planner(pipeline.unet, fresh, PlanSettings(align=4, precision="int8", allocation="local"))
    uniform = IN_INT8.model_copy(update={"allocation": "uniform"})
    other = Planner(pipeline.unet, planner.statistics, uniform, calls=planner.calls)
    other.costs.latency = table_of_milliseconds(planner)
    with pytest.raises(InputError, match="the uniform allocation knows none"):
        other.plan(Budget(speedup=1.1))
    planner.costs.latency = CostTable("latency_ms", 10.0, table_of_milliseconds(planner).layers)
    with pytest.raises(InputError, match="does not know int8"):
        planner.plan(Budget(speedup=1.1))
