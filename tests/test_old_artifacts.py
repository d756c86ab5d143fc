"""What was made by an earlier commit opens today and computes what it computed then.

`fixtures/e267f3d/README.md` says how the artifacts were made.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import deploy
import slimdiff.models  # noqa: F401  (diffusers finds the slim classes there)
from exporters.engine.check import read_engine
from exporters.runtimes.pipeline import load_pipeline
from slimdiff import InputError, Plan, Statistics

MADE = Path(__file__).parent / "fixtures" / "e267f3d"
GROUPS = ["query_key", "value_output", "feed_forward", "resnet"]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """All of it, its folders unpacked."""
    folder = tmp_path_factory.mktemp("old") / "e267f3d"
    shutil.copytree(MADE, folder)
    for archive in folder.glob("*.tar.xz"):
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(MADE / "expected.npz"))


def prediction(unet, expected: dict[str, np.ndarray]) -> np.ndarray:
    given = (torch.from_numpy(expected[name]) for name in ("sample", "timestep", "encoder_hidden_states"))
    with torch.no_grad():
        return unet(*given, return_dict=False)[0].numpy()


def image(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, generator=seed, output_type="np", height=16, width=16).images


def ranks(plan: Plan) -> dict[str, int]:
    return {name: site.rank for name, site in plan.sites.items()}


@pytest.mark.parametrize(
    ("name", "kind", "figures"),
    [
        ("dense", "model", {"parameters": 92_372, "slim": False}),
        ("slim", "model", {"parameters": 73_892, "slim": True, "dense_parameters": 92_372}),
        ("statistics.safetensors", "statistics", {}),
        ("plan.json", "plan", {}),
        ("onnx", "onnx", {}),
        ("engine", "engine", {}),
        ("bundle.tar.zst", "bundle", {}),
        ("build", "build", {}),
    ],
)
def test_it_is_inspected(old, name, kind, figures, capsys):
    found = call(["inspect", old / name], capsys)
    assert found["kind"] == kind and figures.items() <= found.items()


@pytest.mark.parametrize("name", ["dense", "slim"])
def test_a_model_computes_what_it_did(old, expected, name):
    pipeline = DiffusionPipeline.from_pretrained(old / name)
    np.testing.assert_allclose(prediction(pipeline.unet, expected), expected[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(image(pipeline), expected[f"{name}_image"], rtol=0, atol=1e-4)


def test_every_group_was_slimmed(old):
    slimmed = {site.group for site in Plan.load(old / "plan.json").sites.values() if site.rank < site.dense_rank}
    assert slimmed == set(GROUPS)


@pytest.mark.parametrize("by", [["--reduce", "20%", "--groups", ",".join(GROUPS), "--align", 4], ["--plan"]])
def test_statistics_and_plan_give_the_same_model(old, expected, by, tmp_path, capsys):
    plan = old / "plan.json"
    given = ["--statistics", old / "statistics.safetensors", "--prompts", old / "prompts.txt", "--samples", 4]
    given += ["--steps", 2, "--batch", 2, *(by if len(by) > 1 else [*by, plan])]
    call(["compress", old / "dense", "--out", tmp_path / "slim", *given], capsys)
    assert ranks(Plan.load(tmp_path / "slim" / "plan.json")) == ranks(Plan.load(plan))
    found, wanted = load_file(tmp_path / "slim" / WEIGHTS), load_file(old / "slim" / WEIGHTS)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tensor.shape for n, tensor in wanted.items()}
    slim = DiffusionPipeline.from_pretrained(tmp_path / "slim")
    np.testing.assert_allclose(prediction(slim.unet, expected), expected["slim"], rtol=0, atol=1e-3)


def test_statistics_are_added_to_todays(old, tmp_path, capsys):
    file = old / "statistics.safetensors"
    call(["calibrate", "--merge", file, file, "--out", tmp_path / "both.safetensors"], capsys)
    one, both = Statistics.load(file), Statistics.load(tmp_path / "both.safetensors")
    assert both.tokens == {name: 2 * count for name, count in one.tokens.items()}
    assert all(torch.allclose(both.moments[name], 2 * one.moments[name]) for name in one.moments)


def test_an_onnx_folder_computes_what_the_model_did(old, expected):
    pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
    pipeline = load_pipeline(old / "onnx", "onnxruntime", threads=1)
    np.testing.assert_allclose(prediction(pipeline.unet, expected), expected["slim"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(image(pipeline), expected["slim_image"], rtol=0, atol=1e-4)


def test_an_engine_is_what_its_manifest_says(old, tmp_path):
    report = read_engine(old / "engine")
    assert report["inputs"][0]["shape"] == [2, 4, 8, 8] and report["parts"]["runs_on"] == {"targets": ["sm89"]}
    assert {site["site"] for site in report["sites"]} <= set(Plan.load(old / "plan.json").sites)
    changed = shutil.copytree(old / "engine", tmp_path / "engine")
    with (changed / "model.engine").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(InputError, match="model.engine"):
        read_engine(changed)


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_bundle_makes_the_image_that_the_model_made(old, expected, unpacked, tmp_path):
    pytest.importorskip("onnxruntime", reason="the bundle is for ONNX Runtime")
    pytest.importorskip("zstandard", reason="archives need the extra bundle")
    into = tmp_path / "bundle" if unpacked else None
    pipeline = deploy.load(old / "bundle.tar.zst", threads=1, unpack_to=into)
    if into:
        pipeline = deploy.load(into, threads=1)
    np.testing.assert_allclose(image(pipeline), expected["slim_image"], rtol=0, atol=1e-4)


def test_a_build_becomes_a_bundle(old, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    call(["bundle", old / "build", "--target", "edge", "--out", tmp_path / "edge"], capsys)
    assert call(["inspect", tmp_path / "edge"], capsys)["kind"] == "bundle"


def test_a_history_is_read(old, capsys):
    line = json.loads((old / "latency.jsonl").read_text())
    found = call(["bench", "--history", old / "latency.jsonl"], capsys)
    (result,) = found["series"][0]["results"]
    assert (found["skipped_lines"], result["label"], result["time"]) == (0, line["label"], line["time"])
    assert result["value"] == pytest.approx(1 / line["speedup"]["median"])
