"""The folder that optimum loads."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from exporters.graphs.export import export_unet
from exporters.graphs.pipeline import example_call, export_pipeline
from exporters.runtimes.pipeline import load_pipeline as runtime_pipeline
from exporters.runtimes.unet import UNet
from exporters.settings import ExportSettings
from slimdiff.denoising.trajectory import record_calls
from slimdiff.errors import InputError
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.settings import Sampling
from slimdiff.slimming.skeleton import skeleton

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")


def images(pipeline, prompts, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts) * options.get("num_images_per_prompt", 1))]
    options = {"height": 8 * pipeline.vae_scale_factor, "width": 8 * pipeline.vae_scale_factor} | options
    return pipeline(
        prompts, num_inference_steps=2, guidance_scale=4.0, generator=seeds, output_type="np", **options
    ).images


def same(found: np.ndarray, expected: np.ndarray, least: float = 80.0) -> None:
    """PSNR between images in [0, 1], in dB: twice what is asked of trained models, for untrained ones hide faults."""
    assert found.shape == expected.shape and np.ptp(expected) > 0.1
    assert -10 * np.log10(np.square(found - expected).mean() + 1e-20) >= least


def halves(unet) -> dict[str, int]:
    return {site.path: site.dense_rank // 2 for site in find_sites(unet)[0]}


@pytest.fixture(scope="module")
def slim_pipeline(pipeline):
    parts = {**pipeline.components, "unet": skeleton(pipeline.unet, halves(pipeline.unet))}
    return type(pipeline)(**parts, requires_safety_checker=False)


@pytest.fixture(scope="module")
def open_folder(tmp_path_factory, slim_pipeline):
    folder = tmp_path_factory.mktemp("open")
    call = example_call(slim_pipeline, height=16, width=16)
    export_pipeline(slim_pipeline, folder, ExportSettings(dynamic_batch=True, dynamic_size=True), call=call)
    return folder


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
        same(images(loaded, ["abc", "de"], **options), images(pipeline, ["abc", "de"], **options))


def test_a_slim_pipeline_of_open_size_makes_the_same_images_at_any(open_folder, slim_pipeline):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    loaded = [optimum.ORTDiffusionPipeline.from_pretrained(open_folder), runtime_pipeline(open_folder)]
    for height, width in ((16, 16), (24, 40)):
        size = {"height": height, "width": width}
        expected = images(slim_pipeline, ["abc"], **size)
        assert expected.shape == (1, height, width, 3)
        for each in loaded:
            same(images(each, ["abc"], **size), expected)


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


def test_optimum_makes_the_same_sdxl_images(onnx_xl_folder, xl_pipeline):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    loaded = optimum.ORTDiffusionPipeline.from_pretrained(onnx_xl_folder)
    same(images(loaded, ["abc"]), images(xl_pipeline, ["abc"]))


def test_a_slim_sdxl_makes_the_same_images_in_optimum(onnx_xl_folder, xl_pipeline, tmp_path):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    slim = type(xl_pipeline)(**{**xl_pipeline.components, "unet": skeleton(xl_pipeline.unet, halves(xl_pipeline.unet))})
    shutil.copytree(onnx_xl_folder, tmp_path / "slim")
    export_unet(slim.unet, tmp_path / "slim" / "unet", example_call(slim), ExportSettings(dynamic_batch=True))
    loaded = optimum.ORTDiffusionPipeline.from_pretrained(tmp_path / "slim")
    same(images(loaded, ["abc"]), images(slim, ["abc"]))


@pytest.mark.slow
def test_the_embedded_model_makes_the_same_image_in_optimum(tmp_path):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    demo = load_pipeline("demo")
    export_pipeline(demo, tmp_path, ExportSettings(dynamic_batch=True))
    size = demo.unet.config.sample_size * demo.vae_scale_factor
    wanted = {"prompts": ["a large red circle top left, on a gray background"], "height": size, "width": size}
    same(images(optimum.ORTDiffusionPipeline.from_pretrained(tmp_path), **wanted), images(demo, **wanted))


def test_the_unet_is_not_run_for_an_example(pipeline, monkeypatch):
    expected = record_calls(pipeline, ["", ""], Sampling(steps=1, guidance=1.0, batch=2))[0]
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.unet.mid_block, "forward", None)
        found = example_call(pipeline)
    assert "forward" not in vars(pipeline.unet)
    assert found.timestep == expected.timestep and found.arguments.keys() == expected.arguments.keys()
    assert all(torch.equal(tensor, expected.arguments[name]) for name, tensor in found.arguments.items())


def test_other_pipelines_are_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "text_encoder", torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="is a Linear: only CLIP"):
        export_pipeline(pipeline, tmp_path)
    monkeypatch.setattr(pipeline, "unet", None)
    with pytest.raises(InputError, match="no unet"):
        export_pipeline(pipeline, tmp_path)
