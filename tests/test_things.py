"""The second benchmark model: its files load, and its pictures show what their captions say."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import benchmarks
from benchmarks.things import evaluate, judge, models, world

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


def test_pictures_show_what_their_captions_say():
    """And not what others say: with a text encoder or UNet that was not loaded, neither would hold."""
    pipeline = StableDiffusionPipeline.from_pretrained(THINGS / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = world.sample_scenes(6, evaluate.SEED, held=True)
    pictures = pipeline(
        world.captions(scenes),
        num_inference_steps=12,
        guidance_scale=evaluate.GUIDANCE,
        latents=evaluate.noise_for(len(scenes), 0),
        output_type="pt",
    ).images
    reader = judge.load(THINGS / "judge.safetensors")
    right, others = (
        judge.attribute_hits(reader, 2 * pictures - 1, s)["concept"].float().mean() for s in (scenes, scenes.roll(1, 0))
    )
    assert right > 0.8 and others < 0.3


def test_what_training_saves_has_names_that_both_transformers_read(tmp_path):
    tokenizer = models.build_tokenizer(tmp_path / "tokenizer")
    encoder = models.build_text_encoder(tokenizer)
    models.save_pipeline(tmp_path / "model", models.build_unet(), models.build_vae(), encoder, tokenizer)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(loaded.text_encoder.state_dict()[name], tensor.half().float(), rtol=0, atol=0)
