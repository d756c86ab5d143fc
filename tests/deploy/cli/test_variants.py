"""Every command that reads a model reads the variant of its weights that was asked for."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from deploy.bundle.sources import Selection, open_source
from deploy.cli.app import main
from deploy.cli.commands.bench import job_of

STEPS = ("--steps", "2")
PROMPT = ("--prompt", "a circle")
COMMANDS = {
    "bench": ("MODEL", "PLAIN", "--runtime", "torch"),
    "bundle": ("MODEL", "--target", "server", "--out", "OUT"),
    "compare": ("MODEL", "PLAIN", "--images", "1", "--trajectories", "1", *STEPS),
    "generate": ("MODEL", *PROMPT, "--out", "OUT.png", *STEPS),
    "inspect": ("MODEL",),
    "prompts": ("select", "FILE", "--count", "2", "--model", "MODEL", "--out", "OUT.txt"),
    "validate": ("MODEL", "PLAIN", "--no-image", *STEPS),
}


@pytest.fixture(scope="module")
def places(pipeline, tmp_path_factory) -> dict[str, str]:
    """A model with both variants, whose fp16 weights are others; one without; and prompts."""
    folder = tmp_path_factory.mktemp("variants")
    other = copy.deepcopy(pipeline).to(torch.float16)
    for part in (other.unet, other.text_encoder):
        for tensor in part.parameters():
            tensor.data *= 1.5
    other.save_pretrained(folder / "model", variant="fp16")
    for name in ("model", "plain"):
        pipeline.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("".join(f"a circle of {n} parts\n" for n in range(9)))
    return {"MODEL": str(folder / "model"), "PLAIN": str(folder / "plain"), "FILE": str(folder / "prompts.txt")}


def run(command, places, tmp_path, capsys, *more):
    """The exit code, and what was said on stdout and stderr."""
    filled = [places.get(part, part.replace("OUT", str(tmp_path / "out"))) for part in COMMANDS[command]]
    capsys.readouterr()
    code = main([command, *filled, *more, "--json"])
    return code, capsys.readouterr()


def seen(command, places, tmp_path, capsys, *more):
    """What a command's result shows of the weights that it read."""
    tmp_path.mkdir()
    code, said = run(command, places, tmp_path, capsys, *more)
    assert code == 0 or command == "validate", said.err
    value = json.loads(said.out)
    if command == "generate":
        return (tmp_path / "out.png").read_bytes()
    shown = {
        "compare": lambda: value["noise_error"],
        "inspect": lambda: value["bytes"],
        "prompts": lambda: value["moment_error"],
        "validate": lambda: (code, value["passed"]),
    }
    return shown[command]()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("bench", "bundle")])
def test_the_flag_chooses_the_weights_that_are_read(command, places, tmp_path, capsys):
    unnamed = seen(command, places, tmp_path / "unnamed", capsys)
    assert seen(command, places, tmp_path / "fp16", capsys, "--variant", "fp16") != unnamed


def test_bench_times_the_weights_of_the_variant(places, tmp_path):
    job = job_of(places["MODEL"], "torch", 1, tmp_path / "job", "fp16")
    assert holds_variant(load_file(f"{job.path}/diffusion_pytorch_model.safetensors"), places)


@pytest.mark.parametrize("alone", [False, True])
def test_a_bundle_is_made_of_the_weights_of_the_variant(alone, places, exported):
    selection = Selection("server", variants={places["MODEL"]: "fp16"})
    asked = (f"{exported}/unet", places["MODEL"]) if alone else (places["MODEL"], None)
    assert holds_variant(open_source(*asked, selection).rest.pipeline.unet.state_dict(), places)


def holds_variant(tensors, places) -> bool:
    held = load_file(f"{places['MODEL']}/unet/diffusion_pytorch_model.fp16.safetensors")
    return all(torch.equal(tensors[name], tensor.float()) for name, tensor in held.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_variant_that_no_model_has_is_one_line(command, places, tmp_path, capsys):
    code, said = run(command, places, tmp_path, capsys, "--variant", "ema")
    error = [line for line in said.err.splitlines() if line.startswith("slimdiff: error")]
    assert code == 2 and len(error) == 1 and "variant 'ema'" in error[0] and error[0].endswith("there is fp16")
    assert not list(tmp_path.iterdir())
