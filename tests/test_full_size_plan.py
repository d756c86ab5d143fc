"""Planning at full size is measured on a tiny model here, and goes on where it was."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

from benchmarks import full_size_plan  # noqa: E402
from slimdiff import InputError  # noqa: E402
from slimdiff.planning.costs import CostTable  # noqa: E402


def test_planning_is_timed_step_by_step_and_kept(tmp_path, capsys, monkeypatch):
    command = ["--model", "tiny", "--calls", "2", "--runtime", "", "--work", str(tmp_path)]
    assert full_size_plan.main(command) == 0
    first = capsys.readouterr().out
    clocks = json.loads((tmp_path / "tiny-calls2" / full_size_plan.CLOCKS).read_text(encoding="utf-8"))
    assert len(clocks["steps"]) == 4 and all(clock["wall"] > 0 for clock in clocks["steps"].values())
    assert all(f"| {step} | " in first for step in clocks["steps"])
    monkeypatch.setattr(full_size_plan, "calibrate_on_calls", None)  # what is kept is not measured again
    assert full_size_plan.main(command) == 0
    assert capsys.readouterr().out == first


def test_a_plan_of_what_is_kept_holds_its_speedup_by_the_table(tmp_path, monkeypatch):
    """By a table in which a layer takes a millisecond, none without ranks, and int8 saves up to 0.2 of it."""
    subject = full_size_plan.Subject(full_size_plan.MODELS["tiny"], 2, 1, tmp_path)
    planner = subject.planner
    layers = {layer.path: {0: 0.0, layer.dense_rank: 1.0} for layer in planner.layers}
    int8 = {path: {0: 0.0, 64: 0.2} for path in planner.int8_errors}
    table = CostTable("latency_ms", float(2 * len(layers)), layers, int8=int8)
    monkeypatch.setattr(full_size_plan.Subject, "table", lambda *_: table)
    plan = subject.plan(1.3, "openvino")
    costs = plan.costs["latency_ms"]
    assert costs["dense"] / costs["slim"] >= 1.3 * (1 - 1e-6)
    assert plan.int8()
    refused = subject.measure(50.0, "openvino", full_size_plan.BenchSettings())
    assert refused.keys() == {"refused"}
    assert f"| openvino | 50 | refused: {refused['refused']} |" in full_size_plan.speedup_table(
        {"openvino/50": refused}
    )
    with pytest.raises(InputError):
        subject.plan(50.0, "openvino")


def test_what_other_calls_gave_is_not_taken(tmp_path, capsys):
    with pytest.raises(SystemExit):
        full_size_plan.main(["--model", "tiny", "--calls", "1", "--runtime", "", "--work", str(tmp_path)])
    for calls in ("2", "3"):
        full_size_plan.main(["--model", "tiny", "--calls", calls, "--runtime", "", "--work", str(tmp_path)])
    assert {folder.name for folder in tmp_path.iterdir()} == {"tiny-calls2", "tiny-calls3"}
