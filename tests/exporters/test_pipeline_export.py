"""The folder that optimum loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from exporters.onnx_export import ExportSettings
from exporters.pipeline_export import example_call, export_pipeline
from slimdiff.errors import InputError

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("pipeline")
    export_pipeline(pipeline, folder, ExportSettings(dynamic_batch=True), call=example_call(pipeline))
    return folder


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


def test_layout_is_optimums(folder):
    for name in ("unet", "vae_decoder", "vae_encoder", "text_encoder"):
        assert {p.name for p in (folder / name).iterdir()} == {"model.onnx", "model.onnx.data", "config.json"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and "_name_or_path" not in index
    assert index["unet"] == ["optimum.onnxruntime.modeling_diffusion", "ORTUnet"]
    assert index["tokenizer"][1].startswith("CLIPTokenizer") and index["safety_checker"] == [None, None]
    assert (folder / "tokenizer" / "vocab.json").is_file() and (folder / "scheduler").is_dir()


def test_optimum_makes_the_same_images(folder, pipeline):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    loaded = optimum.ORTDiffusionPipeline.from_pretrained(folder)
    for options in ({}, {"num_images_per_prompt": 2}):
        expected = images(pipeline, ["abc", "de"], **options)
        np.testing.assert_allclose(images(loaded, ["abc", "de"], **options), expected, atol=1e-4)


def test_sdxl_makes_the_same_images_in_optimum_and_with_our_unet(xl_pipeline, tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime needs the extra onnx")
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    from exporters.onnx_runtime import OnnxUNet

    export_pipeline(xl_pipeline, tmp_path, ExportSettings(dynamic_batch=True))
    expected = images(xl_pipeline, ["abc"])
    loaded = optimum.ORTDiffusionPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(images(loaded, ["abc"]), expected, atol=1e-4)
    xl_pipeline.unet = OnnxUNet(tmp_path / "unet")
    np.testing.assert_allclose(images(xl_pipeline, ["abc"]), expected, atol=1e-4)


def test_other_pipelines_are_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "text_encoder", torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="is a Linear: only CLIP"):
        export_pipeline(pipeline, tmp_path)
    monkeypatch.setattr(pipeline, "unet", None)
    with pytest.raises(InputError, match="no unet"):
        export_pipeline(pipeline, tmp_path)
