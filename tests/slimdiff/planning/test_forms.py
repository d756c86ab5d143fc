"""Every option of the closed forms and of the allocation, on a real tiny pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PROMPTS, SAMPLING

from slimdiff import Budget, InputError, PlanSettings, make_plan, slim_denoiser
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.replay import Frontier
from slimdiff.denoising.samples import some_of
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Evidence
from slimdiff.planning.knapsack import softmax_weights
from slimdiff.planning.papers import block_influences
from slimdiff.settings import PAPERS, Forms
from slimdiff.slimming import compensation
from slimdiff.slimming.streams import Layer, Spot


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def statistics(compression):
    return compression.statistics


@pytest.fixture(scope="module")
def slimmed(pipeline, compression, calls):
    """A function from settings to (plan, slim model) at 20 % fewer parameters."""

    def make(**settings):
        planning = PlanSettings(align=4, **settings)
        plan = make_plan(pipeline.unet, compression.statistics, Budget("20%"), planning, calls=calls[:4])
        return plan, slim_denoiser(pipeline.unet, compression.statistics, plan, fitting_calls=calls[:4])

    return make


def error(dense, slim, calls) -> float:
    return noise_error(lambda c: predict(dense, c), lambda c: predict(slim, c), calls)["relative_mse"]


@pytest.mark.parametrize("allocation", ["local", "softmax"])
def test_other_allocations_meet_the_budget_too(pipeline, slimmed, calls, allocation):
    plan, slim = slimmed(allocation=allocation)
    removed = plan.parameters["dense"] - plan.parameters["slim"]
    asked = plan.parameters["dense"] - plan.parameters["budget"]
    assert asked <= removed <= 1.005 * asked
    assert error(pipeline.unet, slim, calls) > 0


def test_our_forms_beat_the_papers(pipeline, slimmed, calls):
    ours, papers = (slimmed(allocation="uniform", forms=forms)[1] for forms in (Forms(), PAPERS))
    assert error(pipeline.unet, ours, calls) < error(pipeline.unet, papers, calls)


def test_a_plan_carries_its_forms_to_where_it_is_applied(pipeline, slimmed, compression):
    plan, slim = slimmed(allocation="uniform", forms=PAPERS)
    again = type(plan).model_validate_json(plan.model_dump_json())
    assert again.forms == PAPERS
    other = slim_denoiser(pipeline.unet, compression.statistics, again)
    for name, tensor in slim.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name])


def test_raw_key_moments_are_centred_ones_and_those_of_the_means(pipeline, calls):
    """The parallel axis theorem, on what the hooks collect."""
    from slimdiff.calibration.calibrate import calibrate_on_calls

    site = next(s for s in find_sites(pipeline.unet)[0] if s.group == "query_key")
    key = pipeline.unet.get_submodule(site.path).to_k
    rows = []
    handle = key.register_forward_hook(lambda _m, _a, output: rows.append(output.detach().double().flatten(0, 1)))
    statistics = calibrate_on_calls(pipeline.unet, calls[:2])
    handle.remove()
    k = torch.cat(rows).reshape(-1, site.heads, site.dense_rank).transpose(0, 1)
    raw = k.mT @ k / k.shape[1]
    found = statistics.mean(f"{site.name}.key") + statistics.mean(f"{site.name}.key_mean")
    torch.testing.assert_close(found, raw, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("group", ["value_output", "feed_forward"])
def test_a_constant_column_keeps_the_mean_of_what_goes(pipeline, compression, group):
    """With the constant carried, the slim layer's mean output is the dense layer's."""
    statistics, forms = compression.statistics, Forms(constant=True)
    from slimdiff.slimming.slim import factorise

    site = next(s for s in find_sites(pipeline.unet)[0] if s.group == group)
    module = pipeline.unet.get_submodule(site.path)
    factor = factorise(pipeline.unet, statistics, [site], forms=forms)[site.name]
    rank = site.dense_rank // 4
    weights = GROUPS[group].slim(Evidence(module, site, statistics, forms), rank, factor)
    first = statistics.first(site.name)
    if group == "feed_forward":
        last, kept = module.net[2], factor.order[:rank].sort().values
        slim = weights["net.2.weight"] @ first[kept] + weights["net.2.bias"]
    else:
        last = module.to_out[0]
        received = torch.block_diag(*factor.left[..., :rank]).T @ first
        slim = weights["to_out.0.weight"] @ received + weights["to_out.0.bias"]
    dense = last.weight.double() @ first + last.bias.double()
    torch.testing.assert_close(slim, dense, atol=1e-8, rtol=1e-6)


def test_softmax_takes_most_from_the_least_influential():
    weights = softmax_weights([0.5, 0.1, 0.3], 0.1)
    assert weights[1] > weights[2] > weights[0] > 0
    assert sum(weights) == pytest.approx(3)
    assert softmax_weights([0.5, 0.1, 0.3], 1e6) == pytest.approx([1, 1, 1], rel=1e-5)


def test_a_block_that_does_nothing_has_no_influence(pipeline, calls):
    unet = copy.deepcopy(pipeline.unet)
    paths = [s.path for s in find_sites(unet)[0] if s.group == "feed_forward"]
    block = unet.get_submodule(paths[0].rpartition(".")[0])
    for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    found = block_influences(unet, paths, calls[:2])
    assert abs(found[0]) < 1e-6
    assert min(found[1:]) > 1e-4


def test_the_softmax_allocation_needs_calls(pipeline, compression):
    with pytest.raises(InputError, match="softmax allocation measures how much"):
        make_plan(pipeline.unet, compression.statistics, Budget("10%"), PlanSettings(allocation="softmax"))


@pytest.mark.parametrize("how", ["projections", "sequential"])
def test_compensation_lowers_the_error_where_it_was_solved(pipeline, slimmed, calls, how):
    local, mended = (slimmed(allocation="uniform", forms=Forms(compensate=name))[1] for name in ("none", how))
    assert error(pipeline.unet, mended, calls[:4]) < 0.98 * error(pipeline.unet, local, calls[:4])
    changed = {name for name, value in mended.state_dict().items() if not torch.equal(value, local.state_dict()[name])}
    projections = {name for name in changed if ".proj_out." in name}
    assert projections and (changed == projections) == (how == "projections")


def test_everything_solved_again_mends_the_stream_too(pipeline, statistics, calls):
    """On the calls that it is solved on, each layer more can only lower what the last one's sum errs."""
    groups = ("query_key", "value_output", "feed_forward", "resnet")

    def slimmed(how: str) -> torch.nn.Module:
        settings = PlanSettings(align=4, allocation="uniform", groups=groups, forms=Forms(compensate=how))
        plan = make_plan(pipeline.unet, statistics, Budget("25%"), settings, calls=calls[:4])
        return slim_denoiser(pipeline.unet, statistics, plan, fitting_calls=calls[:4])

    before, after = slimmed("projections"), slimmed("everything")
    assert error(pipeline.unet, after, calls[:4]) < 0.95 * error(pipeline.unet, before, calls[:4])
    local = slimmed("none").state_dict()
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, local[name])}
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
    assert {"conv2", "conv_shortcut", "proj_out", "0", "2"} == kinds  # to_out.0 and net.2


