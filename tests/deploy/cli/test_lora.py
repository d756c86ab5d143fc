"""`--lora`: fused where a model is read, recorded, and refused by what holds no weights to fuse it into."""

from __future__ import annotations

import json

import pytest
from command_line import call, refused
from loras import kohya
from PIL import Image

from deploy.cli.app import main
from deploy.recipe.recipe import make_recipe
from slimdiff import Plan, load_pipeline
from slimdiff.calibration.calibrate import weights_hash
from slimdiff.storage import manifest

pytest.importorskip("peft", reason="diffusers loads LoRA by peft")


@pytest.fixture(scope="module")
def lora(workspace, pipeline):
    file = workspace / "style.safetensors"
    kohya(pipeline, file, lambda path: "attn" in path)
    return file


@pytest.fixture(scope="module")
def slim(workspace, lora):
    """A slim model of the tiny pipeline with half of the LoRA in it."""
    argv = ["compress", workspace / "tiny", "--out", workspace / "styled", "--reduce", "8%", "--lora", f"{lora}:0.5"]
    argv += ["--prompts", workspace / "prompts.txt", "--samples", "2", "--steps", "2", "--allocation", "uniform"]
    assert main([*map(str, argv), "--quiet"]) == 0
    return workspace / "styled"


def test_a_slim_model_says_which_lora_is_in_it(slim, lora, workspace, capsys):
    record = {"file": "style.safetensors", "sha256": manifest.sha256_of(lora), "scale": 0.5}
    plan = Plan.load(slim / "plan.json")
    assert plan.calibration["lora"] == [record]
    fused = load_pipeline(workspace / "tiny", lora=[f"{lora}:0.5"])
    assert plan.model_hash == weights_hash(fused.unet) != weights_hash(load_pipeline(workspace / "tiny").unet)
    value = call(["inspect", slim], capsys)
    assert value["lora"] == [record] == value["provenance"]["made_from"]["lora"]
    text = load_pipeline(slim).text_encoder.state_dict()
    assert all(tensor.equal(text[name]) for name, tensor in fused.text_encoder.state_dict().items())
    assert str(workspace) not in json.dumps(value["provenance"])


def test_statistics_of_the_fused_model_are_not_the_model_s(slim, lora, workspace, capsys):
    common = ["--prompts", workspace / "prompts.txt", "--samples", "2", "--steps", "2"]
    file = workspace / "styled-statistics.safetensors"
    call(["calibrate", workspace / "tiny", "--out", file, "--lora", lora, *common], capsys)
    argv = ["compress", workspace / "tiny", "--out", workspace / "no", "--reduce", "8%", "--statistics", file]
    assert "taken on another model" in refused([*argv, *common], capsys)


def test_generate_and_compare_fuse_it(lora, slim, workspace, capsys):
    images = []
    for name, more in (("plain", []), ("styled", ["--lora", lora])):
        argv = ["generate", workspace / "tiny", "--prompt", "a", "--steps", "2", "--out", workspace / f"{name}.png"]
        call([*argv, *more], capsys)
        images.append(Image.open(workspace / f"{name}.png").tobytes())
    assert images[0] != images[1]
    argv = ["compare", workspace / "tiny", workspace / "tiny", "--prompts", workspace / "prompts.txt"]
    argv += ["--images", "1", "--trajectories", "1", "--steps", "2"]
    alone = call([*argv, "--lora", lora], capsys)
    both = call([*argv, "--lora", lora, "--slim-lora", lora], capsys)
    assert alone["noise_error"]["relative_mse"] > 1e-6 > both["noise_error"]["relative_mse"] == 0


def test_what_is_no_lora_is_refused_before_anything_is_loaded(lora, workspace, capsys):
    argv = ["generate", workspace / "tiny", "--prompt", "a", "--out", workspace / "no.png", "--lora"]
    (workspace / "pickle.bin").write_bytes(b"\x80\x04")
    for value, reason in (
        (workspace / "gone.safetensors", "there is no such file"),
        (workspace / "pickle.bin", "is a pickle"),
        (f"{lora}:nan", "input should be a finite number, not"),
    ):
        assert reason in refused([*argv, value], capsys)


def test_graphs_take_no_lora(lora, workspace, capsys):
    (workspace / "graph").mkdir(exist_ok=True)
    (workspace / "graph" / "model.onnx").write_bytes(b"")
    argv = ["validate", workspace / "graph", workspace / "graph", "--lora", lora]
    assert main([str(a) for a in argv]) == 2
    from deploy.opening.openers import open_denoiser
    from slimdiff import InputError
    from slimdiff.settings import Lora

    with pytest.raises(InputError, match="fuse it before the export, with slimdiff export MODEL --lora FILE"):
        open_denoiser(str(workspace / "graph"), lora=[Lora(file=str(lora))])


def test_a_recipe_names_files_beside_it(workspace):
    content = {"model": "demo", "lora": ["style.safetensors:0.5", {"file": "other.safetensors", "scale": 2}]}
    recipe = make_recipe(content, "recipe.yaml", workspace)
    assert [(lora.file, lora.scale) for lora in recipe.lora] == [
        (str(workspace / "style.safetensors"), 0.5),
        (str(workspace / "other.safetensors"), 2),
    ]
