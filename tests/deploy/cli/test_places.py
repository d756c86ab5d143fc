"""No command writes over what it reads, over another kind of artifact, or over a file that is the user's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command_line import actions_of, refused

from deploy.cli import outputs
from deploy.cli.app import COMMANDS, main
from slimdiff.storage import manifest

PLACES = {"FILE", "FILE.svg", "DIR", "DIR_OR_FILE", "PNG", "RECIPE.yaml", "MODEL", "ARTIFACT", "BASE", "CANDIDATE"}


@pytest.fixture
def folder(workspace, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with copies of the model, the recipe and the prompts in `in`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    shutil.copytree(workspace / "tiny", tmp_path / "in" / "tiny")
    for name in ("recipe.yaml", "prompts.txt"):
        shutil.copy(workspace / name, tmp_path / "in" / name)
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "apart").mkdir()
    shutil.copytree(workspace / "tiny", tmp_path / "apart" / "tiny")
    shutil.move(tmp_path / "apart" / "tiny" / "unet", tmp_path / "weights" / "unet")
    (tmp_path / "apart" / "tiny" / "unet").symlink_to(tmp_path / "weights" / "unet")
    (tmp_path / "s.safetensors").write_bytes(b"")
    return tmp_path


def seen(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("export in/tiny --out in/tiny", "--out in/tiny is in/tiny, which is read: name another place"),
        ("export in/tiny --out in/../link/tiny", "is in/tiny, which is read"),
        ("export link/tiny --out in/tiny", "is link/tiny, which is read"),
        ("export in/tiny --out in", "--out in holds in/tiny, which is read"),
        ("export in/tiny --out .", "holds in/tiny"),
        ("export in/tiny --out in/tiny/unet", "lies in in/tiny"),
        ("export apart/tiny --out weights", "holds apart/tiny, which is read"),
        ("export apart/tiny --out weights/unet", "is apart/tiny, which is read"),
        ("compress in/tiny --out in/tiny --reduce 8%", "is in/tiny, which is read"),
        ("compress in/tiny --out in --reduce 8%", "holds in/tiny"),
        ("compress demo --out in --reduce 8% --prompts in/prompts.txt", "holds in/prompts.txt"),
        ("compress demo --out in --reduce 8% --statistics in/prompts.txt", "holds in/prompts.txt"),
        ("compress demo --out in --plan in/recipe.yaml", "holds in/recipe.yaml"),
        ("calibrate in/tiny --out in/tiny/statistics.safetensors", "lies in in/tiny"),
        ("calibrate --merge s.safetensors --out s.safetensors", "is s.safetensors, which is read"),
        ("sweep in/tiny --out in/tiny", "is in/tiny"),
        ("build in/recipe.yaml --out in", "holds in/recipe.yaml"),
        ("build in/recipe.yaml --out in/tiny", "is in/tiny, which is read"),
        ("prompts select in/prompts.txt --count 1 --model demo --out in/prompts.txt", "is in/prompts.txt"),
        ("bundle in/tiny --target edge --out in/tiny/bundle", "lies in in/tiny"),
        ("bundle demo --pipeline in/tiny --target edge --out in", "holds in/tiny"),
        ("engine in --out in", "is in, which is read"),
        ("generate in/tiny --prompt x --out in/tiny/x.png", "lies in in/tiny"),
        ("bench in/tiny demo --junit in/tiny/x.xml", "--junit in/tiny/x.xml lies in in/tiny"),
        ("bench demo demo --junit x.xml --markdown ./x.xml", "--junit and --markdown are both x.xml"),
    ],
)
def test_what_is_read_is_never_written_over(folder, argv, says, capsys):
    before = seen(folder)
    assert says in refused(argv.split(), capsys)
    assert seen(folder) == before


def test_what_a_recipe_names_is_never_written_over(folder, capsys):
    (folder / "other.yaml").write_text((folder / "in" / "recipe.yaml").read_text().replace("tiny", "in/tiny"))
    (folder / "tiny.yaml").write_text("model: in/tiny\nprompts: in/prompts.txt\n")
    assert "--out in/tiny is in/tiny" in refused(["build", "other.yaml", "--out", "in/tiny"], capsys)
    (folder / "out").mkdir()
    shutil.copy("in/prompts.txt", "out/prompts.txt")
    (folder / "tiny.yaml").write_text("model: in/tiny\nprompts: out/prompts.txt\n")
    assert "--out out holds out/prompts.txt" in refused(["build", "tiny.yaml", "--out", "out"], capsys)
    (folder / "in.yaml").write_text("model: in/tiny\n")  # the folder that a recipe names itself
    assert "--out in holds in/tiny" in refused(["build", "in.yaml"], capsys)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_capitals_are_told_where_the_file_system_tells_them(tmp_path):
    """Two paths to one folder are one place: here by a link of folders, elsewhere by capitals."""
    (tmp_path / "a").mkdir()
    (tmp_path / "A").symlink_to("a") if not (tmp_path / "A").exists() else None
    with pytest.raises(Exception, match="which is read"):
        outputs.check_apart({"--out": tmp_path / "A" / "x"}, [str(tmp_path / "a")])


def test_every_argument_that_is_a_place_is_looked_at():
    """A new flag for a file or a folder must be named among those that are read or written."""
    for command in COMMANDS:
        for action in actions_of(command):
            if isinstance(action.metavar, str) and action.metavar in PLACES | {"DENSE", "SLIM"}:
                assert action.dest in (*outputs.READ, *outputs.WRITTEN), f"{command} {action.dest}"


def artifact(folder: Path, kind: str, **made_from: str) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    manifest.write_manifest(folder, kind, made_from)
    return folder


@pytest.mark.parametrize(
    ("argv", "own"),
    [
        ("compress demo --reduce 8%", "slim-model"),
        ("export demo", "onnx"),
        ("bundle demo --target edge", "bundle"),
        ("sweep demo", "sweep"),
        ("build in/recipe.yaml", "build"),
    ],
)
def test_another_kind_of_artifact_stays(folder, argv, own, capsys):
    for kind in {"slim-model", "onnx", "bundle", "engine", "sweep", "somebody's"} - {own}:
        out = artifact(folder / kind, kind)
        assert f"is of the kind {kind!r}, and " in refused([*argv.split(), "--out", out], capsys)
    stage = artifact(folder / "slim", "slim-model", stage="slim")
    assert "is of the kind 'stage of a build'" in refused([*argv.split(), "--out", stage], capsys) or own == "build"
    foreign = folder / "app"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "a web page"}')
    assert "cannot be replaced" in refused([*argv.split(), "--out", foreign], capsys)
    (foreign / "manifest.json").rename(foreign / ".lock")
    (foreign / "slim").mkdir()
    (foreign / "slim" / "thesis.txt").write_text("four years")
    assert "did not write (slim/thesis.txt)" in refused([*argv.split(), "--out", foreign], capsys)


@pytest.mark.parametrize("where", ["notes.txt", "unet/notes.txt", "mine/notes.txt", "link"])
def test_a_file_of_the_users_own_is_not_taken_away(folder, capsys, where):
    out = artifact(folder / "out", "slim-model")
    file = out / where
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(folder / "in") if where == "link" else file.write_text("mine")
    for argv in ("compress demo --reduce 8%", "compress in/tiny --reduce 8%"):
        assert f"holds {where}, which slimdiff did not write" in refused([*argv.split(), "--out", out], capsys)
    assert file.exists()


def test_the_same_kind_of_artifact_is_replaced(folder, capsys):
    argv = ["compress", "in/tiny", "--prompts", "in/prompts.txt", "--samples", "2", "--steps", "1", "--out", "out"]
    assert main([*argv, "--reduce", "8%"]) == 0
    first = (folder / "out" / "plan.json").read_text()
    assert main([*argv, "--reduce", "4%"]) == 0
    assert (folder / "out" / "plan.json").read_text() != first
    capsys.readouterr()


def test_a_stage_takes_no_file_of_the_users_own_away(built, workspace, tmp_path, capsys):
    out = shutil.copytree(built, tmp_path / "build")
    (out / "notes.txt").write_text("beside the stages, it stays")
    (out / "plan" / "notes.txt").write_text("mine")
    argv = ["build", workspace / "recipe.yaml", "--out", out, "--force", "plan"]
    assert "plan/notes.txt is not of this build, whose plan would take its place" in refused(argv, capsys)
    assert (out / "plan" / "notes.txt").read_text() == "mine" and (out / "notes.txt").exists()
    assert main([str(a) for a in argv[:-2]]) == 0  # nothing to do
    capsys.readouterr()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no such file system here")
@pytest.mark.parametrize(
    "argv",
    [
        "schedule demo --deep-every 2 --out /proc/x.json",
        "schedule demo --deep-every 2 --out /proc/a/b/x.json",
        "generate demo --prompt a --out /proc/x.png",
        "prompts select in/prompts.txt --count 1 --model demo --out /proc/x.txt",
        "calibrate demo --out /proc/x.safetensors",
        "compress demo --reduce 8% --out /proc/x",
        "export demo --out /proc/x",
        "engine onnx --out /proc/x",
        "bundle demo --target edge --out /proc/x",
        "build in/recipe.yaml --out /proc/x",
        "sweep demo --out /proc/x",
        "demo --out /proc/x",
        "compare demo demo --save-images /proc/x",
        "lora in/recipe.yaml --onto in/tiny --out /proc/x.safetensors",
        "bench demo demo --junit /proc/x.xml",
        "bench demo demo --markdown /proc/x.md",
        "bench demo demo --history /proc/x.jsonl",
        "bench demo demo --history x.jsonl --plot /proc/x.svg",
    ],
)
def test_a_place_that_only_seems_writable_is_refused_before_the_long_work(folder, argv, capsys):
    """Whoever may write anywhere can still make nothing there."""
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"")
    assert "/x" in (line := refused(argv.split(), capsys)) and "cannot be written (" in line


@pytest.mark.parametrize(
    ("argv", "file", "content"),
    [
        ("generate demo --prompt x --out", "x.png", b"no picture"),
        ("prompts select in/prompts.txt --count 1 --model demo --out", "x.txt", b"\0weights"),
        ("calibrate demo --out", "x.safetensors", b"no statistics"),
        ("bench demo demo --junit", "x.xml", b"thesis"),
        ("bench demo demo --markdown", "x.md", b"\0"),
        ("bench demo demo --history x.jsonl --plot", "x.svg", b"thesis"),
        ("bench demo demo --history", "x.jsonl", b"thesis"),
        ("bundle demo --target edge --archive tar.zst --out x", "x.tar.zst", b"thesis"),
    ],
)
def test_a_file_of_another_kind_stays(folder, argv, file, content, capsys):
    (folder / file).write_bytes(content)
    argv = argv.split() if "--archive" in argv else [*argv.split(), file]
    assert f"{file} is there and no" in refused(argv, capsys)
    assert (folder / file).read_bytes() == content
    (folder / file).unlink()
    (folder / file).mkdir()
    assert "is a folder" in refused(argv, capsys)
    (folder / file).rmdir()
    os.mkfifo(folder / file)
    refused(argv, capsys)
