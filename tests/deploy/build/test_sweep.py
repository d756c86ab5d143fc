"""The frontier: measured once per point, kept, and drawn from what was measured."""

from __future__ import annotations

import json

import pytest

from deploy.cli.app import main
from deploy.report.page import write_sweep_page
from slimdiff.storage import manifest


@pytest.fixture(scope="module")
def argv(workspace, tmp_path_factory):
    argv = ["sweep", workspace / "tiny", "--out", tmp_path_factory.mktemp("sweep") / "out", "--runtime", "torch"]
    argv += ["--prompts", workspace / "prompts.txt", "--samples", "2", "--steps", "2", "--batch", "2"]
    return [str(a) for a in [*argv, "--rounds", "6", "--images", "1", "--threads", "1"]]


@pytest.fixture(scope="module")
def out(argv, workspace):
    from pathlib import Path

    assert main([*argv, "--points", "12%,4%", "--json"]) == 0
    return Path(argv[argv.index("--out") + 1])


def test_points_are_ordered_and_smaller_step_by_step(out):
    value = json.loads((out / "sweep.json").read_text())
    assert [p["budget"] for p in value["points"]] == ["4%", "12%"]
    sizes = [value["dense"]["parameters"], *(p["parameters"] for p in value["points"])]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    for point in value["points"]:
        plan = json.loads((out / f"point-{point['budget'][:-1]}pct-parameters" / "plan.json").read_text())
        assert plan["parameters"]["slim"] == point["parameters"] and plan["costs"]["macs"]["slim"] == point["macs"]
        assert point["noise_error"] > 0 and point["images"]["count"] == 1
        assert point["speedup"]["low"] <= point["speedup"]["median"] <= point["speedup"]["high"]
    manifest.verify_manifest(out)
    assert not [f for f in out.rglob("*.json") if str(out.parent) in f.read_text()]


def test_what_was_measured_is_kept_and_points_are_added(out, argv, capsys):
    before = json.loads((out / "sweep.json").read_text())
    times = {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    assert main([*argv, "--points", "4%,8%,12%", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert [p["budget"] for p in value["points"]] == ["4%", "8%", "12%"]
    assert [p for p in value["points"] if p["budget"] != "8%"] == before["points"]
    assert main([*argv, "--points", "4%,8%,12%"]) == 0
    assert "sweep.html" in capsys.readouterr().out


def test_a_sweep_by_speedup_tells_the_predicted_one_too(workspace, argv, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [*argv, "--out", str(out), "--by", "speedup", "--points", "1.02", "--images", "0"]
    assert main(argv) == 0
    point = json.loads((out / "sweep.json").read_text())["points"][0]
    costs = point["predicted"]["latency_ms"]
    assert costs["dense"] / costs["slim"] >= 1.02 * (1 - 1e-9)
    row = capsys.readouterr().out.splitlines()[1]
    assert row.endswith(f"{costs['dense'] / costs['slim']:.3f}x") and f"{point['speedup']['median']:.3f}x" in row


def test_the_page_needs_nothing_else_and_shows_every_point(out):
    page = (out / "sweep.html").read_text()
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert all(page.count(f"{p['budget']}: ") >= 3 for p in points)


def test_a_page_without_any_error_says_so(out, tmp_path):
    value = json.loads((out / "sweep.json").read_text())
    for point in value["points"]:
        point["noise_error"], point["images"] = 0.0, None
    write_sweep_page(value, tmp_path / "x.html")
    assert "nothing to draw" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--points", "some"], "write a count"),
        (["--points", ","], "empty"),
        (["--by", "speedup", "--points", "5%"], "such as 1.35, not '5%'"),
        (["--images", "-1"], "--images"),
    ],
)
def test_bad_points_are_refused_before_any_work(workspace, tmp_path, capsys, more, says):
    argv = ["sweep", str(workspace / "tiny"), "--out", str(tmp_path / "out"), *more]
    assert main([*argv, "--prompts", str(workspace / "prompts.txt")]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
