"""Checkpoints whose parts are of several models are refused before anything is made with them."""

from __future__ import annotations

import pytest
from command_line import refused
from conftest import tiny_pipeline, tiny_unet
from families import FAMILIES
from families.images import xl

from slimdiff import InputError, compress, load_pipeline
from slimdiff.denoising.fit import check_fit

CASES = {
    "text encoder": (lambda: tiny_pipeline(cross_attention_dim=48), "give embeddings of 32, and the unet takes 48"),
    "latents": (
        lambda: tiny_pipeline(in_channels=8, out_channels=8),
        "the vae has 4 latent channels, and the unet takes 8 and gives 8",
    ),
    "fewer latents": (lambda: tiny_pipeline(in_channels=3, out_channels=3), "the unet takes 3 and gives 3"),
    "two text encoders": (
        lambda: _with_unet(cross_attention_dim=32),
        "give embeddings of 32 and of 32, and the unet takes 32",
    ),
    "pooled embedding": (
        lambda: _with_unet(projection_class_embeddings_input_dim=64 + 16 + 4),
        "gives an embedding of 16, beside 8 for each of 5 or 6 sizes, and the unet takes 84",
    ),
}


def _with_unet(**changes):
    pipeline = xl()
    pipeline.unet = tiny_unet(**{**pipeline.unet.config, **changes})
    return pipeline


@pytest.mark.parametrize("case", CASES)
def test_parts_that_do_not_go_together_are_named(case, monkeypatch):
    monkeypatch.setattr("slimdiff.calibration.calibrate.sample_batch", lambda *_, **__: pytest.fail("it began"))
    make, said = CASES[case]
    with pytest.raises(InputError, match="do not go together") as caught:
        compress(make(), ["a star"], "8%")
    assert said in str(caught.value)


@pytest.mark.parametrize("command", ["compress {} --out {}/slim --reduce 8%", "calibrate {} --out {}/a.safetensors"])
def test_every_command_refuses_them_when_the_model_is_opened(command, tmp_path, capsys, monkeypatch):
    CASES["latents"][0]().save_pretrained(tmp_path / "odd")
    monkeypatch.setattr("slimdiff.denoising.trajectory.sample_batch", lambda *_, **__: pytest.fail("it began"))
    assert "do not go together: the vae has 4" in refused(command.format(tmp_path / "odd", tmp_path).split(), capsys)
    assert load_pipeline(tmp_path / "odd", without=("vae",)).vae is None  # what is not there is not looked at


def test_families_go_together():
    for family in FAMILIES.values():
        if family.calls is None:
            check_fit(family.make())
