"""A model with a schedule as engines: what its steps run is built, and the commands take the folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import call, refused
from conftest import BOTH

from deploy.artifacts.schedules import find_schedule
from deploy.bundle.description import read_bundle
from deploy.cli.app import main
from deploy.opening.schedules import compute_of
from exporters.engine.check import read_engine
from exporters.engine.gpu import gpu_here
from slimdiff import Sampling, Schedule
from slimdiff.schedule import make_schedule
from slimdiff.storage import manifest as manifests

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

BUILDS = ["--backend", "tensorrt-rtx", "--target", "sm89"]


@pytest.fixture(scope="module")
def engine(scheduled, tmp_path_factory) -> Path:
    for name in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: engines need the extra tensorrt-rtx")
    out = tmp_path_factory.mktemp("scheduled") / "engine"
    assert main(["engine", str(scheduled), "--out", str(out), *BUILDS, "--quiet"]) == 0
    return out


def test_its_folder_has_the_schedule_and_both_engines(engine, scheduled, capsys):
    manifests.verify_manifest(engine, exact=True)
    assert Schedule.load(engine) == BOTH
    value = call(["inspect", engine], capsys)
    assert [row["file"] for row in value["engines"]] == ["model.engine", "shallow/model.engine"]
    assert value["schedule"] == str(BOTH) and value["bytes"] == sum(row["bytes"] for row in value["engines"])
    again = call(["engine", scheduled, "--out", engine, *BUILDS], capsys)
    assert again["reused"]
    manifests.verify_manifest(engine, exact=True)


def test_a_schedule_that_changes_its_steps_alone_builds_nothing(engine, scheduled, tmp_path, capsys):
    source, out = shutil.copytree(scheduled, tmp_path / "onnx"), shutil.copytree(engine, tmp_path / "engine")
    other = make_schedule(3, 8, guidance_interval=(0.0, 0.5), deep_every=2)
    manifests.put_file(source, "schedule.json", other.save)
    assert call(["engine", source, "--out", out, *BUILDS], capsys)["reused"]
    assert Schedule.load(out) == other
    manifests.verify_manifest(out, exact=True)
    manifests.put_file(source, "schedule.json", make_schedule(3, 8, deep_every=2, depth="up_blocks.1").save)
    line = refused(["engine", source, "--out", out, *BUILDS], capsys)
    assert "begins with up_blocks.2, and the schedule reuses up_blocks.1: export the model with this schedule" in line


@pytest.mark.parametrize("target", ["edge", "server"])
def test_a_bundle_has_both_engines_and_the_schedule(target, engine, scheduled, tmp_path, capsys):
    argv = ["bundle", engine, "--pipeline", scheduled, "--target", target, "--capability", "sm89"]
    value = call([*argv, "--out", tmp_path / "bundle"], capsys)
    bundle = read_bundle(tmp_path / "bundle")
    (denoiser,) = bundle.description.denoisers
    folder = bundle.folder / denoiser.folder
    assert value["denoisers"][0]["runtimes"] == ["tensorrt-rtx"] and denoiser.batch is None
    assert Schedule.load(bundle.folder) == BOTH
    assert read_engine(folder)["key"] == read_engine(engine)["key"]
    assert read_engine(folder / "shallow")["parts"]["depth"] == BOTH.depth
    assert ("engines" in read_engine(folder)) == (target == "server")


@pytest.mark.skipif(gpu_here() is not None, reason="there is a GPU here")
def test_all_that_running_it_misses_is_the_gpu(engine, scheduled, workspace, tmp_path, capsys):
    asked = ["--pipeline", scheduled, "--prompt", "a", "--out", tmp_path / "a.png"]
    assert "there is no GPU here" in refused(["generate", engine, *asked], capsys, 3)
    assert "there is no GPU here" in refused(["validate", workspace / "tiny", engine], capsys, 3)


def test_validate_finds_a_fault_in_the_shallow_graph(scheduled, workspace, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    flags = ["--steps", 6, "--calls", 2, "--schedule", scheduled / "schedule.json"]
    value = call(["validate", workspace / "tiny", scheduled, *flags], capsys)
    assert value["passed"] and value["schedule"]["whole"] == BOTH.whole
    names = {row["tensor"].partition("@")[0] for row in value["checks"]}
    assert {"out_sample", "kept", "shallow", "image#0"} <= names
    copied = shutil.copytree(scheduled, tmp_path / "onnx")
    (copied / "manifest.json").unlink()
    model = onnx.load(str(copied / "unet" / "shallow.onnx"), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type = "Tanh"
    (copied / "unet" / "shallow.onnx").write_bytes(model.SerializeToString())
    value = call(["validate", workspace / "tiny", copied, *flags], capsys, 1)
    assert value["first_diverging"].startswith("shallow@")
    assert all(row["passed"] for row in value["checks"] if row["tensor"].startswith(("out_sample@t", "kept")))
    call(["validate", workspace / "tiny", copied, *flags[:4], "--schedule", "none"], capsys)


def test_the_schedule_of_a_graph_named_alone_is_its_pipelines(scheduled, tmp_path):
    for name in (scheduled, scheduled / "unet", scheduled / "unet" / "model.onnx"):
        assert find_schedule(str(name), None) == BOTH
    alone = shutil.copytree(scheduled / "unet", tmp_path / "unet")
    assert find_schedule(str(alone), None) is None and find_schedule(str(scheduled / "unet"), "none") is None


def test_neither_another_component_nor_the_embedded_model_has_the_schedule_around_it(scheduled, monkeypatch):
    assert (scheduled / "vae_decoder" / "model.onnx").is_file()
    for name in ("vae_decoder", "vae_decoder/model.onnx"):
        assert find_schedule(str(scheduled / name), None) is None
    monkeypatch.chdir(scheduled)
    assert find_schedule("unet", None) == BOTH and find_schedule("demo", None) is None


def test_compare_counts_what_a_graph_saves_as_it_counts_its_models(scheduled, workspace, tmp_path, capsys):
    asked = ["--images", 2, "--trajectories", 1, "--steps", 6, "--batch", 1, "--guidance", 3]
    (tmp_path / "prompts.txt").write_text("a red circle\na star\n")
    asked += ["--prompts", tmp_path / "prompts.txt", "--schedule", scheduled / "schedule.json"]
    torch_, graph, both = (
        call(["compare", *pair, *asked], capsys)["macs_per_image"]
        for pair in ((workspace / "tiny",) * 2, (workspace / "tiny", scheduled), (scheduled, scheduled))
    )
    assert graph == both == torch_ and 0.4 < graph["saved"] < 0.6


def test_compare_says_why_a_graph_is_not_counted():
    unet = SimpleNamespace(config={"_class_name": "SlimUNet2DConditionModel"}, inputs={"sample": (1, 4, 8, 8)})
    edge: Any = SimpleNamespace(name="edge", pipeline=None, opened=SimpleNamespace(kind="bundle", denoiser=unet))
    found = compute_of(edge, edge, Sampling(), 2)
    assert found["saved"] is None and found["why"].startswith("edge does not have its plan any more")
    unet.inputs["image_embeds_0"] = (1, 4)
    assert "the layers of an IP-Adapter" in compute_of(edge, edge, Sampling(), 2)["why"]


def test_a_bundle_of_graphs_that_cannot_follow_their_schedule_names_the_users_folder(scheduled, tmp_path, capsys):
    copied = shutil.copytree(scheduled, tmp_path / "onnx")
    (copied / "manifest.json").unlink()
    (copied / "unet" / "shallow.onnx").unlink()
    line = refused(["bundle", copied, "--target", "edge", "--out", tmp_path / "bundle"], capsys)
    assert f"{copied / 'unet'} has no shallow.onnx, and the schedule reuses {BOTH.depth}: " in line
    assert line.endswith("export the model with this schedule or none (slimdiff export --schedule)")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_pipeline_of_engines_has_the_schedule_beside_its_index(engine, scheduled, tmp_path, capsys):
    out = tmp_path / "whole"
    (out / "unet").parent.mkdir()
    shutil.copytree(engine, out / "unet")
    (out / "unet" / "schedule.json").unlink()
    about = manifests.read_manifest(out / "unet")
    manifests.write_manifest(out / "unet", "engine", about["made_from"], about["runs_on"])
    value = call(["engine", scheduled, "--whole", "--out", out, *BUILDS], capsys)
    assert value["engines"][0]["reused"] and (out / "unet" / "shallow" / "model.engine").is_file()
    manifests.verify_manifest(out, exact=True)
    assert Schedule.load(out) == BOTH
    text = json.loads((out / "text_encoder" / "engine.json").read_text())["parts"]["shapes"]
    assert len(text["profiles"]) == 1
    argv = ["bundle", out, "--pipeline", scheduled, "--target", "edge", "--capability", "sm89"]
    call([*argv, "--out", tmp_path / "bundle"], capsys)
    assert len(list((tmp_path / "bundle").rglob("shallow/model.engine"))) == 1
