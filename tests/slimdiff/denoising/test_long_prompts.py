"""Prompts longer than a text encoder takes: whole, or cut with a word, and no image's by its neighbours'."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROMPTS, SAMPLING
from every_pipeline.components import t5_tokenizer

from slimdiff.denoising.long_prompts import warn_of_cuts
from slimdiff.denoising.tasks import make_inputs
from slimdiff.denoising.trajectory import record_calls, sample_images
from slimdiff.prompts.material import Material
from slimdiff.prompts.selection import embed

LONG = "a large red circle top left, on a gray background, " * 5
"""The tokenizer takes 40 tokens."""
WHOLE = SAMPLING.model_copy(update={"whole_prompts": True, "steps": 2, "batch": 3})


@pytest.mark.parametrize("negative", [{}, {"negative_prompt": "blue"}])
def test_an_image_does_not_depend_on_the_length_of_its_neighbours_prompts(pipeline, negative):
    sampling = WHOLE.model_copy(update={"arguments": negative})
    together = sample_images(pipeline, ["a star", LONG, "a ring"], sampling)
    for number, prompt in ((0, "a star"), (2, "a ring"), (1, LONG)):
        alone = sample_images(pipeline, [prompt], sampling.model_copy(update={"seed": sampling.seed + number}))
        assert np.abs(np.int16(together[number]) - np.int16(alone[0])).max() <= 1
    shapes = {tuple(c.arguments["encoder_hidden_states"].shape[:2]) for c in record_calls(pipeline, [LONG, "a"], WHOLE)}
    assert len(shapes) == 2 and {batch for batch, _ in shapes} == {2}


def test_what_is_cut_is_said_with_how_to_have_it_whole(pipeline, caplog):
    material = Material(prompts=["a star", LONG])
    with caplog.at_level(logging.WARNING, "slimdiff"):
        make_inputs(pipeline, material, SAMPLING)
    assert caplog.messages == [
        "of 2 prompts StableDiffusionPipeline cuts 1 by its tokenizer after 40 tokens: shorten them, or encode them in "
        "chunks (--whole-prompts; in a recipe, whole_prompts of a sampling)"
    ]
    caplog.clear()
    make_inputs(pipeline, material, WHOLE)
    make_inputs(pipeline, Material(prompts=["a star"]), SAMPLING)
    assert not caplog.messages
    skipping = WHOLE.model_copy(update={"arguments": {"clip_skip": 1}})  # diffusers skips a layer, and cuts
    make_inputs(pipeline, material, skipping)
    assert "cuts 1 by its tokenizer after 40 tokens: shorten them" in caplog.messages[0]


def test_a_negative_prompt_counts_too(pipeline, caplog):
    make_inputs(
        pipeline,
        Material(prompts=PROMPTS[:1] * 2),
        SAMPLING.model_copy(update={"arguments": {"negative_prompt": LONG}}),
    )
    assert "of 2 prompts StableDiffusionPipeline cuts 2" in caplog.messages[0]


def test_t5_is_cut_where_the_pipeline_says(caplog):
    class Pipeline(SimpleNamespace):
        def __call__(self, prompt, max_sequence_length=8):
            """What it takes is all that counts."""

    class Pixels(SimpleNamespace):
        def __call__(self, prompt):
            """As DeepFloyd's."""

    prompts = ["a", "a red barn in the snow", "red " * 40]
    warn_of_cuts(Pipeline(tokenizer=t5_tokenizer()), prompts, SAMPLING)
    warn_of_cuts(Pixels(tokenizer=t5_tokenizer(), unet=object()), prompts, SAMPLING)
    wide = SAMPLING.model_copy(update={"arguments": {"max_sequence_length": 300}})
    warn_of_cuts(Pipeline(tokenizer=t5_tokenizer()), prompts, wide)
    assert caplog.messages == [
        "of 3 prompts Pipeline cuts 2 by its tokenizer after 8 tokens: shorten them, or say how many it takes "
        "(--argument max_sequence_length=N)",
        "of 3 prompts Pixels cuts 1 by its tokenizer after 77 tokens: shorten them",
    ]


def test_prompts_are_selected_by_what_encoders_read_and_that_is_said(pipeline, caplog):
    embed(pipeline, ["a star", LONG])
    assert caplog.messages == ["1 of 2 prompts are judged by their first 40 tokens"]
