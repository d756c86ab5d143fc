"""Pipelines of every task whose UNet makes images: exported, bundled, and the same images from each."""

from __future__ import annotations

import json
import shlex
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused
from conftest import tiny_pipeline
from diffusers import AutoencoderTiny
from families import tasks
from families.family import TWO_LEVELS, picture
from PIL import Image

for module in ("onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is an extra")

from deploy.cli.app import main  # noqa: E402
from exporters.graphs.pipeline import example_call, export_pipeline  # noqa: E402
from exporters.layout import FOLDERS, check_carried  # noqa: E402
from exporters.runtimes.text_encoder import TextEncoder  # noqa: E402
from exporters.runtimes.transformer import Transformer  # noqa: E402
from exporters.runtimes.vae import VAE  # noqa: E402
from exporters.settings import ExportSettings  # noqa: E402
from slimdiff.denoising.tasks import samples_per_image  # noqa: E402
from slimdiff.errors import InputError  # noqa: E402
from slimdiff.settings import Sampling  # noqa: E402

PROMPT = ["--prompt", "a red circle"]
GUIDED = ["--steps", 4, "--guidance", 3]
PHOTO, SMALL, BIG = (["--image", f"{name}.png"] for name in ("photo", "small", "big"))
VAE_OF_TWO = {"vae_decoder", "vae_encoder"}
TASKS = {
    "unconditional": (tasks.ddpm, ["--steps", 4], 1, set()),
    "class-conditional": (tasks.consistency, ["--class", 3, "--steps", 2], 1, set()),
    "upscaler": (tasks.upscaler, [*PROMPT, *SMALL, *GUIDED], 2, {"text_encoder", *VAE_OF_TWO}),
    "upscaler of latents": (tasks.latent_upscaler, [*PROMPT, *PHOTO, *GUIDED], 2, {"text_encoder", *VAE_OF_TWO}),
    "refiner": (tasks.refiner, [*PROMPT, *PHOTO, *GUIDED], 2, {"text_encoder_2", *VAE_OF_TWO}),
    "depth to image": (
        tasks.depth_to_image,
        [*PROMPT, *PHOTO, *GUIDED],
        2,
        {"text_encoder", "depth_estimator", *VAE_OF_TWO},
    ),
    "latent diffusion": (tasks.ldm, [*PROMPT, *GUIDED], 2, {"bert", "vqvae_decoder"}),
    "upscaler of latent diffusion": (tasks.ldm_upscaler, [*BIG, "--steps", 2], 1, {"vqvae_decoder"}),
}
QUICK = ("class-conditional",)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a task's model, its graphs, and three pictures."""

    @cache
    def export(task: str) -> Path:
        folder = tmp_path_factory.mktemp("task")
        for name, size in (("photo", 16), ("small", 8), ("big", 32)):
            picture(0, size).save(folder / f"{name}.png")
        TASKS[task][0]().save_pretrained(folder / "model")
        with redirect_stdout(StringIO()):
            assert main(["export", str(folder / "model"), "--out", str(folder / "onnx"), "--quiet"]) == 0
        return folder

    return export


@pytest.mark.parametrize("task", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TASKS])
def test_a_tasks_graphs_and_edge_bundle_make_torchs_image(task, exported, capsys, monkeypatch):
    _make, flags, samples, graphs = TASKS[task]
    monkeypatch.chdir(exported(task))
    assert call(["inspect", "onnx"], capsys)["inputs"]["sample"][0] == samples
    assert {file.parent.name for file in Path("onnx").glob("*/model.onnx")} == {"unet", *graphs}
    assert call(["validate", "model", "onnx", "--steps", 4, "--calls", 2], capsys)["passed"]
    call(["bundle", "onnx", "--target", "edge", "--runtime", "onnxruntime", "--out", "bundle"], capsys)
    assert call(["inspect", "bundle"], capsys)["denoisers"][0]["vae"] == ("." if graphs else None)
    images = []
    for source in ("model", "onnx", "bundle"):
        call(["generate", source, *flags, "--out", f"{source}.png"], capsys)
        images.append(np.asarray(Image.open(f"{source}.png"), dtype=int))
    assert images[0].std() > 1 and all(abs(image - images[0]).max() <= 1 for image in images[1:])
    (command,) = [line for line in Path("bundle/README.md").read_text().splitlines() if line.startswith("slimdiff ")]
    said = {flag for flag in shlex.split(command) if flag.startswith("--")} - {"--out"}
    assert said == {str(flag) for flag in flags if str(flag).startswith("--")} - {"--steps", "--guidance"}


def test_several_images_of_classes_go_through_a_graph_of_one_and_none_is_refused(exported, capsys, monkeypatch):
    monkeypatch.chdir(exported("class-conditional"))
    for source in ("model", "onnx"):
        made = call(["generate", source, "--class", "1,4", "--count", 2, "--out", f"{source}.png"], capsys)
        assert made["outs"] == [f"{source}-0.png", f"{source}-1.png"]
    for number in (0, 1):
        pictures = [np.asarray(Image.open(f"{source}-{number}.png"), dtype=int) for source in ("model", "onnx")]
        assert abs(pictures[1] - pictures[0]).max() <= 1
    refusals = {
        (): "makes images of classes: say which",
        ("--class", 5): "has classes 0 to 4, and 5 is asked for",
        ("--class", 1, *PROMPT): "takes no prompt",
        ("--class", 1, *PHOTO): "makes no images from images",
    }
    for flags, message in refusals.items():
        assert message in refused(["generate", "onnx", *flags, "--out", "x.png"], capsys)


