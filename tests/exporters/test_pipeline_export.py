"""The folder that optimum loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from exporters.pipeline_export import example_call, export_pipeline
from slimdiff.errors import InputError

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")


def images(pipeline, prompts, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts) * options.get("num_images_per_prompt", 1))]
    options = {"height": 8 * pipeline.vae_scale_factor, "width": 8 * pipeline.vae_scale_factor} | options
    return pipeline(
        prompts, num_inference_steps=2, guidance_scale=4.0, generator=seeds, output_type="np", **options
    ).images


def test_the_call_has_the_shapes_asked_for(pipeline):
    arguments = example_call(pipeline, height=24, width=16, batch=3).arguments
    scale = pipeline.vae_scale_factor
    assert arguments["sample"].shape == (3, 4, 24 // scale, 16 // scale)
    assert arguments["encoder_hidden_states"].shape == (3, 7, 32)


def test_layout_is_optimums(onnx_folder):
    for name in ("unet", "vae_decoder", "vae_encoder", "text_encoder"):
        assert {p.name for p in (onnx_folder / name).iterdir()} == {"model.onnx", "model.onnx.data", "config.json"}
    index = json.loads((onnx_folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and "_name_or_path" not in index
    assert index["unet"] == ["optimum.onnxruntime.modeling_diffusion", "ORTUnet"]
    assert index["tokenizer"][1].startswith("CLIPTokenizer") and index["safety_checker"] == [None, None]
    assert (onnx_folder / "tokenizer" / "vocab.json").is_file() and (onnx_folder / "scheduler").is_dir()


def test_optimum_makes_the_same_images(onnx_folder, pipeline):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    loaded = optimum.ORTDiffusionPipeline.from_pretrained(onnx_folder)
    for options in ({}, {"num_images_per_prompt": 2}):
        expected = images(pipeline, ["abc", "de"], **options)
        np.testing.assert_allclose(images(loaded, ["abc", "de"], **options), expected, atol=1e-4)


def test_optimum_makes_the_same_sdxl_images(onnx_xl_folder, xl_pipeline):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    loaded = optimum.ORTDiffusionPipeline.from_pretrained(onnx_xl_folder)
    np.testing.assert_allclose(images(loaded, ["abc"]), images(xl_pipeline, ["abc"]), atol=1e-4)


def test_other_pipelines_are_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "text_encoder", torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="is a Linear: only CLIP"):
        export_pipeline(pipeline, tmp_path)
    monkeypatch.setattr(pipeline, "unet", None)
    with pytest.raises(InputError, match="no unet"):
        export_pipeline(pipeline, tmp_path)
