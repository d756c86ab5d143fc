"""The second benchmark model: its files load, and its evaluation is of scenes that it never saw."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import benchmarks
from benchmarks.things import world

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
