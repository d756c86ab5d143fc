"""`--lora`: fused where a model is read, recorded, and refused by what holds no weights to fuse it into."""

from __future__ import annotations

import json

import pytest
from command_line import call, refused
from loras import kohya, peft_layout
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


@pytest.fixture(scope="module")
def plain(workspace):
    """The tiny pipeline slim, without any LoRA in it."""
    argv = ["compress", workspace / "tiny", "--out", workspace / "plain", "--reduce", "8%", "--quiet"]
    argv += ["--prompts", workspace / "prompts.txt", "--samples", "2", "--steps", "2", "--allocation", "uniform"]
    assert main([str(a) for a in argv]) == 0
    return workspace / "plain"


def test_a_lora_is_converted_onto_a_slim_model_and_used_there(plain, lora, workspace, capsys):
    out = workspace / "converted.safetensors"
    value = call(["lora", lora, "--onto", plain, "--out", out], capsys)
    assert value["layers"]["converted"] > 10 and value["layers"]["unchanged"] > 0 and value["error"] is None
    assert value["bytes"] == out.stat().st_size and value["made_from"]["lora"]["file"] == "style.safetensors"
    argv = ["generate", plain, "--prompt", "a", "--steps", "2", "--out"]
    call([*argv, workspace / "without.png"], capsys)
    call([*argv, workspace / "with.png", "--lora", out], capsys)
    assert Image.open(workspace / "without.png").tobytes() != Image.open(workspace / "with.png").tobytes()
    assert "does not fit" in (line := refused([*argv, workspace / "no.png", "--lora", lora], capsys))
    assert "convert it with slimdiff lora" in line
    assert call(["lora", lora, "--onto", plain, "--out", out], capsys)["out"] == str(out)  # its own is replaced


def test_the_errors_of_a_conversion_are_measured_against_the_dense_model(plain, lora, workspace, capsys):
    argv = ["lora", lora, "--onto", plain, "--out", workspace / "measured.safetensors", "--dense", workspace / "tiny"]
    argv += ["--prompts", workspace / "prompts.txt", "--samples", "2", "--steps", "2"]
    error = call(argv, capsys)["error"]
    assert error.keys() == {"converted", "slim_of_fused", "between", "lora"}
    assert all(0 < value < 10 for value in error.values())
    assert main([*map(str, argv), "--quiet"]) == 0
    assert "slim with the converted LoRA, against dense with the LoRA" in capsys.readouterr().out


def test_conversions_that_make_no_sense_are_refused(plain, lora, workspace, capsys):
    out, tiny = workspace / "refused.safetensors", workspace / "tiny"
    own = plain / "unet" / "diffusion_pytorch_model.safetensors"
    copied = workspace / "copied.safetensors"
    copied.write_bytes(lora.read_bytes())
    for argv, reason in (
        ([lora, "--onto", tiny, "--out", out], "is a dense model, which takes the LoRA as it is"),
        ([workspace / "gone.safetensors", "--onto", plain, "--out", out], "there is no such file"),
        ([lora, "--onto", workspace / "gone", "--out", out], "no such directory"),
        ([lora, "--onto", plain, "--out", workspace / "a.bin"], "ends in .safetensors"),
        ([lora, "--onto", plain, "--out", lora], "is read"),
        ([lora, "--onto", plain, "--out", own], "lies in"),
        ([lora, "--onto", plain, "--out", copied], "slimdiff lora did not write it"),
        ([lora, "--onto", plain, "--out", out, "--samples", "2"], "name the model with --dense"),
        ([own, "--onto", plain, "--out", out], "that is no LoRA"),
    ):
        assert reason in refused(["lora", *argv], capsys)
    assert not out.exists()


def test_maps_are_in_the_manifest_and_can_be_left_out(plain, workspace, capsys):
    assert "slim_maps.safetensors" in manifest.read_manifest(plain)["files"]
    argv = ["compress", workspace / "tiny", "--out", workspace / "bare", "--plan", plain / "plan.json", "--no-maps"]
    argv += ["--prompts", workspace / "prompts.txt", "--samples", "2", "--steps", "2", "--allocation", "uniform"]
    call(argv, capsys)
    assert not (workspace / "bare" / "slim_maps.safetensors").exists()
    line = refused(
        ["lora", workspace / "style.safetensors", "--onto", workspace / "bare", "--out", "x.safetensors"], capsys
    )
    assert "compress the dense model again" in line


@pytest.mark.slow
def test_on_the_embedded_model_a_conversion_is_close_to_slimming_with_it(tmp_path, capsys):
    """Of rank 4 in every layer of its transformers."""
    demo = load_pipeline("demo")
    peft_layout(demo, tmp_path / "a.safetensors", lambda path: "attn" in path or "ff.net" in path, size=0.02)
    common = ["--samples", "8", "--steps", "8"]
    argv = ["compress", "demo", "--out", tmp_path / "slim", "--reduce", "12%", "--allocation", "uniform"]
    call([*argv, *common], capsys)
    argv = ["lora", tmp_path / "a.safetensors", "--onto", tmp_path / "slim", "--out", tmp_path / "b.safetensors"]
    error = call([*argv, "--dense", "demo", *common], capsys)["error"]
    assert error["between"] < 0.5 * error["lora"] and error["converted"] < 0.5 * error["lora"]
