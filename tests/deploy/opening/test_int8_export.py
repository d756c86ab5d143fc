"""`export --precision int8` and what the other commands make of it, on the tiny pipeline."""

from __future__ import annotations

import sys

import pytest
from command_line import call, refused

for module in ("nncf", "onnxscript", "onnxruntime", "openvino", "polygraphy"):
    pytest.importorskip(module, reason=f"{module} is an extra")

from deploy import load  # noqa: E402
from slimdiff.storage import manifest  # noqa: E402


@pytest.fixture(scope="module")
def int8(workspace):
    """The tiny pipeline with its UNet in int8."""
    from deploy.cli.app import main

    argv = ["export", workspace / "tiny", "--out", workspace / "int8", "--precision", "int8", "--int8-calls", "8"]
    assert main([*map(str, argv), "--prompts", str(workspace / "prompts.txt"), "--quiet"]) == 0
    return workspace / "int8"


@pytest.mark.slow
def test_the_manifest_lists_what_is_in_int8_and_what_is_not(int8, exported, capsys):
    report = manifest.verify_manifest(int8)["runs_on"]["int8"]
    assert report["layers"] and 0 < report["calls"] <= 8 and report["weight_bits"] == 7
    found = call(["inspect", int8], capsys)
    assert (
        found["precision"] == "int8" and found["int8_macs"] == pytest.approx(report["share"]) and report["share"] > 0.3
    )
    wide = call(["inspect", exported], capsys)
    assert wide["precision"] == "fp32" and "int8_macs" not in wide and found["bytes"] < 0.6 * wide["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_validate_holds_it_within_the_bounds_of_int8(runtime, int8, workspace, capsys):
    argv = ["validate", workspace / "tiny", int8, "--runtime", runtime, "--steps", "4", "--calls", "2"]
    found = call(argv, capsys)
    assert found["precision"] == "int8" and found["processors"] == "any"
    image = next(row for row in found["checks"] if row["metric"] == "psnr_db")
    assert image["bound"] == 25 and {"noise_error", "weight_steps"} <= {row["metric"] for row in found["checks"]}


@pytest.mark.slow
def test_compare_says_the_precision_of_both(int8, exported, workspace, capsys):
    argv = ["compare", exported, int8, "--images", "1", "--trajectories", "1", "--steps", "2"]
    found = call([*argv, "--prompts", workspace / "prompts.txt", "--pipeline", workspace / "tiny"], capsys)
    assert found["precision"]["dense"] == {"precision": "fp32", "int8_macs": 0}
    assert found["precision"]["slim"]["precision"] == "int8" and found["precision"]["slim"]["int8_macs"] > 0.3
    assert 0 < found["noise_error"]["relative_mse"] < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("target", ["edge", "server"])
def test_it_goes_into_a_bundle(target, int8, tmp_path, capsys):
    call(["bundle", int8, "--target", target, "--precision", "int8", "--out", tmp_path / "b"], capsys)
    (denoiser,) = call(["inspect", tmp_path / "b"], capsys)["denoisers"]
    assert denoiser["precision"] == "int8" and "openvino" in denoiser["runtimes"]
    assert load(tmp_path / "b").chosen.runtime == "openvino"


@pytest.mark.slow
def test_a_build_in_int8_says_the_share_of_both_sides(workspace, tmp_path, capsys):
    recipe = (workspace / "recipe.yaml").read_text() + "export: {precision: int8, int8_error: 1e-2}\n"
    (workspace / "int8.yaml").write_text(recipe)
    built = call(["build", workspace / "int8.yaml", "--out", tmp_path / "build"], capsys)
    assert built["verdict"] == "pass" and min(built["figures"]["int8_macs"].values()) > 0.3
    page = (tmp_path / "build" / "report.html").read_text()
    assert "Five figures" in page and "multiply-adds in int8" in page


def test_what_cannot_be_is_refused_in_one_line(workspace, tmp_path, monkeypatch, capsys):
    tiny, out = workspace / "tiny", tmp_path / "x"
    argv = ["export", tiny, "--out", out, "--precision"]
    assert "leave them out of fp32" in refused([*argv, "fp32", "--prompts", workspace / "prompts.txt"], capsys)
    assert "a UNet alone" in refused(["export", tiny / "unet", "--out", out, "--precision", "int8"], capsys)
    assert "put it into int8 first" in refused(
        ["bundle", tiny, "--target", "edge", "--precision", "int8", "--out", out], capsys
    )
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert "pip install 'slimdiff[int8]'" in refused([*argv, "int8"], capsys, 3)
    assert not out.exists()
