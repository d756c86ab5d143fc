"""Component folders: a UNet alone where that is enough, with its pipeline's or another's components where it is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import call, refused
from PIL import Image

from deploy.cli.app import main
from slimdiff import InputError, Plan, load_pipeline
from slimdiff.calibration.calibrate import weights_hash
from slimdiff.loading.naming import find_component
from slimdiff.loading.pipelines import load_denoiser

FEW = ["--samples", "2", "--steps", "2", "--allocation", "uniform"]
IMAGES = ["--steps", "1", "--batch", "1", "--images", "1", "--trajectories", "1"]


@pytest.fixture(scope="module")
def alone(workspace, pipeline, tmp_path_factory):
    """A UNet of other weights in no pipeline's directory, as a fine-tune is published, with its licence."""
    folder = tmp_path_factory.mktemp("alone") / "finetuned"
    other = type(pipeline.unet).from_config(pipeline.unet.config)
    torch.manual_seed(3)
    for parameter in other.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    other.save_pretrained(folder)
    (folder / "LICENSE.md").write_text("theirs")
    return folder


@pytest.fixture(scope="module")
def slim(alone, workspace):
    """A slim model of it with the other components of the tiny pipeline."""
    out = alone.parent / "slim"
    argv = ["compress", alone, "--pipeline", workspace / "tiny", "--out", out, "--reduce", "8%", *FEW]
    assert main([*map(str, argv), "--prompts", str(workspace / "prompts.txt"), "--quiet"]) == 0
    return out


def test_a_unet_alone_is_slimmed_with_the_other_components_of_a_pipeline(slim, alone, workspace):
    tiny, whole = load_pipeline(workspace / "tiny"), load_pipeline(slim)
    assert Plan.load(slim / "plan.json").model_hash == weights_hash(load_denoiser(alone)) != weights_hash(tiny.unet)
    assert type(whole.unet).__name__ == "SlimUNet2DConditionModel"
    state = whole.text_encoder.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in tiny.text_encoder.state_dict().items())
    assert (slim / "LICENSE.md").read_text() == "theirs"
    assert str(workspace) not in "".join(file.read_text() for file in slim.rglob("*.json"))


def test_a_component_of_a_pipelines_directory_is_opened_with_it(workspace, slim, tmp_path, capsys):
    images = {}
    for number, artifact in enumerate((workspace / "tiny", workspace / "tiny" / "unet", slim, slim / "unet")):
        out = tmp_path / f"{number}.png"
        call(["generate", artifact, "--prompt", "a star", "--steps", "1", "--out", out], capsys)
        images[number] = list(Image.open(out).getdata())
    assert images[0] == images[1] and images[2] == images[3] != images[0]
    file = tmp_path / "statistics.safetensors"
    common = ["--prompts", workspace / "prompts.txt", "--samples", "2", "--steps", "2"]
    call(["calibrate", workspace / "tiny" / "unet", "--out", file, *common], capsys)
    argv = ["compress", workspace / "tiny" / "unet", "--out", tmp_path / "out", "--reduce", "8%", *common]
    call([*argv, "--statistics", file, "--allocation", "uniform"], capsys)
    assert load_pipeline(tmp_path / "out").unet.config["slim_plan"]


def test_artifacts_of_a_unet_alone_are_compared_and_validated_with_a_pipeline(slim, alone, workspace, tmp_path, capsys):
    whole = ["--pipeline", workspace / "tiny"]
    found = call(["compare", alone, slim / "unet", *whole, *IMAGES], capsys)
    assert 0 < found["noise_error"]["relative_mse"] < 1
    found = call(["compare", slim, slim / "unet", *IMAGES], capsys)
    assert found["noise_error"]["relative_mse"] == 0
    shutil.copytree(slim / "unet", tmp_path / "slim-unet")
    found = call(["validate", slim, tmp_path / "slim-unet", "--steps", "1", "--calls", "1", "--no-image"], capsys)
    assert found["passed"]


