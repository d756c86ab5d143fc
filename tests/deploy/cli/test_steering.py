"""ControlNets and T2I-Adapters on the command line, from a checkpoint to an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, refused
from conftest import tiny_pipeline
from families.family import TWO_LEVELS, quiet
from families.steering import make_adapter, make_controlnet, picture, save_ip_adapter
from PIL import Image

from slimdiff.loading.pipelines import load_pipeline
from slimdiff.settings import SteeringSettings

STEPS = ["--steps", 2, "--guidance", 3]
PROMPT = ["--prompt", "a red circle", *STEPS]
SIZE = ["--height", 16, "--width", 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, two ControlNets and a T2I-Adapter of it, one as a pipeline of its own, and pictures."""
    made = tmp_path_factory.mktemp("steering")
    pipeline = tiny_pipeline(**TWO_LEVELS)
    pipeline.save_pretrained(made / "model")
    for number, name in enumerate(("edges", "depth")):
        make_controlnet(pipeline.unet, number).save_pretrained(made / name)
        picture(number).save(made / f"{name}.png")
    make_adapter((32, 32)).save_pretrained(made / "adapter")
    for name, nets in (("controlled", ["edges"]), ("both", ["edges", "depth"])):
        steering = SteeringSettings(controlnet=tuple(str(made / net) for net in nets))
        quiet(load_pipeline(made / "model", steering=steering)).save_pretrained(made / name)
    picture(size=18).save(made / "odd.png")
    (made / "ip").mkdir()
    save_ip_adapter(pipeline.unet, made / "ip")
    (made / "controls").mkdir()
    for number in range(3):
        picture(number).save(made / "controls" / f"{number}.png")
    (made / "prompts.txt").write_text("a red circle\na blue star\na green ring\n")
    (made / "broken.png").write_bytes((made / "edges.png").read_bytes()[:60])
    return made


def generated(capsys, out: Path, *argv: Any) -> np.ndarray:
    call(["generate", *argv, *PROMPT, "--out", out], capsys)
    return np.asarray(Image.open(out), dtype=int)


def test_a_model_in_torch_is_steered_by_what_is_added_to_it(folder, tmp_path, capsys):
    out, model = tmp_path / "image.png", folder / "model"
    edges, depth = (["--control-image", folder / f"{name}.png"] for name in ("edges", "depth"))
    one = ["--controlnet", folder / "edges"]
    images = [
        generated(capsys, out, *argv)
        for argv in (
            [model],
            [model, *one, *edges],
            [model, *one, *depth],
            [model, *one, "--controlnet", folder / "depth", *edges, *depth],
            [model, *one, *edges, "--image", folder / "depth.png"],
            [model, "--adapter", folder / "adapter", *edges],
            [model, "--ip-adapter", folder / "ip/ip-adapter.safetensors", "--ip-adapter-image", folder / "edges.png"],
        )
    ]
    assert all(abs(a - b).max() > 1 for i, a in enumerate(images) for b in images[:i])
    assert (generated(capsys, out, folder / "controlled", *edges) == images[1]).all()
    assert (generated(capsys, out, folder / "both", *edges, *depth) == images[3]).all()


def test_a_directory_with_a_controlnet_is_compressed_compared_and_run(folder, tmp_path, capsys):
    model, slim, controls = folder / "controlled", tmp_path / "slim", ["--control-images", folder / "controls"]
    prompts = ["--prompts", folder / "prompts.txt"]
    call(["compress", model, "--out", slim, "--reduce", "4%", "--samples", 2, *controls, *prompts, *STEPS], capsys)
    assert json.loads((slim / "model_index.json").read_text())["_class_name"] == "StableDiffusionControlNetPipeline"
    found = call(["compare", model, slim, "--images", 1, "--trajectories", 1, *controls, *prompts, *STEPS], capsys)
    assert 0 < found["noise_error"]["relative_mse"] < 1
    both = [
        generated(capsys, tmp_path / "image.png", slim, "--control-image", folder / f"{name}.png")
        for name in ("edges", "depth")
    ]
    assert abs(both[0] - both[1]).max() > 1
    assert call(["inspect", slim], capsys)["pipeline"] == "StableDiffusionControlNetPipeline"


