"""A build by a schedule: its plan is of a whole image; its slim model has the schedule and makes its images by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import call, refused

from slimdiff import Plan, Schedule
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
def test_a_build_follows_its_schedule(folder, capsys):
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    (folder / "recipe.yaml").write_text(f"model: tiny\nschedule: named.json\nbudget: {{macs: 6%}}{BUILD}")
    found = call(["build", folder / "recipe.yaml", "--out", folder / "build"], capsys)
    build = folder / "build"
    plan = Plan.load(build / "plan" / "plan.json")
    assert plan.costs["macs_per_image"]["slim"] <= plan.costs["macs_per_image"]["budget"]
    assert Schedule.load(build / "slim").guided == [0, 1]
    assert found["verdict"] == "pass" and (build / "report.html").is_file()
    line = refused(["bundle", build, "--target", "edge", "--out", folder / "bundle"], capsys)
    assert f"bundle {build / 'slim'}" in line
