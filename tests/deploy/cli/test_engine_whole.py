"""`slimdiff engine --whole`: a pipeline of engines, and what the other commands make of its folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import call, refused

import deploy
from deploy.artifacts.kinds import kind_of
from deploy.cli.app import main
from deploy.cli.commands.bench import job_of
from exporters.engine.build import EngineRequest
from exporters.engine.check import check_engine
from exporters.engine.gpu import Gpu, gpu_here
from exporters.runtimes.pipeline import load_pipeline
from slimdiff.errors import InputError, MissingPackageError
from slimdiff.storage import manifest as manifests
from slimdiff.storage.lock import locked

NAMES = ["unet", "text_encoder", "vae_decoder", "vae_encoder"]
ENGINES = ["--backend", "tensorrt-rtx", "--target", "sm89"]


@pytest.fixture(scope="module")
def interrupted(exported, engine, tmp_path_factory) -> Path:
    """A pipeline whose build was interrupted at its third engine, and once before by a signal that nothing catches."""
    out = tmp_path_factory.mktemp("interrupted") / "pipeline"
    shutil.copytree(engine, out / "unet")  # the very engine that would be built
    (out / ".text_encoder.0123abcd.partial").mkdir()
    build = EngineRequest.build

    def stop(request, folder):
        if request.onnx_file.parent.name == "vae_decoder":
            raise KeyboardInterrupt
        return build(request, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineRequest, "build", stop)
        assert main(["engine", str(exported), "--whole", "--out", str(out), *ENGINES]) == 130
    return out


@pytest.fixture(scope="module")
def whole(interrupted, exported) -> Path:
    """The pipeline, from where that was interrupted; not to be changed."""
    out = shutil.copytree(interrupted, interrupted.parent / "whole")
    assert main(["engine", str(exported), "--whole", "--out", str(out), *ENGINES]) == 0
    return out


def test_an_interrupted_pipeline_is_none_and_loses_no_engine(interrupted):
    assert {p.name for p in interrupted.iterdir()} == {"unet", "text_encoder"}
    with pytest.raises(InputError, match="nothing that slimdiff knows"):
        kind_of(str(interrupted))
    for name in ("unet", "text_encoder"):
        assert check_engine(interrupted / name, gpu=lambda: Gpu("a GPU", "sm89", "580.65"))


def test_it_goes_on_where_it_was_interrupted(interrupted, whole):
    for name in ("unet", "text_encoder"):
        assert (whole / name / "model.engine").read_bytes() == (interrupted / name / "model.engine").read_bytes()
    assert not list(whole.glob(".*"))


def test_every_graph_is_an_engine_and_the_rest_goes_along(whole, exported):
    manifest = manifests.verify_manifest(whole, exact=True)
    assert kind_of(str(whole)) == manifest["kind"] == "engine-pipeline"
    reports = {name: check_engine(whole / name, gpu=lambda: Gpu("a GPU", "sm89", "580.65")) for name in NAMES}
    assert manifest["made_from"]["engines"] == {name: report["key"] for name, report in reports.items()}
    assert manifest["made_from"]["onnx"] == manifests.read_manifest(exported)["made_from"]
    assert manifest["runs_on"]["runtime"] == "tensorrt-rtx" and manifest["runs_on"]["targets"] == ["sm89"]
    assert reports["unet"]["inputs"][0]["shape"] == [2, 4, 8, 8]
    assert reports["text_encoder"]["parts"]["shapes"]["profiles"][0]["input_ids"]["max"][0] == 2
    assert not list(whole.rglob("*.onnx*"))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"):
        assert (whole / name).read_bytes() == (exported / name).read_bytes()


def test_nothing_is_built_again_and_the_rest_is_brought_up_to_date(whole, exported, tmp_path, capsys):
    out, source = shutil.copytree(whole, tmp_path / "whole"), shutil.copytree(exported, tmp_path / "onnx")
    shutil.rmtree(source / "vae_encoder")
    (source / "manifest.json").unlink()
    scheduler = source / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"steps_offset": 0}))
    engines = call(["engine", source, "--whole", "--out", out, *ENGINES], capsys)["engines"]
    assert [(e["name"], e["reused"]) for e in engines] == [(name, True) for name in NAMES[:3]]
    assert (out / "scheduler" / "scheduler_config.json").read_text() == scheduler.read_text()
    assert not (out / "vae_encoder").exists()
    manifests.verify_manifest(out, exact=True)


def test_what_does_not_fit_into_memory_leaves_the_pipeline_as_it_was(whole, exported, capsys, monkeypatch):
    monkeypatch.setattr("exporters.engine.build.available_memory", lambda: 10**8)
    argv = ["engine", exported, "--whole", "--out", whole, *ENGINES, "--tf32"]
    assert "0.1 GB are free" in refused(argv, capsys)
    assert manifests.verify_manifest(whole, exact=True)["kind"] == "engine-pipeline"


def test_two_runs_do_not_write_into_one_folder(exported, tmp_path, capsys):
    out = tmp_path / "whole"
    with locked(out, "engine pipeline", stays=False):
        told = refused(["engine", exported, "--whole", "--out", out, *ENGINES], capsys)
        assert f"another engine pipeline (process {os.getpid()}) is at work in {out}" in told
        assert [p.name for p in out.iterdir()] == [manifests.LOCK]
    assert not list(out.iterdir())


def test_inspect_lists_its_engines(whole, capsys):
    value = call(["inspect", whole], capsys)
    assert value["kind"] == "engine-pipeline" and {e["name"] for e in value["engines"]} == set(NAMES)
    assert value["bytes"] == sum((whole / name / "model.engine").stat().st_size for name in NAMES)


@pytest.mark.skipif(gpu_here() is not None, reason="there is a GPU here")
@pytest.mark.parametrize(
    "command",
    [
        "generate whole --prompt x --out x.png",
        "generate engine --pipeline whole --prompt x --out x.png",
        "validate tiny whole",
    ],
)
def test_all_that_is_missing_is_the_gpu(whole, engine, workspace, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    places = {"whole": whole, "engine": engine, "tiny": workspace / "tiny"}
    told = refused([places.get(word, word) for word in command.split()], capsys, 3)
    assert "runs on sm89, and there is no GPU here" in told and not (tmp_path / "x.png").exists()


@pytest.mark.skipif(gpu_here() is not None, reason="there is a GPU here")
def test_its_pipeline_opens_as_far_as_the_gpu(whole):
    with pytest.raises(MissingPackageError, match="runs on sm89, and there is no GPU here"):
        load_pipeline(whole, "tensorrt-rtx")


def test_a_part_from_elsewhere_is_found_out(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "whole")
    shutil.rmtree(out / "text_encoder")
    shutil.copytree(out / "vae_decoder", out / "text_encoder")
    with pytest.raises(InputError, match="text_encoder/.* is not the file that the manifest describes"):
        load_pipeline(out, "tensorrt-rtx")


def test_bench_times_its_unet(whole, tmp_path):
    job = job_of(str(whole), None, 2, tmp_path)
    assert (job.runtime, Path(job.path)) == ("tensorrt-rtx", whole / "unet")


def test_other_runtimes_and_bundles(whole, exported, tmp_path, capsys):
    shot = ["--prompt", "x", "--out", tmp_path / "x.png"]
    told = refused(["generate", whole, *shot, "--runtime", "openvino"], capsys)
    assert "leave out --runtime for tensorrt-rtx" in told
    with pytest.raises(InputError, match="'engine-pipeline', not of a bundle"):
        deploy.load(whole)
    argv = ["bundle", whole, "--target", "edge", "--capability", "sm89", "--out", tmp_path / "box"]
    assert "a bundle has them in ONNX: say with --pipeline" in refused(argv, capsys)
    assert "a bundle has them in ONNX: say with --pipeline" in refused([*argv, "--pipeline", whole], capsys)
    value = call([*argv, "--pipeline", exported], capsys)
    assert [d["runtimes"] for d in value["denoisers"]] == [["tensorrt-rtx"]]
    assert (tmp_path / "box" / "vae_decoder" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["onnx", "--whole", "--out", "onnx"], "--out onnx is onnx, which is read"),
        (
            ["onnx", "--whole", "--out", "dense"],
            "is of the kind 'onnx', and a pipeline of engines would take its place",
        ),
        (["onnx", "--whole", "--out", "engine"], "is of the kind 'engine', and a pipeline"),
        (["onnx", "--out", "whole"], "is of the kind 'engine-pipeline', and an engine would take its place"),
        (["onnx", "--whole", "--out", "new", "--batch", "2", "--batch", "4"], "--whole makes one pipeline"),
        (["onnx/unet", "--whole", "--out", "new"], "is no exported pipeline"),
        (["onnx", "--whole", "--out", "new", "--batch", "4"], "has batch 2, the engine was asked for batch 4"),
    ],
)
def test_what_cannot_be(whole, exported, engine, tmp_path, capsys, monkeypatch, argv, told):
    for name, place in (("onnx", exported), ("engine", engine), ("whole", whole)):
        (tmp_path / name).symlink_to(place)
    shutil.copytree(exported, tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    assert told in refused(["engine", *argv, *ENGINES], capsys)
    assert not (tmp_path / "new").exists()
