"""Bundles: what is in them, what they make, and what is said of one that was changed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused
from PIL import Image

import deploy
from deploy.artifacts.kinds import kind_of
from deploy.bundle.description import read_bundle
from deploy.cli.app import main
from exporters.engine.check import read_engine
from exporters.validation.parity import image_psnr
from slimdiff import InputError, MissingPackageError
from slimdiff.storage import manifest as manifests

for module in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(module, reason=f"{module} is an extra")

SHOT = ["--prompt", "a red circle", "--steps", "3"]


def made(source: Path, out: Path, *flags: Any) -> Path:
    assert main([*map(str, ["bundle", source, "--out", out, *flags]), "--json", "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def edge(exported: Path, workspace: Path) -> Path:
    return made(exported, workspace / "edge", "--target", "edge")


@pytest.fixture(scope="module")
def server(exported: Path, workspace: Path) -> Path:
    return made(exported, workspace / "server", "--target", "server")


@pytest.fixture
def copied(edge, tmp_path) -> Path:
    return shutil.copytree(edge, tmp_path / "copied")


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_an_edge_gets_what_it_needs_and_nothing_else(edge, exported):
    kept = {name for name in files(exported) if not name.startswith("vae_encoder/") and name != "manifest.json"}
    assert files(edge) == kept | {"manifest.json", "README.md", "licenses/slimdiff-LICENSE.txt"}
    bundle = read_bundle(edge)
    (denoiser,) = bundle.description.denoisers
    assert (denoiser.folder, denoiser.shape, denoiser.runtimes) == ("unet", "2x16x16", ["openvino"])
    assert set(bundle.description.packages) == {"slimdiff[openvino]"}
    assert bundle.manifest["made_from"]["manifest"] == manifests.sha256_of(exported / "manifest.json")


def test_the_models_licence_goes_along(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "onnx")
    (folder / "LICENSE.md").write_text("for research only")
    bundle = made(folder, tmp_path / "bundle", "--target", "edge")
    assert (bundle / "licenses" / "model-LICENSE.txt").read_text() == "for research only"
    assert "Apache License" in (bundle / "licenses" / "slimdiff-LICENSE.txt").read_text()


def test_a_server_also_changes_images_and_knows_where_it_is_from(server, edge, exported):
    assert files(server) - files(edge) == {f"vae_encoder/{n}" for n in ("config.json", "model.onnx", "model.onnx.data")}
    manifest = read_bundle(server).manifest
    assert manifest["made_from"]["made_from"] == manifests.read_manifest(exported)["made_from"]
    assert read_bundle(server).description.denoisers[0].runtimes[-1] == "onnxruntime"


def test_a_bundle_makes_the_image_of_what_it_was_made_from(edge, exported, tmp_path, capsys):
    call(["generate", exported, *SHOT, "--out", tmp_path / "onnx.png"], capsys)
    expected = Image.open(tmp_path / "onnx.png")
    for runtime, bound in (("openvino", 35), ("openvino-fp32", 80), ("onnxruntime", 80)):
        asked = ["--runtime", runtime] * (runtime != "openvino")
        value = call(["generate", edge, *SHOT, *asked, "--out", tmp_path / "bundle.png"], capsys)
        assert (value["kind"], value["runtime"]) == ("bundle", runtime) and value["why"]
        assert image_psnr(Image.open(tmp_path / "bundle.png"), expected) >= bound


def test_the_readmes_command_runs(edge, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(edge, tmp_path / "bundle")
    (command,) = [line for line in (edge / "README.md").read_text().splitlines() if line.startswith("slimdiff ")]
    monkeypatch.chdir(folder)
    for _ in range(2):  # what it writes is no part of the bundle, which is therefore still what it was
        assert main([*shlex.split(command)[1:], "--steps", "2"]) == 0
    assert (tmp_path / "image.png").is_file()


def test_the_best_runtime_is_taken_and_named(server, monkeypatch):
    pytest.importorskip("openvino", reason="openvino is an extra")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    pipeline = deploy.load(server, threads=1)
    assert pipeline.chosen.runtime == "openvino-fp32" and pipeline.chosen.title.startswith("OpenVINO")
    assert "CUDAExecutionProvider" in pipeline.chosen.passed_over[0]
    assert pipeline.chosen.why.startswith("the best that is here")
    monkeypatch.setitem(sys.modules, "openvino", None)
    pipeline = deploy.load(server, threads=1)
    assert pipeline.chosen.runtime == "onnxruntime" and "openvino" in pipeline.chosen.why
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(MissingPackageError, match="openvino"):
        deploy.load(server, runtime="openvino")
    with pytest.raises(InputError, match="nothing that tensorrt runs"):
        deploy.load(server, runtime="tensorrt")
    with pytest.raises(InputError, match=r"no denoiser for 512x\* pixels; there is 16x16"):
        deploy.load(server, height=512)


def test_inspect_tells_what_a_bundle_is(edge, capsys):
    value = call(["inspect", edge], capsys)
    assert (value["kind"], value["target"]) == ("bundle", "edge") and value["files"] == len(files(edge)) - 1
    assert main(["inspect", str(edge)]) == 0
    assert "\ndenoisers:\n  name " in capsys.readouterr().out  # a line for each


def test_an_engines_bundle(engine, exported, tmp_path, capsys):
    assert "say with --pipeline" in refused(["bundle", engine, "--target", "edge", "--out", tmp_path / "x"], capsys)
    argv = ["bundle", engine, "--pipeline", exported, "--target", "edge", "--capability"]
    assert "there is: engine, fp32" in refused([*argv, "sm120", "--out", tmp_path / "x"], capsys)
    assert not (tmp_path / "x").exists()
    value = call([*argv, "sm89", "--out", tmp_path / "box"], capsys)
    folder = tmp_path / "box" / value["denoisers"][0]["folder"]
    whole, lean = json.loads((engine / "engine.json").read_text()), read_engine(folder)
    assert lean["key"] == whole["key"] and not {"layers", "attention", "sites"} & lean.keys()
    assert value["packages"]["tensorrt-rtx-cu13"] == f"=={whole['parts']['versions']['tensorrt-rtx']}"
    assert "slim_plan" not in json.loads((folder / "config.json").read_text())
    assert not (tmp_path / "box" / "unet").exists()
    if not torch.cuda.is_available():
        with pytest.raises(MissingPackageError, match="runs on sm89, and there is no GPU here"):
            deploy.load(tmp_path / "box")


def test_several_engines_are_told_apart(engine, tmp_path, capsys):
    for name in ("batch-2", "batch-4"):
        shutil.copytree(engine, tmp_path / "engines" / name)
    manifests.write_manifest(tmp_path / "engines", "engines", {"engines": {}})
    value = call(["inspect", tmp_path / "engines"], capsys)
    assert value["kind"] == "engines" and [e["name"] for e in value["engines"]] == ["batch-2", "batch-4"]
    told = refused(["generate", tmp_path / "engines", *SHOT, "--out", tmp_path / "x.png"], capsys)
    assert "holds several engines: name one of them (batch-2, batch-4)" in told
    manifest = tmp_path / "engines" / "batch-2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("sm89", "sm90"))
    assert "batch-2/manifest.json is not the file" in refused(["inspect", tmp_path / "engines"], capsys)


def test_a_builds_bundle_is_its_slim_model(built, tmp_path, capsys):
    value = call(["bundle", built, "--target", "edge", "--out", tmp_path / "edge"], capsys)
    assert value["source"] == "build" and kind_of(str(tmp_path / "edge")) == "bundle"
    assert manifests.read_manifest(tmp_path / "edge")["made_from"]["build"] == manifests.sha256_of(built / "build.json")
    config = json.loads((tmp_path / "edge" / "unet" / "config.json").read_text())
    assert "slim_plan" not in config
    graph = (built / "export" / "slim" / "model.onnx").read_bytes()
    assert (tmp_path / "edge" / "unet" / "model.onnx").read_bytes() == graph
    call(["generate", tmp_path / "edge", *SHOT, "--runtime", "onnxruntime", "--out", tmp_path / "bundle.png"], capsys)
    call(["generate", built / "slim", *SHOT, "--out", tmp_path / "slim.png"], capsys)
    assert image_psnr(Image.open(tmp_path / "bundle.png"), Image.open(tmp_path / "slim.png")) >= 60


@pytest.mark.slow
def test_a_models_bundle_has_the_sizes_that_were_asked_for(workspace, tmp_path, capsys):
    model = shutil.copytree(workspace / "tiny", tmp_path / "model")
    (model / "LICENSE.md").write_text("for research only")
    argv = ["bundle", model, "--target", "server", "--shape", "2x16x16", "--shape", "2x32x16"]
    value = call([*argv, "--out", tmp_path / "both"], capsys)
    assert [d["vae"] for d in value["denoisers"]] == [".", "sizes/16x8"]
    assert {p.name for p in (tmp_path / "both" / "sizes" / "16x8").iterdir()} == {"vae_decoder", "vae_encoder"}
    assert (tmp_path / "both" / "licenses" / "model-LICENSE.txt").read_text() == "for research only"
    shot = [*SHOT, "--height", 32, "--width", 16, "--runtime", "onnxruntime"]
    value = call(["generate", tmp_path / "both", *shot, "--out", tmp_path / "x.png"], capsys)
    assert (value["height"], value["width"]) == (32, 16)
    call(["generate", model, *SHOT, "--height", 32, "--width", 16, "--out", tmp_path / "torch.png"], capsys)
    assert image_psnr(Image.open(tmp_path / "x.png"), Image.open(tmp_path / "torch.png")) >= 60


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--shape", "16x16"], "such as 2x512x512, not '16x16'"),
        (["--shape", "2x64x64"], "there is: onnx, fp32, 2x16x16"),
        (["--precision", "fp16"], "none of what there is fits"),
        (["--runtime", "tensorrt"], "none of what there is fits"),
    ],
)
def test_what_there_is_not_is_said(exported, tmp_path, capsys, flags, told):
    argv = ["bundle", exported, "--target", "edge", "--out", tmp_path / "x", *flags]
    assert told in refused(argv, capsys)
    assert not (tmp_path / "x").exists()


def flip(folder: Path) -> None:
    file = folder / "unet" / "model.onnx.data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap(folder: Path) -> None:
    one, other = (folder / name / "model.onnx.data" for name in ("text_encoder", "vae_decoder"))
    content = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "unet" / "model.onnx.data", 1000)


def remove(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()


def add(folder: Path) -> None:
    (folder / "unet" / "added_tokens.json").write_text("{}")


def add_pickle(folder: Path) -> None:
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")


def link(folder: Path) -> None:
    data = folder / "unet" / "model.onnx.data"
    shutil.move(data, folder.parent / "elsewhere.data")
    data.symlink_to(folder.parent / "elsewhere.data")


def link_folder(folder: Path) -> None:
    shutil.move(folder / "tokenizer", folder.parent / "elsewhere")
    (folder / "tokenizer").symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip, "model.onnx.data is not the file that the manifest describes"),
        (swap, "model.onnx.data is not the file that the manifest describes"),
        (truncate, "model.onnx.data is not the file that the manifest describes"),
        (remove, "lacks scheduler/scheduler_config.json"),
        (add, "added_tokens.json is not in the artifact's manifest"),
        (add_pickle, "pytorch_model.bin is not in the artifact's manifest"),
        (link, "model.onnx.data is a link"),
        (link_folder, "tokenizer is a link"),
        (pipe, "lacks README.md"),
    ],
)
def test_a_changed_bundle_is_refused(copied, tmp_path, capsys, change, told):
    change(copied)
    assert told in refused(["generate", copied, *SHOT, "--out", tmp_path / "x.png"], capsys)
    assert not (tmp_path / "x.png").exists()


def put(place: str, value: Any):
    def change(manifest):
        *path, last = place.split(".")
        for part in path:
            manifest = manifest[int(part) if part.isdigit() else part]
        manifest[last] = value

    return change


NOTHING = {"sha256": "0" * 64, "bytes": 0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["files"].update({"../outside.json": NOTHING}), "which is outside the artifact"),
        (lambda m: m["files"].update({"/etc/passwd": NOTHING}), "which is outside the artifact"),
        (lambda m: m["files"].update({"unet\\..\\..\\x.json": NOTHING}), "which is outside the artifact"),
        (lambda m: m["files"].update({"a\0b.json": NOTHING}), "which is outside the artifact"),
        (lambda m: m["files"].update({"x" * 300 + ".json": NOTHING}), "which is outside the artifact"),
        (lambda m: m["files"].update({"unet/weights.pt": NOTHING}), "no bundle has files of that kind"),
        (lambda m: m["files"].update({"unet/code.py": NOTHING}), "no bundle has files of that kind"),
        (put("runs_on.denoisers.0.folder", "../unet"), "has no ../unet/model.onnx"),
        (put("runs_on.denoisers.0.vae", "/tmp"), "has no /tmp/vae_decoder/model.onnx"),
        (put("runs_on.denoisers.0.runtimes", ["torch"]), "runs_on.denoisers.0.runtimes.0"),
        (put("runs_on.denoisers", []), "runs_on.denoisers"),
        (put("runs_on", {}), "runs_on.target"),
        (put("files", []), "no table of files"),
        (put("schema", 2), "has schema 2"),
        (put("kind", 3), "kind: "),
    ],
)
def test_a_manifest_leads_nowhere_else(copied, change, told):
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError) as error:
        deploy.load(copied)
    assert told in str(error.value) and "\n" not in str(error.value)


def index_names(entry: Any, name: str = "scheduler"):
    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: entry}))

    return change


def weights_elsewhere(folder: Path) -> None:
    import onnx

    model = onnx.load(str(folder / "unet" / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../text_encoder/model.onnx.data" if entry.key == "location" else entry.value
    (folder / "unet" / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (index_names(["os", "system"]), "asks for os.system"),
        (index_names(["subprocess", "Popen"], "tokenizer"), "asks for subprocess.Popen"),
        (index_names(["transformers", "AutoModel"], "tokenizer"), "no class that belongs there"),
        (index_names(["transformers", "AutoTokenizer"], "tokenizer"), "no class that belongs there"),
        (index_names(["diffusers", "UNet2DConditionModel"]), "no class that belongs there"),
        (index_names(["a", "b", "c"]), "where a library and its class are named"),
        (index_names(5), "could not be loaded"),
        (index_names(["mine", "Mine"], "_class_name"), "which this diffusers does not have"),
        (weights_elsewhere, "names weights outside its folder"),
    ],
)
def test_a_bundle_with_hashes_of_its_own_still_runs_no_code(copied, change, told):
    change(copied)  # and the manifest: hashes are no signature, all else must hold without them
    manifest = manifests.read_manifest(copied)
    manifests.write_manifest(copied, "bundle", manifest["made_from"], manifest["runs_on"])
    with pytest.raises(InputError) as error:
        deploy.load(copied, threads=1)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["folder", "file", "model"])
def test_what_is_no_bundle(tmp_path, workspace, what):
    path = {"folder": tmp_path / "nowhere", "file": tmp_path / "x.tar.zst", "model": workspace / "tiny"}[what]
    (tmp_path / "x.tar.zst").write_bytes(b"nonsense")
    with pytest.raises(InputError):
        deploy.load(path)
