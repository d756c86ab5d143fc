"""`--offload`: a denoiser's weights stay in its files, and the slim model is written while it is made."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from command_line import call, refused
from families.transformers import dit
from safetensors.torch import load_file

from deploy.cli.app import main
from slimdiff import Plan, Sampling, load_pipeline
from slimdiff.denoising.trajectory import sample_images


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A DiT of bf16 in several shards."""
    folder = tmp_path_factory.mktemp("offload") / "dit"
    torch.manual_seed(0)
    pipeline = dit()
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(folder, max_shard_size="30KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


USE = ["--classes", "3,5,7,9", "--steps", "2", "--batch", "2", "--samples", "4"]


def test_a_model_is_calibrated_and_slimmed_with_its_weights_in_its_files(dense, tmp_path, capsys):
    statistics, slim = tmp_path / "statistics.safetensors", tmp_path / "slim"
    told = call(["calibrate", dense, "--offload", "--out", statistics, *USE], capsys)
    assert told["prompts"] == 4 and told["sensitivities"] == 0
    argv = ["compress", dense, "--offload", "--reduce", "10%", "--align", "4", *USE, "--max-shard-size", "30KB"]
    told = call([*argv, "--out", slim, "--statistics", statistics], capsys)
    assert (
        told["parameters"]["slim"] <= 0.9 * told["parameters"]["dense"] and told["macs"]["slim"] < told["macs"]["dense"]
    )
    plan = Plan.load(slim / "plan.json")
    assert (plan.allocation, plan.forms.compensate) == ("local", "none")
    assert len(list((slim / "transformer").glob("*.safetensors"))) > 2
    assert not list(slim.rglob("slim_maps*")) and not list(slim.rglob("*.partial"))
    again = tmp_path / "again"
    assert call([*argv, "--out", again], capsys)["parameters"] == told["parameters"]  # without the file of statistics
    for file in sorted((slim / "transformer").iterdir()):
        assert file.read_bytes() == (again / "transformer" / file.name).read_bytes()
    assert len(sample_images(load_pipeline(slim), [{"class_labels": 3}], Sampling(steps=2, batch=1))) == 1


def test_the_weights_are_those_of_the_model_in_memory(dense, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    call(["compress", dense, "--offload", "--reduce", "10%", "--align", "4", *USE, "--out", tmp_path / "files"], capsys)
    shutil.copy(tmp_path / "files/plan.json", plan)
    call(["compress", dense, "--plan", plan, *USE, "--out", tmp_path / "memory"], capsys)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    files, memory = (load_file(tmp_path / name / weights) for name in ("files", "memory"))
    assert files.keys() == memory.keys() and all(torch.equal(files[name], memory[name]) for name in files)
    config = (tmp_path / name / "transformer/config.json" for name in ("files", "memory"))
    assert len({file.read_text() for file in config}) == 1


def test_the_commands_of_the_page(dense, tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs/transformers.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("slimdiff ") and "--offload" in line]
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, "my-flux")
    for command in commands:
        own = command.replace("--prompts prompts.txt", " ".join([*USE, "--quiet"]))  # a DiT takes no prompts
        assert main(shlex.split(own)[1:]) == 0, command


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["compress", "--reduce", "10%", "--dtype", "bf16"], "--dtype is of weights in memory"),
        (["compress", "--reduce", "10%", "--allocation", "global"], "take the local allocation, or uniform"),
        (["compress", "--max-error", "1e-3"], "a budget of max_error is measured on models in memory"),
        (["calibrate", "--sensitivities"], "--sensitivities take a forward pass for each site and call"),
    ],
)
def test_what_takes_models_in_memory_is_refused_before_the_long_work(argv, line, dense, tmp_path, capsys):
    command, *more = argv
    assert line in refused([command, dense, "--offload", "--out", tmp_path / "out", *more, *USE], capsys)
    assert not (tmp_path / "out").exists()