def test_a_server_that_would_not_run_a_task_is_refused_before_anything_is_written(exported, capsys, monkeypatch):
    pytest.importorskip("tritonclient", reason="tritonclient is an extra")
    monkeypatch.chdir(exported("class-conditional"))
    monkeypatch.setattr("deploy.bundle.sources._copy", lambda *_: pytest.fail("something is written"))
    message = refused(["bundle", "onnx", "--target", "server", "--triton", "--out", "x"], capsys)
    assert "the source is a ConsistencyModelPipeline; served are StableDiffusionPipeline and" in message


def graphs_of(pipeline, folder: Path, *kept: str, **settings) -> Path:
    """Some of a pipeline's graphs."""
    export_pipeline(
        pipeline, folder, ExportSettings(**settings), without=[name for name in FOLDERS if name not in kept]
    )
    return folder


def test_berts_and_vector_quantised_decoders_answer_as_torch_does(tmp_path):
    pipeline = tasks.ldm()
    folder = graphs_of(pipeline, tmp_path, "bert", "vqvae_decoder")
    ids = torch.arange(2 * 77).reshape(2, 77) % 31
    with torch.no_grad():
        expected = pipeline.bert(ids)[0]
        latents = torch.randn(1, 3, 8, 8)
        decoded = pipeline.vqvae.decode(latents).sample
    torch.testing.assert_close(Transformer.open(folder / "bert")(ids)[0], expected, rtol=1e-4, atol=1e-5)
    vae = VAE.open_in(folder, "vqvae", "onnxruntime")
    torch.testing.assert_close(vae.decode(latents).sample, decoded, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="has the VAE's decoder alone"):
        vae.encode(decoded)
    assert json.loads((folder / "model_index.json").read_text())["vqvae"] == ["diffusers", "VQModel"]


def test_a_depth_estimator_answers_as_torch_does(tmp_path):
    pipeline = tasks.depth_to_image()
    graph = Transformer.open(graphs_of(pipeline, tmp_path, "depth_estimator") / "depth_estimator")
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = pipeline.depth_estimator(pixels).predicted_depth
    torch.testing.assert_close(graph(pixels).predicted_depth, expected, rtol=1e-4, atol=1e-5)


def test_the_last_hidden_state_comes_before_the_norm_where_a_pipeline_reads_it(tmp_path):
    pipeline = tasks.latent_upscaler()
    encoder = TextEncoder.open(graphs_of(pipeline, tmp_path, "text_encoder") / "text_encoder")
    ids = torch.ones(1, encoder.session.inputs["input_ids"][1], dtype=torch.long)
    with torch.no_grad():
        expected = pipeline.text_encoder(ids, output_hidden_states=True)
    found = encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-1], expected.hidden_states[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.hidden_states[-1], found.last_hidden_state, atol=1e-2)


def test_a_tiny_autoencoder_encodes_and_decodes_as_torch_does(tmp_path):
    """TAESD: it gives the latents themselves, no distribution of them."""
    pipeline = tiny_pipeline(**TWO_LEVELS)
    halves = {f"{side}coder_block_out_channels": (8, 8) for side in ("en", "de")}
    pipeline.vae = AutoencoderTiny(**halves, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    vae = VAE.open(graphs_of(pipeline, tmp_path, "vae_encoder", "vae_decoder"))
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latents
        decoded = pipeline.vae.decode(latents).sample
    torch.testing.assert_close(vae.encode(pixels).latents, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents).sample, decoded, rtol=1e-4, atol=1e-4)


def test_a_call_for_export_has_the_shapes_of_the_task():
    shapes = {
        "upscaler": {"sample": (2, 7, 8, 8), "class_labels": (2,)},
        "upscaler of latents": {"sample": (2, 8, 16, 16), "timestep_cond": (2, 160)},
        "refiner": {"sample": (2, 4, 8, 8)},
        "upscaler of latent diffusion": {"sample": (1, 6, 32, 32)},
    }
    for task, expected in shapes.items():
        pipeline = TASKS[task][0]()
        arguments = example_call(pipeline).arguments
        assert {name: tuple(arguments[name].shape) for name in expected} == expected
        assert samples_per_image(pipeline, Sampling()) == expected["sample"][0]


def test_a_component_that_has_no_row_is_one_line_that_says_whether_it_can_go(tmp_path):
    pipeline = tasks.upscaler()
    pipeline.register_to_config(watermarker=("transformers", "SomeModel"))
    with pytest.raises(InputError, match=r"watermarker transformers.SomeModel, .*take it out .*watermarker=None"):
        export_pipeline(pipeline, tmp_path)
    index = {"_class_name": "StableUnCLIPImg2ImgPipeline", "image_normalizer": ["stable_diffusion", "Normalizer"]}
    with pytest.raises(InputError, match="asks for the image_normalizer .*cannot have: stay in torch"):
        check_carried(index, "x")
    pipeline = tasks.upscaler()
    pipeline.register_to_config(text_encoder=("transformers", "LlamaModel"))
    with pytest.raises(InputError, match="LlamaModel, .*taken is CLIPTextModel or .*: stay in torch"):
        export_pipeline(pipeline, tmp_path)


def test_an_image_at_a_strength_that_leaves_no_step_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(0, 16).save("photo.png")
    tasks.refiner().save_pretrained("model")
    flags = [*PROMPT, *PHOTO, "--out", "x.png", "--steps", 2]
    assert "leaves not one of 2 steps: take 4 steps or more" in refused(["generate", "model", *flags], capsys)
    call(["generate", "model", *flags, "--argument", "strength=0.6"], capsys)


def test_what_is_made_from_an_image_alone_asks_for_one(tmp_path, capsys):
    tasks.upscaler().save_pretrained(tmp_path / "model")
    message = refused(["generate", tmp_path / "model", *PROMPT, "--out", "x.png"], capsys)
    assert "StableDiffusionUpscalePipeline makes images from images: say which (--image, or --images)" in message
