"""The second benchmark model: its files load, and its pictures show what their captions say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import benchmarks
from benchmarks.things import evaluate, judge, world

THINGS = Path(benchmarks.__file__).parent / "things"


def test_training_never_sees_a_held_out_combination():
    trained = world.sample_scenes(2000, 3, held=False)
    evaluated = world.sample_scenes(200, 3, held=True)
    assert not world.held_out(trained).any() and world.held_out(evaluated).all()


def test_the_files_are_small_and_half_precision():
    assert sum(file.stat().st_size for file in (THINGS / "model").rglob("*") if file.is_file()) < 40e6
    pipeline = StableDiffusionPipeline.from_pretrained(THINGS / "model", torch_dtype=torch.float16)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float16}
    assert 4e6 < sum(p.numel() for p in pipeline.unet.parameters()) < 12e6


@pytest.mark.parametrize("told", [True, False], ids=["captions of the pictures", "captions of others"])
def test_pictures_show_what_their_captions_say(told):
    pipeline = StableDiffusionPipeline.from_pretrained(THINGS / "model")
    pipeline.set_progress_bar_config(disable=True)
    scenes = world.sample_scenes(8, evaluate.SEED, held=True)
    captions = world.captions(scenes)
    pictures = pipeline(
        captions if told else captions[1:] + captions[:1],
        num_inference_steps=12,
        guidance_scale=evaluate.GUIDANCE,
        generator=[torch.Generator().manual_seed(i) for i in range(8)],
        output_type="pt",
    ).images
    hits = judge.attribute_hits(judge.load(THINGS / "judge.safetensors"), 2 * pictures - 1, scenes)
    accuracy = hits["concept"].float().mean()
    assert accuracy > 0.8 if told else accuracy < 0.3
