"""VAEs in half precision that overflow, and large images by tiles."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command_line import call, refused
from families.images import xl
from PIL import Image

from deploy.artifacts.files import save_pipeline
from deploy.cli.app import main
from deploy.triton.components import find_components
from deploy.triton.server.text_to_image import TextToImage
from deploy.triton.settings import TritonSettings
from exporters.graphs.export import export_unet
from exporters.graphs.pipeline import example_call
from exporters.graphs.precision import fp32_islands
from exporters.graphs.vae import export_vae
from exporters.runtimes.vae import VAE
from exporters.settings import ExportSettings
from exporters.validation.parity import image_psnr
from slimdiff.denoising.trajectory import sample_images
from slimdiff.errors import InputError
from slimdiff.settings import Sampling

onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("polygraphy", reason="parity is measured by Polygraphy")

CURE = ["vae.decoder.up_blocks.1", "vae.decoder.conv_norm_out"]
SHOT = ["--prompt", "a red circle", "--steps", 2, "--seed", 3]
LARGE = [*SHOT, "--height", 40, "--width", 24]


@pytest.fixture(scope="module")
def hot(pipeline, tmp_path_factory):
    """A pipeline whose VAE asks for fp32, as SDXL's does: its last block's residual stream ends beyond 65504."""
    hot = copy.copy(pipeline)
    hot.register_modules(vae=copy.deepcopy(pipeline.vae))
    hot.vae.decoder.up_blocks[1].resnets[0].conv2.weight.data *= 2e5
    assert hot.vae.config.force_upcast
    folder = tmp_path_factory.mktemp("hot") / "model"
    save_pipeline(hot, folder)
    return hot, folder


@pytest.fixture(scope="module")
def graphs(hot, exported, tmp_path_factory) -> dict[str, Path]:
    """It in ONNX, its decoder in half precision but for a module that does not matter, and but for those that do."""
    folders = {}
    for name, keep in (("black", ["vae.post_quant_conv"]), ("cured", CURE)):
        folders[name] = folder = tmp_path_factory.mktemp(name) / "onnx"
        shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("manifest.json", "vae_decoder"))
        settings = ExportSettings(precision="fp16", keep_fp32=keep)
        export_vae(hot[0].vae, folder / "vae_decoder", hot[0], example_call(hot[0]), settings)
    return folders


def test_what_overflows_in_the_vae_is_named_with_all_that_cures_it(hot, graphs, capsys):
    value = call(["validate", hot[1], graphs["black"], "--steps", 2, "--calls", 1], capsys, 1)
    found = value["divergence"]
    assert not value["passed"] and value["first_diverging"] == found["tensor"] == found["node"]
    assert found["module"].startswith("vae.decoder.up_blocks.1.resnets.0") and found["not_finite"] > 0
    assert found["keep_fp32"].split() == CURE
    # ONNX Runtime's CPU provider computes in fp32 between casts, so the image survives there, and not on a GPU.
    failed = {c["tensor"] for c in value["checks"] if not c["passed"]}
    assert {"every tensor of vae_decoder"} <= failed <= {"vae_decoder", "every tensor of vae_decoder"}
    assert {"vae_encoder", "image#0"} <= {c["tensor"] for c in value["checks"]}


def test_the_advice_is_in_words_what_the_export_takes(hot, graphs, capsys):
    assert main(["validate", str(hot[1]), str(graphs["black"]), "--steps", "1", "--calls", "1"]) == 1
    said = capsys.readouterr().out
    assert "they differ, first at vae.decoder.up_blocks.1.resnets.0" in said and f"--keep-fp32 {' '.join(CURE)}" in said


def test_a_vae_that_overflows_makes_one_line_and_no_black_image(graphs, capsys, tmp_path, monkeypatch):
    from exporters.runtimes.ort_session import OnnxRuntimeSession

    run = OnnxRuntimeSession.run

    def as_on_a_gpu(self, feed):
        found = run(self, feed)
        return {name: array * np.float16(np.nan) for name, array in found.items()} if "vae" in self.source else found

    monkeypatch.setattr(OnnxRuntimeSession, "run", as_on_a_gpu)
    line = refused(["generate", graphs["black"], *SHOT, "--out", tmp_path / "black.png"], capsys)
    assert "vae_decoder/model.onnx overflows" in line and "--keep-fp32" in line
    assert not (tmp_path / "black.png").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_server_answers_what_is_no_image_with_an_error(value):
    served = TextToImage.__new__(TextToImage)
    served.max_steps, served.usage, served.size = 10, {}, {}
    served.pipeline = Mock(return_value=SimpleNamespace(images=[np.full((8, 8, 3), value)]))
    with pytest.raises(FloatingPointError, match="a model overflows"):
        served("a red circle")


def test_kept_modules_cure_it_and_the_rest_is_half(hot, graphs, capsys, tmp_path):
    assert call(["validate", hot[1], graphs["cured"], "--steps", 2, "--calls", 1], capsys)["passed"]
    images = {}
    for name, artifact in (("torch", hot[1]), ("onnx", graphs["cured"])):
        call(["generate", artifact, *SHOT, "--out", tmp_path / f"{name}.png"], capsys)
        images[name] = Image.open(tmp_path / f"{name}.png")
    assert image_psnr(images["torch"], images["onnx"]) > 40 and np.asarray(images["torch"]).std() > 5
    rows = [r for r in fp32_islands(graphs["cured"] / "vae_decoder" / "model.onnx") if r["fp32"] == "tensors"]
    inside = tuple(path.removeprefix("vae.") for path in CURE)
    assert {r["module"].startswith(inside) for r in rows if r["operator"] in ("Conv", "Resize")} == {True}
    config = json.loads((graphs["cured"] / "vae_decoder" / "config.json").read_text())
    assert config["force_upcast"] is False  # or diffusers' SDXL pipelines would look for weights to cast


def test_sdxls_pipeline_leaves_a_half_vae_as_it_is(hot, graphs):
    """It would cast a whole VAE whose config asks for fp32, and look for weights that a graph has not."""
    pipeline, images = xl(), []
    for vae in (hot[0].vae, VAE.open(graphs["cured"])):
        pipeline.register_modules(vae=vae)
        images += sample_images(pipeline, ["a red circle"], Sampling(steps=2, guidance=3.0, seed=3))
    assert pipeline.vae.dtype == torch.float16 and image_psnr(*images) > 40 and np.asarray(images[0]).std() > 5


@pytest.fixture(scope="module")
def open_graphs(pipeline, exported, tmp_path_factory) -> dict[str, Path]:
    """The tiny pipeline with a UNet of open size: `tile` with a VAE for images of 16 x 16, `open` with an open one."""
    settings, example = ExportSettings(dynamic_batch=True, dynamic_size=True), example_call(pipeline)
    unet = export_unet(pipeline.unet, tmp_path_factory.mktemp("open") / "unet", example, settings).parent
    folders = {}
    for name in ("tile", "open"):
        folders[name] = folder = tmp_path_factory.mktemp(name) / "onnx"
        shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("manifest.json", "unet"))
        shutil.copytree(unet, folder / "unet")
    decoder = folders["open"] / "vae_decoder"
    shutil.rmtree(decoder)
    export_vae(pipeline.vae, decoder, pipeline, example, settings)
    return folders


def test_generate_makes_large_images_by_tiles(workspace, open_graphs, capsys, tmp_path):
    edge = tmp_path / "edge"
    call(["bundle", open_graphs["open"], "--target", "edge", "--runtime", "onnxruntime", "--out", edge], capsys)
    images = {}
    for name, argv in {
        "torch": [workspace / "tiny"],
        "torch, tiled": [workspace / "tiny", "--tiled"],
        "open": [open_graphs["open"]],
        "open, tiled": [open_graphs["open"], "--tiled"],
        "bundle, tiled": [edge, "--tiled"],
        "tile": [open_graphs["tile"]],
    }.items():
        value = call(["generate", *argv, *LARGE, "--out", tmp_path / f"{name}.png"], capsys)
        assert (value["height"], value["width"], value["tiled"]) == (40, 24, "--tiled" in argv)
        images[name] = Image.open(tmp_path / f"{name}.png")
    psnr = {name: image_psnr(images["torch, tiled"], image) for name, image in images.items()}
    assert psnr["open, tiled"] > 45 and psnr["bundle, tiled"] > 45
    assert psnr["torch"] < 45 and image_psnr(images["torch"], images["open"]) > 45
    whole = image_psnr(images["torch"], images["tile"])
    assert psnr["torch"] - 3 < whole < 45  # tiles of 16 pixels, whose last ones see more than torch's


def test_tiles_where_nothing_can_be_tiled_are_said(exported, workspace, capsys, tmp_path):
    argv = ["generate", exported, *SHOT, "--tiled", "--out", tmp_path / "fixed.png"]
    assert main([str(a) for a in argv]) == 0
    assert "--tiled changes nothing" in capsys.readouterr().err


def test_a_vae_of_tiles_is_for_no_server_that_makes_the_image_at_once(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "onnx")
    file = folder / "vae_decoder" / "model.onnx"
    graph = onnx.load(file, load_external_data=False)
    for axis in (2, 3):
        graph.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 4
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(InputError, match=r"UNet .* takes latents of \(8, 8\) and the VAE of \(4, 4\)"):
        find_components(folder, {}, TritonSettings())


@pytest.mark.slow
def test_an_export_for_large_images_with_a_vae_of_tiles(workspace, capsys, tmp_path):
    onnx, server = tmp_path / "onnx", tmp_path / "server"
    argv = ["export", workspace / "tiny", "--out", onnx, "--height", 40, "--width", 24]
    assert "multiple of 8 pixels" in refused([*argv, "--vae-tile", 12], capsys)
    call([*argv, "--vae-tile", 16], capsys)
    value = call(["validate", workspace / "tiny", onnx, "--steps", 2, "--calls", 1], capsys)
    assert value["passed"] and "vae_decoder" in {c["tensor"] for c in value["checks"]}
    call(["bundle", onnx, "--target", "server", "--out", server], capsys)
    for artifact in (onnx, server):
        value = call(["generate", artifact, *SHOT, "--out", tmp_path / f"{artifact.name}.png"], capsys)
        assert (value["height"], value["width"]) == (40, 24)
    line = refused(["bundle", onnx, "--target", "server", "--triton", "--out", tmp_path / "triton"], capsys)
    assert "without --vae-tile" in line


def test_modules_that_are_not_there_are_refused_before_anything_is_done(workspace, exported, capsys, tmp_path):
    out = tmp_path / "out"
    for argv in (
        ["export", workspace / "tiny", "--precision", "fp16"],
        ["bundle", workspace / "tiny", "--target", "edge", "--precision", "fp16"],
    ):
        line = refused([*argv, "--out", out, "--keep-fp32", "*.attn1", "vae.decoder.up_blocks.7"], capsys)
        assert "no module matches 'vae.decoder.up_blocks.7'" in line
    line = refused(["bundle", exported, "--target", "edge", "--out", out, "--keep-fp32", "vae.decoder"], capsys)
    assert "is exported already" in line
    recipe = workspace / "kept.yaml"
    recipe.write_text((workspace / "recipe.yaml").read_text() + "export: {precision: fp16, keep_fp32: [vae.decodr]}\n")
    assert "no module matches 'vae.decodr'" in refused(["build", recipe, "--out", out], capsys)
    recipe.unlink()


@pytest.mark.slow
def test_a_build_names_what_overflows_in_the_vae_of_its_bundles(hot, workspace, capsys, tmp_path):
    for name, keep in (("black", "[vae.post_quant_conv]"), ("cured", f"[{', '.join(CURE)}]")):
        recipe = workspace / f"{name}.yaml"
        text = (workspace / "recipe.yaml").read_text().replace("model: tiny", f"model: {hot[1]}")
        recipe.write_text(f"{text}export: {{precision: fp16, keep_fp32: {keep}}}\n")
        value = call(["build", recipe, "--out", tmp_path / name], capsys, 1 if name == "black" else 0)
        recipe.unlink()
        parity = next(gate for gate in value["gates"] if gate["gate"] == "parity")
        assert parity["value"] is (name == "cured")
        assert (f"--keep-fp32 {' '.join(CURE)}" in parity["detail"]) is (name == "black")


def test_an_engine_is_built_of_a_half_vae_as_it_is(graphs, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="engines need the extra tensorrt-rtx")
    from exporters.engine.build import build_engine
    from exporters.settings import EngineSettings

    settings = EngineSettings(backend="tensorrt-rtx", targets=["sm89"], batch=1)
    report = build_engine(graphs["cured"] / "vae_decoder" / "model.onnx", tmp_path / "engine", settings)
    assert report["precision"] == "fp16"
    assert [(t["name"], t["dtype"]) for t in report["inputs"] + report["outputs"]] == [
        ("latent_sample", "float16"),
        ("sample", "float16"),
    ]
