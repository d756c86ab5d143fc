"""Opening what a user names, and refusing what is no model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from slimdiff import InputError
from slimdiff.loading.pipelines import load_pipeline


def test_a_slim_directory_opens(slim_directory, compression):
    pipeline = load_pipeline(slim_directory)
    assert pipeline.unet.config["slim_plan"]["parameters"] == compression.plan.parameters


def test_half_precision_is_everywhere(slim_directory):
    pipeline = load_pipeline(slim_directory, torch.float16)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float16}


def test_what_is_not_a_model(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(InputError, match="model_index.json"):
        load_pipeline(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        load_pipeline(tmp_path / "file")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_pipeline(tmp_path)


def test_a_pickle_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(pipeline.unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="is a pickle"):
        load_pipeline(tmp_path)


def test_truncated_weights_and_a_lying_plan_are_refused(slim_directory, tmp_path):
    folder = tmp_path / "slim"
    shutil.copytree(slim_directory, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    next(s for s in config["slim_plan"]["sites"].values() if s["group"] == "feed_forward")["rank"] -= 4
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError,
        match=r"unet in .*: down_blocks\S+ is \[256\] in the files and \[248\] in the model",
    ):
        load_pipeline(folder)
    shutil.copy(slim_directory / "unet" / "config.json", folder / "unet" / "config.json")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        load_pipeline(folder)
