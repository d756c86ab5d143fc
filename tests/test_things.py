"""The second benchmark model: its files load, and its pictures show what their captions say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import benchmarks
from benchmarks.things import evaluate, judge, models, run, world

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


def train_a_line(work: Path, samples: int, losses: list[float]) -> torch.nn.Linear:
    """A stage of 4 samples a step that fits one number; a loss that is given stands in for the true one."""
    torch.manual_seed(0)
    line, x = torch.nn.Linear(1, 1), torch.ones(4, 1)
    fakes = iter(losses)

    def loss_of(_step: int) -> torch.Tensor:
        return (line(x) - 3).square().mean() * next(fakes, 1.0)

    stage = run.Run(work, 1, samples, "cpu")
    run.optimise(stage, "unet", {"line": line}, loss_of, batch=4, rates={"line": 0.1}, decay=0.0)
    return line


def test_a_stage_trains_for_its_samples_and_goes_on_from_its_checkpoint(tmp_path):
    whole = train_a_line(tmp_path / "whole", 800, [])
    assert abs(whole(torch.ones(1)).item() - 3) < 0.05 and not whole.training
    first = train_a_line(tmp_path / "parts", 400, [])
    rows = json.loads((tmp_path / "parts" / "out" / "curve.json").read_text())["curve"]
    assert [row["step"] for row in rows] == [100] and "loss" in rows[0]
    again = train_a_line(tmp_path / "parts", 400, [100.0] * 100)  # no step is left that would see these
    torch.testing.assert_close(again.state_dict(), first.state_dict())


def test_a_loss_that_is_not_a_number_ends_a_stage_without_a_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="no checkpoint to go back to"):
        train_a_line(tmp_path, 800, [float("nan")])
    train_a_line(tmp_path / "kept", 4, [])
    line = train_a_line(tmp_path / "kept", 800, [float("nan")])
    assert torch.isfinite(line.weight).all()
