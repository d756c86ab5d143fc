"""Checkpoints in half precision, whose files have a variant's name alone, before every command."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from deploy.cli.app import main

STEPS = ("--steps", "2")
SAMPLES = ("--samples", "2", "--batch", "2", *STEPS)
IMAGE = ("--prompt", "a circle", *STEPS, "--out", "image.png")
COMMANDS = {
    "inspect": ("inspect", "half"),
    "prompts": ("prompts", "select", "prompts.txt", "--count", "2", "--model", "half", "--out", "few.txt"),
    "calibrate": ("calibrate", "half", "--out", "statistics.safetensors", *SAMPLES),
    "generate": ("generate", "half", *IMAGE),
    "compare": ("compare", "half", "wide", "--images", "1", "--trajectories", "1", *STEPS),
    "validate": ("validate", "half", "wide", "--no-image", *STEPS),
}


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """`half` in fp16, and `wide`, the same weights in float32."""
    made = tmp_path_factory.mktemp("half")
    half = copy.deepcopy(pipeline).to(torch.float16)
    half.save_pretrained(made / "half", variant="fp16")
    half.to(torch.float32).save_pretrained(made / "wide")
    (made / "prompts.txt").write_text("".join(f"a circle of {n} parts\n" for n in range(5)))
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_in_half_precision_is_taken_for_the_weights_that_it_holds(command, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main([*COMMANDS[command], "--json"]) == 0, capsys.readouterr().err
    value = json.loads(capsys.readouterr().out)
    if command == "inspect":
        assert value["bytes"] == 2 * value["parameters"]
    if command == "compare":
        assert value["noise_error"]["relative_mse"] == 0
    if command == "validate":
        assert value["passed"]
