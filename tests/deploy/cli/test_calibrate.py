"""`slimdiff calibrate`: a file of statistics, its use for budgets, and merging."""

from __future__ import annotations

import json

import pytest

from deploy.cli.app import main
from slimdiff import Statistics


@pytest.fixture(scope="module")
def common(workspace) -> list[str]:
    return ["--prompts", str(workspace / "prompts.txt"), "--steps", "2", "--batch", "2", "--quiet", "--json"]


@pytest.fixture(scope="module")
def calibrated(workspace, common, tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "all.safetensors"
    assert main(["calibrate", str(workspace / "tiny"), "--out", str(out), "--sensitivities", *common]) == 0
    return out


@pytest.mark.slow
def test_the_file_is_all_that_is_left_and_all_that_a_budget_needs(calibrated, workspace, common, tmp_path, capsys):
    assert list(calibrated.parent.iterdir()) == [calibrated]
    statistics = Statistics.load(calibrated)
    assert statistics.made_from["prompts"] == 4
    for budget in (["--reduce", "5%"], ["--macs", "5%"]):
        out = tmp_path / budget[0]
        argv = ["compress", str(workspace / "tiny"), "--out", str(out), *budget, "--statistics", str(calibrated)]
        assert main([*argv, *common]) == 0
        told = json.loads(capsys.readouterr().out)
        name = "parameters" if budget[0] == "--reduce" else "macs"
        assert 0.95 * told[name]["dense"] >= told[name]["slim"] >= 0.94 * told[name]["dense"]
        plan = json.loads((out / "plan.json").read_text())
        used = {n: s["sensitivity"] for n, s in plan["sites"].items() if s["sensitivity"] is not None}
        assert used == pytest.approx(statistics.sensitivities)


def test_files_merge_with_and_without_a_model(calibrated, workspace, common, tmp_path, capsys):
    other, both = tmp_path / "other.safetensors", tmp_path / "both.safetensors"
    argv = ["calibrate", str(workspace / "tiny"), "--out", str(other), "--seed", "40", "--merge", str(calibrated)]
    assert main([*argv, *common]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 8
    assert main(["calibrate", "--out", str(both), "--merge", str(other), str(calibrated), "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompts"] == 12 and told["merged"] == 2 and told["sensitivities"] > 0
    tokens, once = Statistics.load(both).tokens, Statistics.load(calibrated).tokens
    assert tokens == {name: 3 * count for name, count in once.items()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["demo", "--out", "prompts.txt"], "no statistics file"),
        (["--out", "new.safetensors"], "name a MODEL"),
        (["--out", "new.safetensors", "--merge", "prompts.txt"], "not a statistics file"),
    ],
)
def test_wrong_usage_is_told(more, message, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert main(["calibrate", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (workspace / "new.safetensors").exists()
