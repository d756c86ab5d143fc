"""A UNet in parts goes wherever the whole one goes: every command takes it, and makes the same image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import call, refused
from PIL import Image

from deploy.artifacts.kinds import kind_of
from deploy.bundle.description import read_bundle
from deploy.cli.app import main
from exporters.engine.check import read_engine
from exporters.layout import PARTS
from slimdiff.storage import manifest as manifests

for module in ("onnxscript", "onnxruntime", "polygraphy"):
    pytest.importorskip(module, reason=f"{module} is an extra")

SHOT = ["--prompt", "a red circle", "--steps", 2, "--seed", 3]


@pytest.fixture(scope="module")
def parts(workspace) -> Path:
    """The tiny pipeline, its UNet in parts."""
    out = workspace / "parts"
    assert main(["export", str(workspace / "tiny"), "--split", "--out", str(out), "--quiet"]) == 0
    return out


def image(source: Path, out: Path, capsys, *flags) -> np.ndarray:
    call(["generate", source, *SHOT, *flags, "--out", out], capsys)
    return np.asarray(Image.open(out)).astype(int)


def test_its_folder_says_what_it_is(parts, exported):
    manifest = manifests.verify_manifest(parts, exact=True)
    assert manifest["made_from"]["split"] is True and kind_of(str(parts)) == kind_of(str(parts / "unet")) == "onnx"
    assert {p.name for p in (parts / "unet").iterdir()} == {*PARTS, "config.json"}
    index, whole = (json.loads((folder / "model_index.json").read_text()) for folder in (parts, exported))
    assert index.pop("unet") == ["diffusers", "UNet2DConditionModel"]  # optimum opens no UNet in parts
    assert whole.pop("unet")[1] == "ORTUnet" and index == whole


def test_it_makes_the_image_of_the_whole_graph(parts, exported, tmp_path, capsys):
    whole = image(exported, tmp_path / "whole.png", capsys)
    assert np.abs(whole - image(parts, tmp_path / "parts.png", capsys)).max() <= 1
    alone = image(parts / "unet", tmp_path / "alone.png", capsys, "--pipeline", exported)
    assert np.abs(whole - alone).max() <= 1


def test_validate_holds_it_against_the_whole_graph_and_the_model(parts, exported, workspace, capsys, tmp_path):
    tiny = workspace / "tiny"
    flags = ["--steps", 2, "--calls", 2, "--no-image"]
    value = call(["validate", exported, parts, "--pipeline", tiny, *flags], capsys)
    assert value["passed"]
    assert {c["bound"] for c in value["checks"] if c["metric"] == "relative_l2"} == {1e-6}
    assert [c["tensor"].partition(":")[0] for c in value["checks"] if ":" in c["tensor"]] == [*PARTS] * 2
    assert call(["validate", tiny, parts, *flags, "--every-module"], capsys)["passed"]
    other = shutil.copytree(parts, tmp_path / "other")
    shutil.rmtree(other / "unet" / "prompt")
    shutil.copytree(other / "unet" / "time", other / "unet" / "prompt")
    assert "is not the file that the manifest describes" in refused(["validate", tiny, other, *flags], capsys)
    (other / "manifest.json").unlink()
    assert "has graphs that are not of one export" in refused(["validate", tiny, other, *flags], capsys)


def test_inspect_counts_its_parts(parts, exported, capsys):
    whole, value = (call(["inspect", folder], capsys) for folder in (exported, parts))
    assert whole["parts"] is None and whole["sites"] == value["sites"]
    counted = {row["part"]: row["parameters"] for row in value["parts"]}
    assert set(counted) == set(PARTS) and sum(counted.values()) == value["parameters"]
    assert abs(value["parameters"] - whole["parameters"]) < 30  # constants, which two parts may have
    files = list((parts / "unet").rglob("model.onnx*"))
    assert value["bytes"] == sum(file.stat().st_size for file in files)


def test_an_edge_gets_it_whole_and_runs_it(parts, tmp_path, capsys):
    pytest.importorskip("openvino", reason="openvino is an extra")
    out = tmp_path / "edge"
    call(["bundle", parts, "--target", "edge", "--runtime", "openvino-fp32", "--out", out], capsys)
    (denoiser,) = read_bundle(out).description.denoisers
    assert denoiser.folder == "unet" and denoiser.batch == 2
    assert {p.parent.name for p in (out / "unet").rglob("model.onnx")} == set(PARTS)
    here = image(parts, tmp_path / "here.png", capsys, "--runtime", "openvino-fp32")
    assert np.array_equal(here, image(out, tmp_path / "there.png", capsys))
    told = refused(["bundle", parts, "--split", "--target", "edge", "--out", tmp_path / "x"], capsys)
    assert f"--split: {parts} is exported already" in told


def test_a_part_alone_is_no_denoiser(parts, tmp_path, capsys):
    step = parts / "unet" / "step"
    for argv in (["inspect", step], ["inspect", step / "model.onnx"], ["validate", "demo", step]):
        assert f"is a part of the denoiser in {parts / 'unet'}: name that folder" in refused(argv, capsys)


def test_bench_times_its_step(parts, exported, capsys):
    flags = ["--processes", 2, "--rounds", 3, "--max-seconds", 20]
    value = call(["bench", exported, parts, *flags], capsys)
    assert value["candidate"]["median_ms"] > 0 and value["gate"] is None


@pytest.mark.slow
def test_engines_of_it_are_one_artifact(parts, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="engines need the extra tensorrt-rtx")
    flags = ["--backend", "tensorrt-rtx", "--target", "sm89"]
    out, whole = tmp_path / "engine", tmp_path / "whole"
    call(["engine", parts, "--out", out, *flags], capsys)
    assert call(["engine", parts, "--out", out, *flags], capsys)["reused"]
    manifests.verify_manifest(out, exact=True)
    call(["engine", parts, "--whole", "--out", whole, *flags], capsys)
    assert read_engine(whole / "unet")["key"] == read_engine(out)["key"]
    assert kind_of(str(whole)) == "engine-pipeline" and kind_of(str(out)) == "engine"
    assert call(["inspect", out], capsys)["bytes"] == read_engine(out)["bytes"]
    call(["bundle", out, "--pipeline", parts, "--target", "edge", "--out", tmp_path / "box"], capsys)
    (denoiser,) = read_bundle(tmp_path / "box").description.denoisers
    assert denoiser.capabilities == ["sm89"]
    assert read_engine(tmp_path / "box" / denoiser.folder)["backend"] == "tensorrt-rtx"
    for source, more in ((out, ["--pipeline", parts]), (tmp_path / "box", []), (whole, [])):
        told = refused(["generate", source, *more, *SHOT, "--out", tmp_path / "x.png"], capsys, 3)
        assert "runs on sm89, and there is no GPU here" in told


@pytest.mark.slow
def test_a_build_in_parts_passes_its_gates_and_is_bundled(workspace, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {workspace / "tiny"}
prompts: {tmp_path / "prompts.txt"}
calibration: {{samples: 2, sampling: {{steps: 1, batch: 2}}}}
budget: {{reduce: 8%}}
export: {{split: true}}
engine: {{enabled: false}}
validate: {{calls: 1}}
compare: {{images: 1, shown: 1, trajectories: 1, sampling: {{steps: 1, batch: 1}}}}
bench: {{processes: 3, rounds: 3, warmup: 1}}
gates: {{parity: true}}
"""
    )
    value = call(["build", tmp_path / "recipe.yaml", "--out", tmp_path / "build"], capsys)
    assert value["verdict"] == "pass"
    slim = tmp_path / "build" / "export" / "slim"
    assert {p.name for p in slim.iterdir() if p.is_dir()} == set(PARTS)
    call(["bundle", tmp_path / "build", "--target", "server", "--out", tmp_path / "server"], capsys)
    assert (tmp_path / "server" / "unet" / "step" / "model.onnx").is_file()
    image(tmp_path / "server", tmp_path / "image.png", capsys)


def test_parts_in_int8_are_those_of_the_whole_graph_in_int8(workspace, tmp_path, capsys):
    pytest.importorskip("nncf", reason="int8 needs the extra int8")
    how = ["--precision", "int8", "--int8-error", "1e-2", "--int8-calls", 4, "--prompts", workspace / "prompts.txt"]
    whole = call(["export", workspace / "tiny", "--out", tmp_path / "whole", *how], capsys)["int8"]["layers"]
    parts = call(["export", workspace / "tiny", "--split", "--out", tmp_path / "parts", *how], capsys)["int8"]["layers"]
    assert parts == whole != []
    images = [image(tmp_path / name, tmp_path / f"{name}.png", capsys) for name in ("whole", "parts")]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert call(["validate", workspace / "tiny", tmp_path / "parts", "--calls", 2], capsys)["passed"]
    seen = call(["inspect", tmp_path / "parts"], capsys)
    assert seen["int8_macs"] > 0.3 if "int8_macs" in seen else seen["components"]["unet"]["int8_macs"] > 0.3
