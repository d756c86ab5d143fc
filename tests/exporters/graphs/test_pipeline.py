"""The folder that optimum loads."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from image_checks import images, same

from exporters.graphs.pipeline import example_call, export_pipeline, export_text_encoder
from exporters.layout import FINAL_NORM
from exporters.runtimes.opening import open_session
from exporters.runtimes.pipeline import load_pipeline as runtime_pipeline
from exporters.runtimes.unet import UNet
from exporters.settings import ExportSettings
from slimdiff.denoising.trajectory import record_calls
from slimdiff.errors import InputError
from slimdiff.settings import Sampling

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")


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


@pytest.mark.slow
def test_a_slim_pipeline_of_open_size_makes_the_same_images_at_any(open_folder, slim_pipeline):
    loaded = runtime_pipeline(open_folder)
    for height, width in ((16, 16), (24, 40)):
        size = {"height": height, "width": width}
        expected = images(slim_pipeline, ["abc"], **size)
        assert expected.shape == (1, height, width, 3)
        same(images(loaded, ["abc"], **size), expected)


def test_a_size_between_the_steps_of_the_down_scaling_is_refused(open_folder, slim_pipeline):
    call = example_call(slim_pipeline, height=16, width=16)
    call.arguments["sample"] = torch.zeros(1, 4, 9, 8)
    with pytest.raises(InputError, match=r"sample has shape \(1, 4, 9, 8\), but .* takes sample .*2\*height, 2\*width"):
        UNet.open(open_folder / "unet").predict(call)


def test_graphs_of_open_size_answer_as_torch_does(open_folder, slim_pipeline):
    ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    vae = slim_pipeline.vae
    torch_says = {
        "vae_decoder": lambda x: vae.decode(x, return_dict=False)[0],
        "vae_encoder": lambda x: vae.encode(x).latent_dist.parameters,
    }
    for name, channels in (("vae_decoder", 4), ("vae_encoder", 3)):
        session = ort.InferenceSession(open_folder / name / "model.onnx", providers=["CPUExecutionProvider"])
        for height, width in ((8, 8), (12, 20)):
            x = torch.randn(1, channels, height, width)
            with torch.no_grad():
                expected = torch_says[name](x).numpy()
            found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_unet_is_not_run_for_an_example(pipeline, monkeypatch):
    expected = record_calls(pipeline, ["", ""], Sampling(steps=1, guidance=1.0, batch=2))[0]
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.unet.mid_block, "forward", None)
        found = example_call(pipeline, batch=2)
    assert "forward" not in vars(pipeline.unet)
    assert found.timestep == expected.timestep and found.arguments.keys() == expected.arguments.keys()
    assert all(torch.equal(tensor, expected.arguments[name]) for name, tensor in found.arguments.items())


def test_other_pipelines_are_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "text_encoder", torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"Linear, which .* cannot have \(taken is CLIPTextModel or"):
        export_pipeline(pipeline, tmp_path)
    monkeypatch.setattr(pipeline, "unet", None)
    with pytest.raises(InputError, match="neither a unet nor a transformer"):
        export_pipeline(pipeline, tmp_path)


def test_a_trained_text_encoder_is_exported_with_its_final_norm(pipeline, tmp_path):
    """An untrained norm is ones and zeros, which the exporter folds: its weights then have no names to clash."""
    trained = copy.deepcopy(pipeline)
    encoder = trained.text_encoder
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    graph = export_text_encoder(encoder, tmp_path / "text_encoder", trained, example_call(trained), ExportSettings())
    found = open_session(graph).run({"input_ids": np.ones((1, 7), dtype=np.int64)})
    for name, weight in zip(FINAL_NORM, norm.parameters(), strict=True):
        np.testing.assert_array_equal(found[name][0], weight.detach().numpy())
