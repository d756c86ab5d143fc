"""Perceptrons and values of today's transformers: what slimming takes for granted of the code between two layers."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from families import FAMILIES as SHARED
from families.video_transformers import VIDEO_TRANSFORMERS
from torch import nn

import slimdiff.models
from slimdiff import Budget, InputError, PlanSettings, make_plan, slim_denoiser
from slimdiff.algebra import elimination, low_rank
from slimdiff.calibration.calibrate import calibrate_on_calls
from slimdiff.denoising.trajectory import predict
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Evidence
from slimdiff.groups.values import FilledUp, LeavingOut, is_filled_up

FAMILIES = {**SHARED, **VIDEO_TRANSFORMERS}
NAMES = (
    *VIDEO_TRANSFORMERS,
    *("flux", "flux2", "sd3", "hunyuan", "lumina2", "sana", "auraflow", "qwen-image", "z-image", "cogview4"),
)


@pytest.fixture(scope="module", params=NAMES)
def calibrated(request):
    torch.manual_seed(0)
    family = FAMILIES[request.param]
    dense, calls = family.make(), family.calls()
    with torch.no_grad():  # norms are ones and biases zeros when a model is new: an exchange of dimensions hides there
        for parameter in dense.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return dense, calls, calibrate_on_calls(dense, calls)


@pytest.mark.parametrize("name", VIDEO_TRANSFORMERS)
def test_sites_of_video_transformers_and_the_reasons_of_the_rest(name):
    family = VIDEO_TRANSFORMERS[name]
    sites, left_dense = find_sites(family.make())
    assert Counter(site.group for site in sites) == family.sites
    assert Counter(row["reason"] for row in left_dense) == family.left_dense


def test_all_dimensions_in_another_basis_or_order_give_the_dense_model(calibrated):
    """Values are turned head by head, channels put in another order: what is between two layers must not see it."""
    dense, calls, statistics = calibrated
    for site in find_sites(dense)[0]:
        group, module = GROUPS[site.group], dense.get_submodule(site.path)
        evidence = Evidence(module, site, statistics)
        factor = group.factor(evidence)
        if site.group == "feed_forward":
            order = torch.randperm(site.dense_rank)
            weights = group.cut(module, site, order)
            assert all(weights[name].shape == module.get_parameter(name).shape for name in weights)
        else:
            weights = group.slim(evidence, site.dense_rank, factor)
        changed = copy.deepcopy(dense)
        for name, weight in weights.items():
            parameter = changed.get_submodule(site.path).get_parameter(name)
            parameter.data = weight.to(parameter)
        for call in calls:
            torch.testing.assert_close(predict(changed, call), predict(dense, call), atol=2e-4, rtol=1e-3)


def test_what_a_site_costs_is_what_its_rank_saves(calibrated):
    dense, _, _ = calibrated
    for site in find_sites(dense)[0]:
        smaller = copy.deepcopy(dense)
        rank = site.dense_rank // 2
        GROUPS[site.group].resize(smaller.get_submodule(site.path), site, rank)
        saved = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in smaller.parameters())
        assert saved == site.cost * (site.dense_rank - rank)


def test_an_emulated_site_is_the_slim_one(calibrated):
    """Sensitivities are measured on dense shapes."""
    dense, calls, statistics = calibrated
    sites = find_sites(dense)[0]
    plan = make_plan(dense, statistics, Budget("1%"), PlanSettings(allocation="uniform", align=4))
    plan = plan.model_copy(update={"forms": plan.forms.model_copy(update={"compensate": "none"})})
    for site in (sites[0], sites[len(sites) // 2], sites[-1]):
        rank = max(1, site.dense_rank // 2)
        for name, planned in plan.sites.items():
            planned.rank = rank if name == site.name else planned.dense_rank
        slim = slim_denoiser(dense, statistics, plan.recount())
        evidence = Evidence(dense.get_submodule(site.path), site, statistics, plan.forms)
        factor = GROUPS[site.group].factor(evidence)
        emulated = copy.deepcopy(dense)
        for name, weight in GROUPS[site.group].emulate(evidence, rank, factor).items():
            parameter = emulated.get_submodule(site.path).get_parameter(name)
            assert parameter.shape == weight.shape
            parameter.data = weight.to(parameter)
        torch.testing.assert_close(predict(emulated, calls[0]), predict(slim, calls[0]), atol=1e-4, rtol=1e-3)


def half_of_flux():
    torch.manual_seed(0)
    dense, calls = FAMILIES["flux"].make(), FAMILIES["flux"].calls()
    statistics = calibrate_on_calls(dense, calls)
    plan = make_plan(dense, statistics, Budget("1%"), PlanSettings(allocation="uniform", align=4))
    for site in plan.sites.values():
        site.rank = site.dense_rank // 2
    return slim_denoiser(dense, statistics, plan.recount(), fitting_calls=calls), calls


def test_values_are_filled_up_and_left_out_again():
    slim, calls = half_of_flux()
    attention = slim.transformer_blocks[0].attn
    kinds = {name: type(getattr(attention, name)) for name in ("to_v", "add_v_proj", "to_add_out")}
    assert kinds == {"to_v": FilledUp, "add_v_proj": FilledUp, "to_add_out": LeavingOut}
    values = attention.to_v(torch.randn(3, attention.to_v.in_features)).unflatten(-1, (2, 16))
    assert attention.to_v.weight.shape[0] == 16 and not values[..., 8:].any() and values[..., :8].all()
    assert type(attention.to_q) is nn.Linear and attention.to_q.out_features == 32
    assert torch.isfinite(predict(slim, calls[0])).all()


def test_slim_values_refuse_what_would_mix_them_up():
    slim, _ = half_of_flux()
    assert is_filled_up(slim)
    with pytest.raises(InputError, match="fewer values than queries: its projections cannot be fused"):
        slim.fuse_qkv_projections()
    with pytest.raises(InputError, match="values that are slimmed alone, which take no adapter"):
        slim.load_lora_adapter({})


def test_a_slim_class_of_any_model_is_made_when_it_is_asked_for():
    slim = slimdiff.models.SlimPriorTransformer
    assert slim is slimdiff.models.SlimPriorTransformer and slim.__module__ == "slimdiff.models"


def test_a_processor_that_nobody_read_keeps_values_dense():
    dense = FAMILIES["flux"].make()

    class Mine(type(dense.transformer_blocks[0].attn.processor)):
        pass

    dense.transformer_blocks[0].attn.set_processor(Mine())
    sites, left_dense = find_sites(dense)
    assert not any(site.group == "values" for site in sites)
    assert "transformer_blocks.0.attn" in {row["site"] for row in left_dense}


def test_the_shared_basis_of_one_path_is_that_path_s_own():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 40, 6, dtype=torch.float64), torch.randn(2, 6, 9, dtype=torch.float64)
    moments = x.mT @ x / 40
    own = low_rank.value_output(moments, weight.mT.transpose(0, 1).flatten(1))
    shared = low_rank.shared_values([(moments, weight, 3.0)])
    torch.testing.assert_close(shared.tail, own.tail, atol=1e-9, rtol=1e-9)
    for rank in (1, 3, 5):
        spans = [b.left[..., :rank] @ b.left[..., :rank].mT for b in (own, shared)]
        torch.testing.assert_close(*spans, atol=1e-6, rtol=1e-6)


def test_the_error_beside_inputs_that_stay_is_that_of_least_squares():
    """`without` and an elimination order predict the error of solving for all that is kept."""
    torch.manual_seed(0)
    x, down = torch.randn(400, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64), torch.randn(5, 12)
    down = down.double()
    moment = x.T @ x / 400
    left, share = elimination.without(moment, down, 4)
    order = elimination.elimination_order(left, down[:, 4:])
    for rank in (2, 5):
        kept = torch.cat([torch.arange(4), 4 + order.order[:rank]])
        solution = torch.linalg.lstsq(x[:, kept], x @ down.T).solution
        error = (x[:, kept] @ solution - x @ down.T).square().sum() / (x @ down.T).square().sum()
        assert float(order.tail[rank] * share) == pytest.approx(float(error), rel=1e-3)
