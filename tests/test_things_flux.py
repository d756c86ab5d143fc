"""The small Flux of the second benchmark: its files load, its pictures show their captions, and it is slimmed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import benchmarks
from benchmarks.things import evaluate, flux_models, judge, models, world

THINGS = Path(benchmarks.__file__).parent / "things"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = FluxPipeline.from_pretrained(THINGS / "flux", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def scenes():
    return world.sample_scenes(4, evaluate.SEED, held=True)


def draw(pipeline, scenes, steps):
    """Pictures as diffusers makes them, in [-1, 1]."""
    made = pipeline(
        world.captions(scenes),
        negative_prompt=[""] * len(scenes),
        true_cfg_scale=evaluate.GUIDANCE,
        height=64,
        width=64,
        num_inference_steps=steps,
        max_sequence_length=models.MAX_TOKENS,
        latents=flux_models.pack(evaluate.noise_for(len(scenes), 0)),
        output_type="pt",
    ).images
    return 2 * made - 1


def test_the_files_are_small_and_half_precision():
    assert max(file.stat().st_size for file in (THINGS / "flux").rglob("*") if file.is_file()) < 15e6
    transformer = FluxPipeline.from_pretrained(THINGS / "flux", torch_dtype=torch.float16).transformer
    assert {p.dtype for p in transformer.parameters()} == {torch.float16}
    assert 2e6 < sum(p.numel() for p in transformer.parameters()) < 6e6


def test_pictures_show_what_their_captions_say_and_not_what_others_say(pipeline, scenes):
    pictures = draw(pipeline, scenes, 8)
    reader = judge.load(THINGS / "judge.safetensors")
    right, others = (
        judge.attribute_hits(reader, pictures, s)["concept"].float().mean() for s in (scenes, scenes.roll(1, 0))
    )
    assert right > 0.8 and others < 0.3


def test_the_evaluation_draws_as_the_pipeline_does(pipeline, scenes):
    paint = evaluate.painter(THINGS / "flux", "cpu", steps=2, guidance=evaluate.GUIDANCE)
    drawn = paint(scenes[:1], evaluate.noise_for(1, 0))
    torch.testing.assert_close(drawn, draw(pipeline, scenes[:1], 2), atol=2e-3, rtol=0)


def test_what_training_saves_loads_as_it_was(tmp_path):
    """And a new model's velocity is zero everywhere: its blocks begin as the identity."""
    tokenizer = flux_models.build_tokenizer(tmp_path / "tokenizer_2")
    table = models.CaptionTable(tokenizer)  # raises where table and tokenizer disagree
    assert table.empty.shape == (1, models.MAX_TOKENS)
    encoder, transformer = flux_models.build_text_encoder(tokenizer).eval(), flux_models.build_transformer().eval()
    flux_models.save_pipeline(tmp_path / "model", transformer, encoder, tmp_path / "tokenizer_2")
    loaded = FluxPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    words = ["a 3D dice top left, on a wooden background"]
    assert torch.equal(models.tokenize(loaded.tokenizer_2, words), models.tokenize(tokenizer, words))
    for part, own in ((loaded.transformer, transformer), (loaded.text_encoder_2, encoder)):
        for name, tensor in own.state_dict().items():
            torch.testing.assert_close(part.state_dict()[name], tensor.half().float(), rtol=0, atol=0)
    states, tokens = torch.randn(2, models.MAX_TOKENS, models.TEXT_WIDTH), torch.randn(2, 64, 16)
    text = {"encoder_hidden_states": states, "pooled_projections": states[:, 0]}
    where = flux_models.positions("cpu")
    assert not transformer(tokens, timestep=torch.tensor([0.2, 0.9]), **text, **where, return_dict=False)[0].any()


def test_no_block_is_dead(pipeline, scenes):
    """Passing any by changes the velocity: figures of slim models are not flattered by depth that does nothing."""
    said = world.captions(scenes[:2])
    states = pipeline.text_encoder_2(models.tokenize(pipeline.tokenizer_2, said))[0]
    pooled = pipeline.text_encoder(models.tokenize(pipeline.tokenizer, said)).pooler_output
    noise = evaluate.noise_for(2, 0)
    changes = flux_models.skipped_blocks(pipeline.transformer, noise, (states, pooled), noise.flip(0))
    assert len(changes) == 7 and min(changes.values()) > 1e-3
