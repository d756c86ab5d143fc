"""A build by a schedule: its plan is of a whole image; its slim model has the schedule and makes its images by it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from command_line import call, refused
from conftest import PROMPTS

import deploy
from deploy.bundle.description import read_bundle
from exporters.engine.check import read_engine
from exporters.validation.parity import image_psnr
from slimdiff import Plan, Schedule, load_pipeline, schedule_pipeline
from slimdiff.schedule import make_schedule

BUILD = """
prompts: prompts.txt
calibration: {samples: 2, sampling: {steps: 2, batch: 2, guidance: 3}}
plan: {sensitivity_calls: 1, align: 4}
engine: {enabled: false}
validate: {calls: 1}
compare: {images: 2, shown: 1, trajectories: 1, sampling: {steps: 4, batch: 2, guidance: 3}}
bench: {processes: 3, rounds: 3, warmup: 1}
gates: {parity: true}
"""


@pytest.fixture
def folder(workspace, tmp_path) -> Path:
    for name in ("tiny", "prompts.txt"):
        (tmp_path / name).symlink_to(workspace / name)
    make_schedule(3, 4, guidance_interval=(0.0, 0.5), deep_every=2).save(tmp_path / "named.json")
    return tmp_path


def test_a_schedule_of_another_model_stops_a_build_before_the_long_work(folder, capsys):
    make_schedule(4, 4, deep_every=2).save(folder / "named.json")
    (folder / "recipe.yaml").write_text(f"model: tiny\nschedule: named.json\nbudget: {{macs: 6%}}{BUILD}")
    line = refused(["build", folder / "recipe.yaml", "--out", folder / "build"], capsys)
    assert "for a UNet of 4 levels, and this one has 3" in line
    (folder / "recipe.yaml").write_text(f"model: tiny\nschedule: absent.json{BUILD}")
    line = refused(["build", folder / "recipe.yaml", "--out", folder / "build"], capsys)
    assert "absent.json" in line and not (folder / "build" / "calibrate").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_build_follows_its_schedule_to_the_end(folder, pipeline, capsys):
    """Plan, graphs, engine, parity, images, report and bundle."""
    for name in ("onnxscript", "onnxruntime", "polygraphy"):
        pytest.importorskip(name, reason=f"{name} is an extra")
    recipe = f"model: tiny\nschedule: named.json\nbudget: {{macs: 6%}}{BUILD}"
    if built := importlib.util.find_spec("tensorrt_rtx") is not None:
        recipe = recipe.replace("{enabled: false}", "{backend: tensorrt-rtx, targets: [sm89]}")
        recipe += "matrix: {targets: [sm89, onnxruntime], shapes: [2x16x16], precision: [fp32]}\n"
    (folder / "recipe.yaml").write_text(recipe)
    found = call(["build", folder / "recipe.yaml", "--out", folder / "build"], capsys)
    build = folder / "build"
    plan = Plan.load(build / "plan" / "plan.json")
    assert plan.costs["macs_per_image"]["slim"] <= plan.costs["macs_per_image"]["budget"]
    assert Schedule.load(build / "slim").guided == [0, 1]
    assert found["verdict"] == "pass"

    assert (build / "export" / "slim" / "shallow.onnx").is_file()
    assert not (build / "export" / "dense" / "shallow.onnx").exists()
    checks = json.loads((build / "validate" / "validate.json").read_text())["checks"]
    assert {"kept", "shallow"} <= {check["tensor"].partition("@")[0] for check in checks}
    compared = json.loads((build / "compare" / "compare.json").read_text())
    macs = compared["schedule"]["macs_per_image"]
    assert found["figures"]["macs_per_image"] == macs and 0.4 < macs["saved"] < 0.7
    assert compared["images_onnx"]["psnr_db"] is None or compared["images_onnx"]["psnr_db"] > 50
    assert compared["schedule"]["says"] in (build / "report.html").read_text()

    call(["bundle", build, "--target", "server", "--out", folder / "bundle"], capsys)
    assert Schedule.load(folder / "bundle").whole == [0, 2]
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    images = [
        each(PROMPTS[0], generator=torch.Generator().manual_seed(2), **asked).images[0]
        for each in (
            deploy.load(folder / "bundle", "onnxruntime", threads=1),
            schedule_pipeline(load_pipeline(build / "slim", "fp32"), Schedule.load(build / "slim")),
        )
    ]
    assert image_psnr(*images) > 50
    if built:
        denoisers = {d.name: d for d in read_bundle(folder / "bundle").description.denoisers}
        engine = folder / "bundle" / denoisers["engine"].folder
        rows = read_engine(engine)["engines"]
        assert (
            all(site["ok"] for row in rows for site in row["sites"]) and (engine / "shallow" / "model.engine").is_file()
        )
        assert (folder / "bundle" / denoisers["onnx-fp16"].folder / "shallow.onnx").is_file()
        cell = read_engine(build / "cells" / "sm89-2x16x16-fp32" / "engine")
        batches = [profile["sample"]["opt"][0] for profile in cell["parts"]["shapes"]["profiles"]]
        assert batches == [4, 2]  # of two images: with guidance, and without