def test_a_unet_alone_becomes_a_graph(alone, workspace, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    found = call(["export", alone, "--out", tmp_path / "onnx"], capsys)
    assert found["graphs"] == ["model.onnx"]
    assert found["unet_inputs"] == {"sample": [2, 4, 8, 8], "timestep": [], "encoder_hidden_states": [2, 77, 32]}
    assert call(["inspect", tmp_path / "onnx"], capsys)["kind"] == "onnx"
    line = refused(["export", alone, "--out", tmp_path / "no", "--height", "32"], capsys)
    assert "is a UNet alone: say with --pipeline" in line


def test_a_unet_alone_is_looked_at(alone, slim, capsys):
    found = call(["inspect", alone], capsys)
    assert (found["kind"], found["pipeline"], found["slim"]) == ("model", None, False)
    whole = call(["inspect", slim], capsys)
    found = call(["inspect", slim / "unet"], capsys)
    same = ("denoiser", "slim", "parameters", "bytes", "sites", "provenance")
    assert {name: found[name] for name in same} == {name: whole[name] for name in same} and found["macs"]


@pytest.mark.parametrize(
    "argv",
    [
        "compress {alone} --out {out} --reduce 8%",
        "calibrate {alone} --out {out}.safetensors",
        "sweep {alone} --out {out}",
        "generate {alone} --prompt x --out {out}.png",
        "compare {alone} {alone}",
        "validate {alone} {alone}",
        "bundle {alone} --target edge --out {out}",
        "prompts select {prompts} --count 1 --model {alone} --out {out}.txt",
        "build {recipe} --out {out}",
        "lora {lora} --onto {alone} --out {out}.safetensors",
        "engine {alone} --out {out}",
    ],
)
def test_where_a_whole_pipeline_is_needed_one_line_says_so(argv, alone, workspace, tmp_path, capsys):
    places = {"recipe": tmp_path / "recipe.yaml", "lora": tmp_path / "lora.safetensors"}
    places["recipe"].write_text(f"model: {alone}\n")
    places["lora"].write_bytes(b"")
    words = argv.format(alone=alone, out=tmp_path / "out", prompts=workspace / "prompts.txt", **places).split()
    line = refused(words, capsys)
    assert "alone" in line or "no ONNX graph" in line or "neither artifact is a whole model: say with" in line
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.yaml", "lora.safetensors"}


def test_what_completes_nothing_or_is_no_denoiser_is_refused(workspace, tmp_path, capsys):
    tiny = workspace / "tiny"
    argv = ["compress", tiny, "--pipeline", tiny, "--out", tmp_path / "out", "--reduce", "8%"]
    assert "is no denoiser alone" in refused(argv, capsys)
    for argv in (["generate", tiny / "vae", "--prompt", "x", "--out", tmp_path / "x.png"], ["inspect", tiny / "vae"]):
        assert f"is a part of a pipeline and no denoiser: name {tiny}" in refused(argv, capsys)


def test_what_is_written_does_not_go_into_the_pipeline_of_a_component(workspace, capsys):
    argv = ["compress", workspace / "tiny" / "unet", "--reduce", "8%", "--out", workspace / "tiny" / "new"]
    assert "which is read" in refused(argv, capsys)


def test_a_component_is_checked_as_its_pipeline_is(slim, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(slim, whole)
    config = whole / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"sample_size": 16}))
    with pytest.raises(InputError, match="is not the file that the manifest describes"):
        load_denoiser(whole / "unet")
    (whole / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert find_component(whole / "unet").pipeline is None
    config.write_text(json.dumps({"_class_name": "CustomUNet"}))
    with pytest.raises(InputError, match="CustomUNet, which this diffusers does not have"):
        load_denoiser(whole / "unet")


@pytest.mark.slow
def test_a_unet_alone_is_timed_and_bundled(alone, workspace, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    few = ["--processes", "3", "--rounds", "3", "--warmup", "1"]
    found = call(["bench", alone, alone, "--runtime", "torch", "--gate", "latency<=1000", *few], capsys)
    assert found["speedup"]["median"] > 0
    argv = ["bundle", alone, "--pipeline", workspace / "tiny", "--target", "edge", "--runtime", "onnxruntime"]
    call([*argv, "--out", tmp_path / "edge"], capsys)
    image = ["--prompt", "a star", "--steps", "1", "--out", tmp_path / "a.png"]
    assert call(["generate", tmp_path / "edge", *image], capsys)["kind"] == "bundle"
    assert (tmp_path / "edge" / "licenses" / "model-LICENSE.txt").read_text() == "theirs"
