"""The smallest build, real and undisturbed, and processes that can be killed: for tests of faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPTS, tiny_pipeline
from faults import contents
from forks import Forks, until

from deploy.artifacts.files import save_pipeline

RECIPE = """
model: tiny
prompts: prompts.txt
calibration: {samples: 2, sampling: {steps: 1, batch: 2}}
budget: {reduce: 8%}
plan: {sensitivity_calls: 1, allocation: local}
engine: {enabled: false}
validate: {calls: 1}
compare: {images: 1, shown: 1, trajectories: 1, sampling: {steps: 1, batch: 1}}
bench: {processes: 3, rounds: 3, warmup: 1}
gates: {parity: true, min_speedup: 0.0001, max_noise_error: 0.9}
"""
SMALLEST = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
    "mid_block_type": None,
}
USED = (  # what the stages import when they run
    "deploy.build.chain",
    "deploy.report.page",
    "deploy.report.sections",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "onnxruntime",
    "onnxscript",
    "exporters.validation.graph",
    "exporters.graphs.precision",
    "exporters.latency.measure",
    "exporters.graphs.export",
    "exporters.validation.parity",
    "exporters.runtimes.unet",
)


@pytest.fixture(scope="package")
def forks(tmp_path_factory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    forks.load("quick_build")
    yield forks
    forks.close()


@pytest.fixture(scope="package")
def workshop(tmp_path_factory, forks) -> Path:
    """A folder with the smallest pipeline that can be slimmed and two recipes; everything that a build needs loaded."""
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    folder = tmp_path_factory.mktemp("faults")
    save_pipeline(tiny_pipeline(**SMALLEST), folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    recipe = RECIPE.replace(": tiny", f": {folder / 'tiny'}").replace(": prompts", f": {folder / 'prompts'}")
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "other.yaml").write_text(recipe.replace("8%", "4%"))
    forks.load(*USED)
    return folder


@pytest.fixture(scope="package")
def undisturbed(workshop, forks) -> dict[str, Any]:
    """What a build leaves that nothing happened to, although another one was started beside it."""
    out = workshop / "build"
    first = forks.command(["build", workshop / "recipe.yaml", "--out", out])
    until(lambda: (out / "calibrate").exists())
    second = forks.command(["build", workshop / "recipe.yaml", "--out", out])
    refused, done = second.wait(), first.wait()
    assert refused.code == 2 and f"(process {first.pid}) is at work in {out}" in refused.error, refused.said
    assert done.code == 0, done.said
    return contents(out)