IP = ["--ip-adapter", "ip/ip-adapter.safetensors"]
REFUSED = {
    "a picture steers StableDiffusionControlNetPipeline: say which (--control-image": ["controlled"],
    "a picture steers StableDiffusionControlNetPipeline": ["controlled", "--image", "edges.png"],
    "no picture steers StableDiffusionPipeline: leave the control image out": ["model", "--control-image", "edges.png"],
    "--control-image is there 2 times for 1": ["controlled", *["--control-image", "edges.png"] * 2],
    "--control-image is there 1 times for 2": [
        *["model", "--controlnet", "edges", "--controlnet", "depth", "--control-image", "edges.png"]
    ],
    "--control-image is there 3 times for 2": ["both", *["--control-image", "edges.png"] * 3],
    "none.png: there is no such file or folder of control images": ["controlled", "--control-image", "none.png"],
    "broken.png cannot be read as a picture": ["controlled", "--control-image", "broken.png"],
    "model is no ControlNetModel: there is no": ["model", "--controlnet", "model", "--control-image", "edges.png"],
    "edges holds a ControlNetModel, and a T2IAdapter is asked for": [
        *["model", "--adapter", "edges", "--control-image", "edges.png"]
    ],
    "no pipeline that ControlNets and a T2I-Adapter steer together": [
        *["model", "--adapter", "adapter", "--controlnet", "edges", "--control-image", "edges.png"]
    ],
    "StableDiffusionPipeline takes a picture as a prompt: say which (--ip-adapter-image)": ["model", *IP],
    "StableDiffusionPipeline has no IP-Adapter: leave out (--ip-adapter-image)": [
        *["model", "--ip-adapter-image", "edges.png"]
    ],
    "StableDiffusionAdapterPipeline takes no IP-Adapter": [
        *["model", *IP, "--adapter", "adapter", "--control-image", "edges.png"]
    ],
    "none.safetensors: there is no such file; an IP-Adapter is FILE": ["model", "--ip-adapter", "none.safetensors"],
    "odd.png: height 18 is no size of StableDiffusionAdapterPipeline, whose sizes are multiples of 4": [
        *["model", "--adapter", "adapter", "--control-image", "odd.png"]
    ],
    "StableDiffusionAdapterPipeline makes no images from images": [
        *["model", "--adapter", "adapter", "--control-image", "edges.png", "--image", "depth.png"]
    ],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_steer_is_one_line(said, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert said in refused(["generate", *REFUSED[said], *PROMPT, "--out", tmp_path / "image.png"], capsys)


EDGES, DEPTH = (["--control-image", f"{name}.png"] for name in ("edges", "depth"))
STEERED = {
    "a ControlNet": (["--controlnet", "edges"], EDGES),
    "two ControlNets": (["--controlnet", "edges", "--controlnet", "depth"], [*EDGES, *DEPTH]),
    "a T2I-Adapter": (["--adapter", "adapter"], EDGES),
    "an IP-Adapter": ([*IP[:1], f"{IP[1]}:0.5"], ["--ip-adapter-image", "edges.png"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEERED)
def test_graphs_a_bundle_and_engines_are_made_of_what_steers(kind, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (steering, pictures), onnx, bundle = STEERED[kind], tmp_path / "onnx", tmp_path / "bundle"
    call(["export", "model", "--out", onnx, *steering], capsys)
    expected = generated(capsys, tmp_path / "image.png", "model", *steering, *pictures)
    call(["bundle", onnx, "--target", "edge", "--out", bundle], capsys)
    command = (bundle / "README.md").read_text().split("--prompt")[0]
    assert [command.count(flag) for flag in pictures[::2]] == [pictures.count(flag) for flag in pictures[::2]]
    for name, more in ((onnx, []), (onnx, ["--runtime", "openvino-fp32"]), (bundle, ["--runtime", "openvino-fp32"])):
        assert abs(generated(capsys, tmp_path / "image.png", name, *pictures, *more) - expected).max() <= 1
    assert call(["validate", "model", onnx, *steering, "--steps", 2], capsys)["passed"]
    if len(pictures) == 2:
        shown = pictures if kind == "an IP-Adapter" else ["--control-images", "controls"]
        counts = ["--images", 1, "--trajectories", 1]
        found = call(["compare", "model", onnx, *steering, *shown, *counts, *STEPS], capsys)
        assert found["noise_error"]["relative_mse"] < 1e-6
    said = refused(["generate", onnx, *steering, *PROMPT, "--out", "a.png"], capsys)
    assert "takes no ControlNet or adapter any more (onnx): add it at export" in said
    pytest.importorskip("tensorrt_rtx", reason="engines need the extra tensorrt-rtx")
    engines = call(["engine", onnx, "--whole", "--out", tmp_path / "engines", "--target", "sm89"], capsys)["engines"]
    assert {"controlnet", "adapter", "image_encoder"} & {engine["name"] for engine in engines}
