"""What leaving a block out does to the noise prediction, its mean kept or not."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS, SAMPLING
from families.transformers import flux, flux_calls

from benchmarks.depth import Depth, blocks, depths, left_out
from slimdiff.denoising.trajectory import predict, record_calls


def test_every_block_left_out_is_felt_and_comes_back(pipeline):
    unet = pipeline.unet
    calls = record_calls(pipeline, PROMPTS[:1], SAMPLING)[:2]
    before = predict(unet, calls[0])
    errors = Depth(unet, calls, calls).alone(mean=False)
    assert list(errors) == depths(unet) and any(path.endswith(".attn2") for path in errors)
    assert all(0 < error < 10 for error in errors.values())
    assert torch.equal(predict(unet, calls[0]), before)


def test_a_block_left_out_hands_on_what_it_receives_and_its_mean(pipeline):
    calls = record_calls(pipeline, PROMPTS[:1], SAMPLING)[:1]
    changes = Depth(pipeline.unet, calls, calls).changes
    path = blocks(pipeline.unet)[0]
    block, x = pipeline.unet.get_submodule(path), torch.randn(1, 4, len(changes[path][0].mean))
    with left_out(block, changes[path]):
        assert torch.equal(block(x, encoder_hidden_states=None), x + changes[path][0].mean)
    with left_out(block, changes[path], mean=False):
        assert torch.equal(block(x, encoder_hidden_states=None), x)
    with left_out(block.attn1, changes[f"{path}.attn1"], mean=False):
        assert not block.attn1(x).any()


def test_a_block_that_adds_a_constant_to_each_stream_goes_without_an_error():
    """Then the mean is all that it adds: one of the text's tokens, another of the image's."""
    model, calls = flux(), flux_calls()
    for path in blocks(model):
        block = model.get_submodule(path)
        for name, parameter in block.named_parameters():
            if name.endswith("weight") and name.startswith(("norm", "proj_out", "attn.to_", "ff")):
                torch.nn.init.zeros_(parameter)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    depth = Depth(model, calls, calls)
    assert len(blocks(model)) >= 2
    for path in blocks(model):
        assert depth.error([path]) == pytest.approx(0, abs=1e-9) and depth.error([path], mean=False) > 1e-4


def test_blocks_go_in_the_order_of_what_is_felt_least():
    model, calls = flux(), flux_calls()
    depth = Depth(model, calls, calls)
    first, second = depth.least(2, blocks(model))
    assert depth.error([first]) == min(depth.error([path]) for path in blocks(model))
    assert second != first
