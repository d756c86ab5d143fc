"""A tiny pipeline on disk, and a recipe that builds it in seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import BOTH, PROMPTS
from metric_weights import weights as weights

from deploy.artifacts.files import save_pipeline
from deploy.cli.app import main

RECIPE = """
model: tiny
prompts: prompts.txt
calibration: {samples: 4, sampling: {steps: 2, batch: 2}}
budget: {reduce: 8%}
plan: {sensitivity_calls: 2}
engine: {enabled: false}
validate: {calls: 2}
compare: {images: 2, shown: 1, trajectories: 1, sampling: {steps: 2, batch: 2}}
bench: {processes: 3, rounds: 3, warmup: 1}
gates: {parity: true, min_speedup: 0.01, max_noise_error: 0.5}
"""


@pytest.fixture(scope="package")
def workspace(tmp_path_factory, pipeline) -> Path:
    """A folder with `tiny` (a diffusers directory), `prompts.txt` and `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("workspace")
    save_pipeline(pipeline, folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="package")
def built(workspace: Path) -> Path:
    """A finished build, and the model beside it; not to be changed."""
    assert main(["build", str(workspace / "recipe.yaml"), "--out", str(workspace / "build"), "--json"]) == 0
    return workspace / "build"


@pytest.fixture(scope="package")
def exported(workspace: Path) -> Path:
    """The tiny pipeline in ONNX, for one guided image at a time; not to be changed."""
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    assert main(["export", str(workspace / "tiny"), "--out", str(workspace / "onnx"), "--json"]) == 0
    return workspace / "onnx"


@pytest.fixture(scope="package")
def scheduled(workspace: Path) -> Path:
    """The tiny pipeline in ONNX by the schedule `BOTH`; not to be changed."""
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    BOTH.save(workspace / "both.json")
    argv = ["export", workspace / "tiny", "--out", workspace / "scheduled", "--schedule", workspace / "both.json"]
    assert main([*map(str, argv), "--json"]) == 0
    return workspace / "scheduled"


@pytest.fixture(scope="package")
def engine(exported: Path, workspace: Path) -> Path:
    """An engine of its UNet, in fp32 for sm89; not to be changed."""
    for name in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: engines need the extra tensorrt-rtx")
    argv = ["engine", exported, "--out", workspace / "engine-sm89", "--backend", "tensorrt-rtx", "--target", "sm89"]
    assert main([*map(str, argv), "--json"]) == 0
    return workspace / "engine-sm89"
