"""Bad input is refused in one line that says what would be right, and cheap checks come before all else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refused

from deploy import cli
from slimdiff import InputError

ROOT = Path(cli.__file__).parents[2]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("compress none --out {out} --reduce 5%", "no such directory"),
        ("compress demo --out {out} --reduce 5% --prompts none.txt", "no such prompt file"),
        ("compress demo --out {out} --reduce 5% --runtime torch", "give --speedup with them"),
        ("compress demo --out {out} --plan none.json", "--plan none.json: there is no such file"),
        ("sweep none --out {out}", "no such directory"),
        ("calibrate none --out {out}", "no such directory"),
        ("prompts select none.txt --count 2 --model demo --out {out}", "no such prompt file"),
        ("export none --out {out}", "no such directory"),
        ("validate none demo", "no such directory"),
        ("compare demo none", "no such directory"),
        ("bench demo none", "no such directory"),
        ("bench demo {broken}", "is no ONNX model"),
        ("validate {broken} demo", "is no ONNX model"),
        ("validate demo {empty}", "empty.json"),
        ("bench demo {empty}", "empty.json"),
        ("compare demo {broken}", "broken.onnx"),
        ("bundle {broken} --target edge --out {out}", "broken.onnx"),
        ("generate {broken} --prompt x --out {out}.png", "is no ONNX model"),
        ("bundle none --target edge --out {out}", "no such directory"),
        ("generate none --prompt x --out {out}.png", "no such directory"),
        ("inspect none", "no such file or folder"),
        ("build none.yaml --out {out}", "no such recipe"),
        ("build {recipe} --out {out}", "no such prompt file"),
        ("engine none --out {out}", "none"),
        ("bench demo {folder}", "is no ONNX model"),
        ("compress demo --out {out} --reduce 120%", "budget '120%'"),
        ("compress demo --out {out} --reduce 5% --steps 0", "--steps"),
    ],
)
def test_what_is_cheap_to_see_is_seen_before_torch_is_loaded(argv, says, tmp_path):
    broken, empty = tmp_path / "broken.onnx", tmp_path / "empty.json"
    broken.write_bytes(b"no graph")
    empty.write_text("{}")
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "folder"
    recipe.write_text("model: demo\nbudget: {reduce: 5%}\nprompts: none.txt\n")
    (folder / "unet").mkdir(parents=True)
    shutil.copy(broken, folder / "unet" / "model.onnx")
    before = set(tmp_path.rglob("*"))
    words = argv.format(out=tmp_path / "out", broken=broken, empty=empty, recipe=recipe, folder=folder).split()
    script = (
        f"import sys; from deploy.cli.app import main; code = main({words!r})\n"
        "sys.exit(f'torch was loaded, code {code}' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("prompts", [None, "embedded", "general", ["a circle"], "file.txt"])
def test_a_recipe_with_prompts_from_anywhere_is_built(prompts, tmp_path, monkeypatch, capsys):
    (tmp_path / "file.txt").write_text("a circle\n")
    recipe = {"model": "demo", "budget": {"reduce": "5%"}} | ({} if prompts is None else {"prompts": prompts})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))

    def run_build(*_: object) -> None:
        raise InputError("it was begun")

    monkeypatch.setattr("deploy.build.run_build", run_build)
    assert "it was begun" in refused(["build", tmp_path / "recipe.yaml", "--out", tmp_path / "out"], capsys)
    if prompts is None:
        assert "it was begun" in refused(["demo", "--out", tmp_path / "out"], capsys)


def test_not_a_diffusers_directory(tmp_path, workspace, capsys):
    (tmp_path / "other").mkdir()
    argv = [
        "compress",
        tmp_path / "other",
        "--out",
        tmp_path / "out",
        "--reduce",
        "8%",
        "--prompts",
        workspace / "prompts.txt",
    ]
    assert "model_index.json" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_no_such_model(tmp_path, capsys):
    assert "no such directory" in refused(["export", tmp_path / "none", "--out", tmp_path / "out"], capsys)
    argv = ["export", "demo", "--out", tmp_path / "out", "--dynamic", "batch,depth"]
    assert "--dynamic takes batch, size or batch,size" in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused(tmp_path, workspace, capsys):
    import shutil

    shutil.copytree(workspace / "tiny", tmp_path / "pickled")
    unet = tmp_path / "pickled" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")
    argv = ["generate", tmp_path / "pickled", "--prompt", "a circle", "--out", tmp_path / "x.png"]
    assert "pickle" in refused(argv, capsys)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("reduce", "says"), [("lots", "100M"), ("200%", "must lie between"), ("99%", "at most"), ("0%", "lie")]
)
def test_an_impossible_budget(tmp_path, workspace, capsys, reduce, says):
    argv = ["compress", workspace / "tiny", "--out", tmp_path / "out", "--reduce", reduce]
    argv += ["--prompts", workspace / "prompts.txt", "--samples", "1", "--steps", "1"]
    assert says in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_beyond_the_sites_is_refused_before_the_long_work(tmp_path, workspace, capsys, monkeypatch):
    """What is too much shows as soon as the model is open."""
    asked = []
    monkeypatch.setattr("slimdiff.calibration.calibrate.sample_batch", lambda *_, **__: asked.append(1))
    prompts = ["--prompts", workspace / "prompts.txt"]
    for budget in (["--reduce", "70%"], ["--macs", "90%"]):
        argv = ["compress", workspace / "tiny", "--out", tmp_path / "out", *budget, *prompts]
        assert "but at most" in refused(argv, capsys)
    for by in ("parameters", "macs"):
        argv = ["sweep", workspace / "tiny", "--out", tmp_path / by, "--by", by, "--points", "4%,90%", *prompts]
        assert "but at most" in refused(argv, capsys)
    text = (workspace / "recipe.yaml").read_text().replace("tiny", str(workspace / "tiny"))
    text = text.replace("prompts.txt", str(workspace / "prompts.txt"))
    for number, change in enumerate(
        (("8%", "70%"), ("reduce: 8%", "macs: 90%"), ("8%}", "8%}\nsweep: {points: [70%]}"))
    ):
        (tmp_path / "recipe.yaml").write_text(text.replace(*change))
        argv = ["build", tmp_path / "recipe.yaml", "--out", tmp_path / f"build-{number}"]
        assert "but at most" in refused(argv, capsys)
    assert not asked


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (["--speedup", "0.9"], "1.35"),
        (["--max-error", "0"], "greater than 0"),
        (["--macs", "some"], "50G"),
        (["--reduce", "5%", "--runtime", "torch"], "--speedup"),
    ],
)
def test_budgets_that_cannot_be(tmp_path, workspace, capsys, budget, says):
    argv = ["compress", workspace / "tiny", "--out", tmp_path / "out", *budget]
    argv += ["--prompts", workspace / "prompts.txt", "--samples", "1", "--steps", "1"]
    assert says in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "  \n\n"])
def test_an_empty_prompt_file(tmp_path, workspace, capsys, content):
    (tmp_path / "prompts.txt").write_text(content)
    argv = ["compress", workspace / "tiny", "--out", tmp_path / "out", "--reduce", "8%"]
    assert "no prompt" in refused([*argv, "--prompts", tmp_path / "prompts.txt"], capsys)


def test_a_prompt_file_that_is_not_there(tmp_path, workspace, capsys):
    argv = ["compress", workspace / "tiny", "--out", tmp_path / "out", "--reduce", "8%"]
    assert "no such prompt file" in refused([*argv, "--prompts", tmp_path / "none.txt"], capsys)


def test_bad_settings_name_the_flag(tmp_path, workspace, capsys):
    argv = ["compress", workspace / "tiny", "--out", tmp_path / "out", "--reduce", "8%"]
    argv += ["--prompts", workspace / "prompts.txt"]
    assert "--samples" in refused([*argv, "--samples", "0"], capsys)
    assert "--groups" in refused([*argv, "--groups", "convolutions"], capsys)


@pytest.mark.parametrize("command", ["build", "compress", "export"])
def test_other_peoples_folders_are_not_written_to(tmp_path, workspace, capsys, command):
    (tmp_path / "thesis.txt").write_text("four years")
    argv = {
        "build": ["build", workspace / "recipe.yaml"],
        "compress": ["compress", workspace / "tiny", "--reduce", "8%", "--prompts", workspace / "prompts.txt"],
        "export": ["export", workspace / "tiny"],
    }[command]
    assert "did not write" in refused([*argv, "--out", tmp_path], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_wrong_recipe_names_the_nearest_key(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("model: demo\nbudgett: {}")
    assert "'budget'" in refused(["build", tmp_path / "recipe.yaml", "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_to_force(tmp_path, workspace, capsys):
    argv = ["build", workspace / "recipe.yaml", "--out", tmp_path / "out", "--force", "calibrat"]
    assert "calibrate, sensitivity, plan" in refused(argv, capsys)


@pytest.mark.parametrize("argv", [["inspect", "none"], ["bench", "none", "none", "--gate", "speed>2"]])
def test_other_bad_input(argv, capsys):
    refused(argv, capsys)


def test_inspect_says_what_it_knows(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("")
    assert "nothing that slimdiff knows" in refused(["inspect", tmp_path / "x.txt"], capsys)
