"""What the caller did to the denoiser: carried over to the slim one, or refused in one line before the work."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from diffusers.hooks import apply_group_offloading
from families.family import SAMPLING, TWO_LEVELS
from torch import nn
from torch.nn.utils import parametrizations, prune

from slimdiff import Budget, CalibrationSettings, Compressor, InputError, PlanSettings, calibrate, compress

SETTINGS = CalibrationSettings(samples=1, sampling=SAMPLING)
UNIFORM = PlanSettings(allocation="uniform", align=4, fitting_calls=2)
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def small():
    return tiny_pipeline(**TWO_LEVELS)


def slimmed(pipeline):
    return compress(pipeline, PROMPTS[:2], Budget("5%"), calibration=SETTINGS, planning=UNIFORM).pipeline.unet


@pytest.fixture(scope="module")
def usual():
    return slimmed(small()).state_dict()


def test_settings_of_the_module_go_with_it_and_stay_where_they_were(usual):
    pipeline = small()
    unet, seen = pipeline.unet, []
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipeline.enable_attention_slicing(1)
    unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, dim=1)
    unet.enable_gradient_checkpointing()
    unet.to(memory_format=torch.channels_last).train().conv_in.requires_grad_(False)
    unet.get_submodule(LAYER).register_forward_hook(lambda *_: seen.append(1))
    before = {path: copy.copy(vars(part)) for path, part in unet.named_modules()}
    slim = slimmed(pipeline)
    assert all(vars(part).keys() == before[path].keys() for path, part in unet.named_modules())
    assert unet.training and len(unet.get_submodule(LAYER)._forward_hooks) == 1
    assert (slim.up_blocks[0].s1, slim.up_blocks[0].b2) == (0.9, 1.4)
    assert type(slim.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__name__ == "SlicedAttnProcessor"
    assert slim.mid_block.attentions[0].transformer_blocks[0]._chunk_size == 2
    assert slim.is_gradient_checkpointing and slim.training and slim.get_submodule(LAYER).training
    assert slim.conv_in.weight.requires_grad is False and slim.conv_out.weight.requires_grad is True
    assert slim.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    calls = len(seen)
    call = {"sample": torch.zeros(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.zeros(1, 4, 32)}
    slim(**call)
    assert len(seen) == calls + 1
    assert {n: t.shape for n, t in slim.state_dict().items()} == {n: t.shape for n, t in usual.items()}


@pytest.mark.parametrize("wrap", ["compile", "OptimizedModule", "DataParallel"])
def test_the_plain_module_under_a_wrapper_is_slimmed(wrap, usual):
    def broken(*_args, **_kwargs):
        raise AssertionError("the compiled module was run")

    pipeline = small()
    if wrap == "compile":
        pipeline.unet.compile(backend=broken)
    elif wrap == "OptimizedModule":
        pipeline.unet = torch.compile(pipeline.unet, backend=broken)
    else:
        pipeline.unet = nn.DataParallel(pipeline.unet)
    outside = pipeline.unet
    slim = slimmed(pipeline)
    assert pipeline.unet is outside and (wrap != "compile" or outside._compiled_call_impl is not None)
    assert type(slim).__name__ == "SlimUNet2DConditionModel" and slim._compiled_call_impl is None
    assert slim.state_dict().keys() == usual.keys() and all(
        torch.equal(t, usual[n]) for n, t in slim.state_dict().items()
    )


def test_projections_that_were_fused_and_are_no_longer_do_no_harm(usual):
    pipeline = small()
    with torch.no_grad():
        pipeline.unet.fuse_qkv_projections()
    pipeline.unet.unfuse_qkv_projections()
    found = slimmed(pipeline).state_dict()
    assert found.keys() == usual.keys() and all(torch.equal(t, usual[n]) for n, t in found.items())


def fused(unet):
    with torch.no_grad():
        unet.fuse_qkv_projections()


def offloaded(unet):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(unet, ModelHook())


def float8(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def grouped(unet):
    apply_group_offloading(unet, torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1)


def replaced(unet):
    unet.mid_block.forward = unet.mid_block.forward


def more(unet):
    unet.mid_block.adapter = nn.Linear(2, 2)


STATES = {
    "fused": (fused, r"unfuse_qkv_projections\(\) first"),
    "offloaded": (offloaded, r"pipe\.remove_all_hooks\(\) first"),
    "layerwise casting": (float8, "hook layerwise_casting is on it"),
    "group offload": (grouped, "hook group_offloading is on it"),
    "float8 weights": (lambda unet: unet.to(torch.float8_e4m3fn), "weights are float8_e4m3fn: load it in float32"),
    "meta": (lambda unet: unet.to("meta"), "device meta"),
    "pruned": (
        lambda unet: prune.l1_unstructured(unet.get_submodule(LAYER), "weight", 0.5),
        "L1Unstructured recomputes",
    ),
    "parametrized": (lambda unet: parametrizations.weight_norm(unet.get_submodule(LAYER)), "remove_parametrizations"),
    "spectral norm": (lambda unet: nn.utils.spectral_norm(unet.get_submodule(LAYER)), "SpectralNorm recomputes"),
    "another forward": (replaced, "forward of mid_block was replaced"),
    "further weights": (more, r"mid_block\.adapter\.weight is not what its configuration says"),
}


@pytest.mark.parametrize("name", STATES)
def test_what_cannot_be_carried_over_is_refused_in_one_line_at_every_door(name):
    pipeline = small()
    change, message = STATES[name]
    change(pipeline.unet)
    for door in (
        lambda: compress(pipeline, PROMPTS, Budget("5%"), calibration=SETTINGS),
        lambda: Compressor(pipeline, PROMPTS, SETTINGS),
        lambda: calibrate(pipeline, PROMPTS, SETTINGS),
    ):
        with pytest.raises(InputError, match=message) as caught:
            door()
        assert "\n" not in str(caught.value)
