"""The embedded model is what its card says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.embedded.card import EVALUATION, transformer_parameters
from slimdiff import embedded
from slimdiff.denoising.trajectory import sample_images
from slimdiff.embedded import evaluator, scenes
from slimdiff.loading.pipelines import load_pipeline


@pytest.fixture(scope="module")
def demo():
    return load_pipeline("demo")


def test_it_is_stable_diffusion(demo):
    assert type(demo) is StableDiffusionPipeline
    parts = (demo.unet, demo.vae, demo.text_encoder, demo.tokenizer)
    for part, kind in zip(parts, (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer), strict=True):
        assert type(part) is kind
    assert transformer_parameters(demo.unet) >= 0.4 * sum(p.numel() for p in demo.unet.parameters())


def test_it_is_small_and_holds_no_pickle():
    files = [p for p in Path(embedded.__file__).parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") <= 24e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_captions_name_every_attribute_of_what_is_drawn():
    told = scenes.sample_scenes(50, 3, held_out=True)
    assert len({s.caption() for s in told}) > 45
    for scene in told:
        assert all(o.phrase() in scene.caption() for o in scene.objects)
    assert torch.equal(scenes.render(told, 1), scenes.render(told, 1))


def test_held_out_scenes_never_appear_in_training():
    def key(scene):
        return scene.background, frozenset(scene.objects)

    training = {key(s) for s in scenes.sample_scenes(3000, 20261121, held_out=False)}
    assert not training & {key(s) for s in scenes.sample_scenes(500, 7, held_out=True)}


def test_evaluator_reads_rendered_scenes():
    told = scenes.sample_scenes(400, 99, held_out=True)
    hits = evaluator.attribute_hits(evaluator.load(), scenes.render(told, 5), told)
    assert min(evaluator.caption_accuracy(hits).values()) >= 0.98


def test_evaluator_is_not_fooled():
    """Pictures of other scenes must score badly, or caption accuracy would mean nothing."""
    told, drawn = (scenes.sample_scenes(200, s, held_out=True) for s in (1, 2))
    hits = evaluator.attribute_hits(evaluator.load(), scenes.render(drawn, 5), told)
    accuracy = evaluator.caption_accuracy(hits)
    assert accuracy["shape"] < 0.3 and accuracy["colour"] < 0.3 and accuracy["all"] < 0.5


def test_frechet_distance_orders_sets():
    judge = evaluator.load()
    first, again = (scenes.render(scenes.sample_scenes(300, s, held_out=False), s) for s in (1, 2))
    blurred = torch.nn.functional.avg_pool2d(again, 5, 1, 2)
    near, far = (evaluator.frechet_distance(judge, x, first) for x in (again, blurred))
    assert evaluator.frechet_distance(judge, first, first) == pytest.approx(0, abs=1e-3)
    assert near < 0.5 * far


def test_it_draws_what_it_is_told(demo):
    """The card's 500 captions take minutes; 40 tell 90 % from a broken model."""
    told = scenes.sample_scenes(40, 21, held_out=True)
    images = sample_images(demo, [s.caption() for s in told], EVALUATION)
    hits = evaluator.attribute_hits(evaluator.load(), evaluator.to_tensor(images), told)
    assert evaluator.caption_accuracy(hits)["all"] > 0.85