def test_what_lies_before_a_layer_may_be_held_or_computed_again(pipeline, slimmed, monkeypatch):
    held = slimmed(allocation="uniform", forms=Forms(compensate="everything"))[1]
    monkeypatch.setattr(compensation, "Frontier", lambda *found: Frontier(*found[:3], 0))
    again = slimmed(allocation="uniform", forms=Forms(compensate="everything"))[1]
    for name, value in held.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], atol=1e-5, rtol=1e-5)


def test_of_calls_that_memory_does_not_hold_a_few_samples_are_taken(pipeline, slimmed, calls, monkeypatch):
    whole = compensation.held_bytes(pipeline.unet, calls[0], ["up_blocks.2.attentions.0.proj_out"])
    monkeypatch.setattr(compensation, "HELD_BYTES", 4 * whole // 2)  # of four calls, half
    local, mended = (slimmed(allocation="uniform", forms=Forms(compensate=how))[1] for how in ("none", "everything"))
    assert error(pipeline.unet, mended, calls[:4]) < error(pipeline.unet, local, calls[:4])
    layers = (Layer("up_blocks.2.attentions.0.proj_out", stream=Spot("up_blocks.2.attentions.0")),)
    rows = compensation.dense_rows(pipeline.unet, calls[:4], layers)
    taken = [row[compensation.SAMPLES].tolist() for row in rows]
    assert taken == [[0, 2], [1, 3], [0, 2], [1, 3]]  # both branches of one image, another at each call
    part = some_of(calls[1], torch.tensor(taken[1]))
    torch.testing.assert_close(predict(pipeline.unet, part), predict(pipeline.unet, calls[1])[[1, 3]])


def test_replans_share_out_the_error_that_the_slim_model_makes(pipeline, statistics, calls):
    settings = PlanSettings(align=4, replans=1)
    plans = [
        make_plan(
            pipeline.unet,
            statistics,
            Budget("18%"),
            settings.model_copy(update={"replans": replans, "forms": Forms().local()}),
            calls=Calls.of(calls[:3], fitting=calls[:4]),
        )
        for replans in (0, 1)
    ]
    once, twice = (
        error(pipeline.unet, slim_denoiser(pipeline.unet, statistics, plan, fitting_calls=calls[:4]), calls[:3])
        for plan in plans
    )
    predicted = sum(site.predicted_error or 0 for site in plans[1].sites.values())
    assert twice <= 1.001 * once  # the better plan is taken
    assert 1 / 1.5 < predicted / twice < 1.5


def test_replans_are_refused_where_nothing_is_measured(pipeline, statistics, calls):
    settings = PlanSettings(allocation="uniform", replans=1)
    with pytest.raises(InputError, match="leave replans out"):
        make_plan(pipeline.unet, statistics, Budget("10%"), settings, calls=calls[:1])


def test_compensation_needs_calls(pipeline, compression):
    with pytest.raises(InputError, match="recorded denoiser calls"):
        slim_denoiser(pipeline.unet, compression.statistics, compression.plan)


def test_dense_outputs_beyond_the_memory_limit_are_of_evenly_spread_tokens(pipeline, calls, monkeypatch):
    layers = (Layer("down_blocks.1.attentions.0.proj_out"),)
    whole = compensation.dense_rows(pipeline.unet, calls[:2], layers)
    width = whole[0][layers[0].path].shape[1]
    monkeypatch.setattr(compensation, "OUTPUT_BYTES", 4 * width * 2 * 10)
    for all_rows, few in zip(whole, compensation.dense_rows(pipeline.unet, calls[:2], layers), strict=True):
        (rows,), (picked,) = all_rows.values(), few.values()
        assert len(picked) == 10 < len(rows)
        assert all((row == rows).all(1).any() for row in picked)
