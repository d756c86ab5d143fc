"""What leaving a block out does to the noise prediction."""

from __future__ import annotations

import torch
from conftest import PROMPTS, SAMPLING

from benchmarks.depth import depths, left_out, measure
from slimdiff.denoising.trajectory import predict, record_calls


def test_every_block_left_out_is_felt_and_comes_back(pipeline):
    unet = pipeline.unet
    calls = record_calls(pipeline, PROMPTS[:1], SAMPLING)[:2]
    before = predict(unet, calls[0])
    errors = measure(unet, calls)
    assert list(errors) == depths(unet) and any(path.endswith(".attn2") for path in errors)
    assert all(0 < error < 10 for error in errors.values())
    assert torch.equal(predict(unet, calls[0]), before)


def test_a_block_left_out_hands_on_what_it_was_given(pipeline):
    path = depths(pipeline.unet)[0]
    block, x = pipeline.unet.get_submodule(path), torch.randn(1, 4, 8)
    with left_out(block):
        assert torch.equal(block(x, encoder_hidden_states=None), x)
    with left_out(block.attn1):
        assert not block.attn1(x).any()
