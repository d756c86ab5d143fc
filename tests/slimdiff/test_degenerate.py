"""Degenerate statistics, and things that do not belong together: a sound slim model, or one line that says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import PROMPTS, SAMPLING, tiny_unet
from diffusers.models.attention_processor import Attention
from torch import nn

from slimdiff import Budget, InputError, PlanSettings, make_plan, slim_denoiser
from slimdiff.calibration.calibrate import calibrate_on_calls
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.groups import find_sites
from slimdiff.plan import Plan, site_plan


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS[:2], SAMPLING.model_copy(update={"steps": 2}))


@pytest.fixture
def unet(pipeline):
    """A copy that a test may spoil."""
    return copy.deepcopy(pipeline.unet)


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
CROSS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
FEED_FORWARD = "down_blocks.0.attentions.0.transformer_blocks.0.ff"  # 128 channels, more tokens than that
DEAD = 24


def dead_channels(unet: nn.Module) -> None:
    up = unet.get_submodule(FEED_FORWARD).net[0].proj
    up.weight.data[:DEAD] = 0  # the value rows come first
    up.bias.data[:DEAD] = 0


def constant_channels(unet: nn.Module) -> None:
    up = unet.get_submodule(FEED_FORWARD).net[0].proj
    gates = slice(up.out_features // 2, up.out_features // 2 + DEAD)
    for rows, value in ((slice(DEAD), 0.7), (gates, 2.0)):
        up.weight.data[rows] = 0
        up.bias.data[rows] = value


def copied_channels(unet: nn.Module) -> None:
    up = unet.get_submodule(FEED_FORWARD).net[0].proj
    for start in (0, up.out_features // 2):
        up.weight.data[start : start + DEAD] = up.weight.data[start + DEAD : start + 2 * DEAD].clone()
        up.bias.data[start : start + DEAD] = up.bias.data[start + DEAD : start + 2 * DEAD].clone()


def nothing_reaches_the_down_projection(unet: nn.Module) -> None:
    up = unet.get_submodule(FEED_FORWARD).net[0].proj
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)


def a_dead_head(unet: nn.Module) -> None:
    attention = unet.get_submodule(ATTENTION)
    for linear in (attention.to_q, attention.to_v):
        linear.weight.data[:32] = 0


def attention_of_nothing(unet: nn.Module) -> None:
    for name in ("to_q", "to_k", "to_v"):
        nn.init.zeros_(unet.get_submodule(f"{ATTENTION}.{name}").weight)


def silent_outputs(unet: nn.Module) -> None:
    nn.init.zeros_(unet.get_submodule(f"{ATTENTION}.to_out.0").weight)
    nn.init.zeros_(unet.get_submodule(f"{FEED_FORWARD}.net.2").weight)


def equal_keys(unet: nn.Module) -> None:
    """Centred, they are nothing at all."""
    nn.init.zeros_(unet.get_submodule(f"{CROSS}.to_k").weight)


SPOILT = (
    dead_channels,
    constant_channels,
    copied_channels,
    nothing_reaches_the_down_projection,
    a_dead_head,
    attention_of_nothing,
    silent_outputs,
    equal_keys,
)


def slimmed(unet: nn.Module, ranks: dict[str, int], calls: list) -> nn.Module:
    """The slim model that keeps these ranks by module path; what is not named stays dense."""
    statistics = calibrate_on_calls(unet, calls)
    sites = {s.name: site_plan(s, ranks.get(s.path, s.dense_rank)) for s in find_sites(unet)[0]}
    total = sum(p.numel() for p in unet.parameters())
    plan = Plan(
        model_class=type(unet).__name__,
        model_hash=statistics.model_hash,
        allocation="by hand",
        align=1,
        parameters={"dense": total, "slim": total},
        sites=sites,
    )
    return slim_denoiser(unet, statistics, plan)


def error(dense: nn.Module, slim: nn.Module, calls: list) -> float:
    return noise_error(lambda c: predict(dense, c), lambda c: predict(slim, c), calls)["relative_mse"]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_model_is_planned_and_slimmed_like_any_other(unet, calls, spoil: Callable):
    spoil(unet)
    statistics = calibrate_on_calls(unet, calls)
    plan = make_plan(unet, statistics, Budget("10%"), PlanSettings(align=4), calls=calls[:1])
    slim = slim_denoiser(unet, statistics, plan, fitting_calls=calls)
    assert all(torch.isfinite(p).all() for p in slim.parameters())
    assert error(unet, slim, calls) < 0.05


@pytest.mark.parametrize("spoil", [dead_channels, constant_channels, copied_channels])
def test_channels_that_carry_nothing_of_their_own_go_for_nothing(unet, calls, spoil):
    spoil(unet)
    channels = unet.get_submodule(FEED_FORWARD).net[2].in_features
    spare = DEAD if spoil is not constant_channels else DEAD - 1  # one constant does the work of all
    assert error(unet, slimmed(unet, {FEED_FORWARD: channels - spare}, calls), calls) < 1e-9
    assert error(unet, slimmed(unet, {FEED_FORWARD: channels - 4 * DEAD}, calls), calls) > 1e-9


@pytest.mark.parametrize("spoil", [attention_of_nothing, nothing_reaches_the_down_projection])
def test_a_module_that_does_nothing_may_go_almost_wholly(unet, calls, spoil):
    spoil(unet)
    path = ATTENTION if spoil is attention_of_nothing else FEED_FORWARD
    assert error(unet, slimmed(unet, {path: 1}, calls), calls) < 1e-9


def test_fewer_tokens_than_dimensions(unet, calls):
    """A covariance of rank one or two: one image, and a text of equal tokens."""
    few = copy.deepcopy(calls[:1])
    arguments = few[0].arguments
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :1].expand(-1, 8, -1).contiguous()
    half = {s.path: s.dense_rank // 2 for s in find_sites(unet)[0] if "attn2" in s.path}
    assert error(unet, slimmed(unet, half, few), few) < 1e-9


def test_a_half_precision_model_that_overflows_is_told_so(unet, calls):
    up = unet.get_submodule(FEED_FORWARD).net[0].proj
    up.weight.data *= 3e4
    unet.half()
    with pytest.raises(InputError, match=f"{FEED_FORWARD}.* not finite: the model overflows; calibrate it in float32"):
        calibrate_on_calls(unet, calls[:1])


def test_a_prediction_that_overflows_is_told_so(unet, calls):
    unet.conv_out.weight.data *= 1e6
    unet.half()
    statistics = calibrate_on_calls(unet, calls[:1])
    with pytest.raises(InputError, match="not finite"):
        make_plan(unet, statistics, Budget("5%"), PlanSettings(align=4), calls=calls[:1])


def test_heads_that_do_not_divide_the_inner_dimensions_stay_dense():
    model = nn.ModuleDict({"odd": Attention(32, out_dim=35, dim_head=16), "even": Attention(32, heads=2, dim_head=16)})
    sites, left_dense = find_sites(model)
    assert {s.path for s in sites} == {"even"}
    assert (
        left_dense[0]["site"] == "odd" and "35 inner dimensions do not divide into 2 heads" in left_dense[0]["reason"]
    )


def test_a_head_dimension_that_the_alignment_does_not_divide(calls):
    unet = tiny_unet(attention_head_dim=(1, 4, 4), block_out_channels=(32, 80, 80))  # heads of 20
    statistics = calibrate_on_calls(unet, calls)
    plan = make_plan(unet, statistics, Budget("5%"), PlanSettings(align=8), calls=calls[:1])
    assert all(s.rank % 8 == 0 or s.rank == s.dense_rank for s in plan.sites.values())
    assert error(unet, slim_denoiser(unet, statistics, plan, fitting_calls=calls), calls) < 0.05


def test_a_plan_for_other_weights_is_refused(unet, compression):
    unet.conv_in.weight.data *= 1.01
    call = record_calls(compression.pipeline, PROMPTS[:1], SAMPLING)[:1]
    with pytest.raises(InputError, match="this plan was made for another model"):
        slim_denoiser(unet, calibrate_on_calls(unet, call), compression.plan)


def test_a_plan_for_another_architecture_is_refused(compression, calls):
    """Its hash says so already; a plan whose hash was edited, too, is found out by its sites."""
    other = tiny_unet(block_out_channels=(32, 96, 96), attention_head_dim=(1, 2, 2), norm_num_groups=8)
    statistics = calibrate_on_calls(other, calls[:1])
    with pytest.raises(InputError, match="another model"):
        slim_denoiser(other, statistics, compression.plan)
    lying = compression.plan.model_copy(update={"model_hash": statistics.model_hash})
    with pytest.raises(InputError, match="another model's"):
        slim_denoiser(other, statistics, lying)


def test_statistics_of_another_architecture_are_refused(compression, calls):
    other = tiny_unet(block_out_channels=(32, 96, 96), attention_head_dim=(1, 2, 2), norm_num_groups=8)
    with pytest.raises(InputError, match="taken on another model"):
        make_plan(other, compression.statistics, Budget("5%"), PlanSettings(align=4), calls=calls[:1])
