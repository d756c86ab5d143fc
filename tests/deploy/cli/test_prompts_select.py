"""The command that selects prompts."""

from __future__ import annotations

import json

import pytest

from deploy.cli.app import main
from slimdiff import embedded
from slimdiff.loading.pipelines import load_pipeline


def test_select(tmp_path, capsys):
    lines = [*embedded.captions(60), "", *embedded.captions(5)]
    (tmp_path / "many.txt").write_text("\n".join(lines))
    argv = ["prompts", "select", tmp_path / "many.txt", "--count", "12", "--model", "demo", "--json", "--out"]
    for name in ("a.txt", "b.txt"):
        assert main([str(a) for a in [*argv, tmp_path / name]]) == 0
    value = json.loads(capsys.readouterr().out.partition("}\n{")[0] + "}")
    chosen = (tmp_path / "a.txt").read_text().splitlines()
    assert (tmp_path / "b.txt").read_text().splitlines() == chosen
    assert value["selected"] == len(chosen) == len(set(chosen)) == 12 and value["of"] == len(set(lines) - {""})
    assert [line for line in dict.fromkeys(lines) if line in chosen] == chosen
    assert value["moment_error"]["selected"] < value["moment_error"]["random"]


def test_select_text_for_people(workspace, tmp_path, capsys):
    argv = ["prompts", "select", workspace / "prompts.txt", "--count", "2", "--model", workspace / "tiny"]
    assert main([str(a) for a in [*argv, "--out", tmp_path / "few.txt"]]) == 0
    assert "2 of 4 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        ("", [], "holds no prompt"),
        ("one\ntwo\none", [], "2 different prompts"),
        ("one\ntwo\nthree", ["--model", "nowhere"], "no such directory"),
        ("one\ntwo\nthree", ["--count", "0"], "--count: must be"),
        ("one\ntwo\nthree", ["--out", "tests"], "is a folder"),
    ],
)
def test_bad_selections(tmp_path, capsys, content, more, says):
    (tmp_path / "x.txt").write_text(content)
    argv = ["prompts", "select", str(tmp_path / "x.txt"), "--count", "3", "--model", "demo"]
    assert main([*argv, "--out", str(tmp_path / "out.txt"), *more]) == 2
    seen = capsys.readouterr()
    assert says in seen.err and seen.err.count("error: ") == 1 and seen.out == ""
    assert not (tmp_path / "out.txt").exists()


def test_components_that_are_not_needed_are_not_loaded(workspace):
    pipeline = load_pipeline(workspace / "tiny", without=("unet", "vae", "transformer"))
    assert pipeline.unet is None and pipeline.vae is None and pipeline.text_encoder is not None
