"""The whole chain on a tiny model, and the commands on what it leaves."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from deploy.artifacts import build_folder
from deploy.cli.app import main
from exporters.engine.check import check_engine
from exporters.engine.gpu import Gpu
from slimdiff.storage import manifest


def call(argv: list[Any], capsys, code: int = 0) -> dict[str, Any]:
    """Run a command with `--json`; its result."""
    assert main([*(str(a) for a in argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_every_stage_leaves_its_result_and_manifest(built):
    for stage in build_folder.STAGES:
        made_from = manifest.verify_manifest(built / stage)["made_from"]
        assert made_from["stage"] == stage and len(made_from["key"]) == 64
    for stage in build_folder.STAGES[:-1]:
        assert build_folder.read(built, stage)
    assert (built / build_folder.REPORT).read_bytes() == (built / "report" / build_folder.REPORT).read_bytes()
    assert {p.name for p in built.iterdir()} == {*build_folder.STAGES, build_folder.BUILD, build_folder.REPORT, ".lock"}


def test_results_have_the_contracts_keys(built):
    slim = build_folder.read(built, "slim")
    assert set(slim["parameters"]) == {"dense", "slim", "budget"}
    assert all({"dense", "slim"} == set(slim[k]) for k in ("macs", "bytes"))
    assert set(slim["seconds"]) == {"calibrate", "plan", "slim"}
    removed = slim["parameters"]["dense"] - slim["parameters"]["slim"]
    assert 0.08 <= removed / slim["parameters"]["dense"] <= 0.0804
    assert {"noise_error", "images", "quality"} <= set(build_folder.read(built, "compare"))
    assert build_folder.read(built, "validate")["passed"]
    assert {"verdict", "speedup", "baseline", "candidate", "runtime", "machine"} <= set(
        build_folder.read(built, "bench")
    )
    assert build_folder.read(built, "engine") == {"skipped": "the recipe says so (engine.enabled: false)"}


def test_no_path_of_this_machine_is_in_the_files(built):
    for file in built.rglob("*.json"):
        assert str(built.parent) not in file.read_text(), file


def test_the_second_run_does_nothing(built, workspace, capsys):
    before = {p: p.stat().st_mtime_ns for stage in build_folder.STAGES for p in (built / stage).rglob("*")}
    whole = call(["build", workspace / "recipe.yaml", "--out", built], capsys)
    assert all(stage["reused"] for stage in whole["stages"])
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_an_engine_that_would_be_the_same_is_not_built_again(built, workspace, capsys, tmp_path):
    for module in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module, reason="engines need the extra tensorrt-rtx")
    folder = shutil.copytree(built, tmp_path / "build")
    files = []
    for more in ("", ", check_memory: false"):  # another setting of the stage, and none of the engine
        engine = f"engine: {{backend: tensorrt-rtx, targets: [sm89]{more}}}"
        text = (workspace / "recipe.yaml").read_text().replace("engine: {enabled: false}", engine)
        (workspace / "engine.yaml").write_text(text)
        whole = call(["build", workspace / "engine.yaml", "--out", folder], capsys)
        assert "engine" in [s["name"] for s in whole["stages"] if not s["reused"]]
        files.append((folder / "engine" / "model.engine").read_bytes())
        report = check_engine(folder / "engine", gpu=lambda: Gpu("a GPU", "sm89", "580.65"))
        runs_on = manifest.read_manifest(folder / "engine")["runs_on"]
        assert (runs_on["runtime"], runs_on["targets"], runs_on["precision"]) == ("tensorrt-rtx", ["sm89"], "fp16")
        assert report["precision"] == "fp16" and all(row["ok"] for row in report["sites"])
        files.append(report["seconds"])
    assert files[:2] == files[2:]


def test_a_failed_gate_exits_1_and_redoes_nothing_but_the_report(built, workspace, capsys):
    text = (workspace / "recipe.yaml").read_text().replace("max_noise_error: 0.5", "max_noise_error: 1.0e-12")
    (workspace / "strict.yaml").write_text(text)
    whole = call(["build", workspace / "strict.yaml", "--out", built], capsys, 1)
    assert whole["verdict"] == "fail" and whole["exit_code"] == 1
    assert [s["name"] for s in whole["stages"] if not s["reused"]] == ["report"]


def test_force(built, workspace, capsys):
    whole = call(["build", workspace / "recipe.yaml", "--out", built, "--force", "validate"], capsys)
    assert [s["name"] for s in whole["stages"] if not s["reused"]] == ["validate", "report"]


def test_validate(built, capsys):
    value = call(["validate", built / "slim", built / "export" / "slim", "--steps", "2"], capsys)
    assert value["passed"] and value["precision"] == "fp32" and value["first_diverging"] is None
    value = call(["validate", built / "slim", built / "export" / "dense", "--steps", "2"], capsys, 1)
    assert not value["passed"] and value["first_diverging"]


def test_compare(built, workspace, capsys):
    argv = ["compare", workspace / "tiny", built / "slim", "--prompts", workspace / "prompts.txt", "--steps", "2"]
    value = call([*argv, "--images", "2"], capsys)
    assert 0 < value["noise_error"]["relative_mse"] < 0.5 and value["images"]["count"] == 2 and value["quality"] == {}


def test_a_model_compared_with_itself(workspace, capsys):
    argv = ["compare", workspace / "tiny", workspace / "tiny", "--prompts", workspace / "prompts.txt", "--steps", "2"]
    value = call([*argv, "--images", "1"], capsys)
    assert value["noise_error"]["relative_mse"] == 0 and value["images"]["psnr_db"] is None


def test_bench(built, capsys):
    argv = ["bench", built / "export" / "dense", built / "export" / "slim", "--rounds", "3", "--processes", "2"]
    assert call([*argv, "--gate", "latency<=1000"], capsys)["verdict"] == "pass"


@pytest.mark.parametrize("artifact", ["tiny", "build/slim", "build/export/slim"])
def test_generate(built, workspace, capsys, tmp_path, artifact):
    argv = ["generate", workspace / artifact, "--prompt", "a red circle", "--out", tmp_path / "x.png", "--steps", "2"]
    if artifact.startswith("build/export"):
        argv += ["--pipeline", workspace / "tiny"]
    value = call(argv, capsys)
    assert (tmp_path / "x.png").stat().st_size > 0 and value["steps"] == 2


def test_a_denoiser_alone_asks_for_its_pipeline(built, tmp_path, capsys):
    argv = ["generate", built / "export" / "slim", "--prompt", "a circle", "--out", tmp_path / "x.png"]
    assert main([str(a) for a in argv]) == 2
    assert "--pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("artifact", "kind"),
    [
        ("tiny", "model"),
        ("build/slim", "model"),
        ("build/export/slim", "onnx"),
        ("build/export/slim/model.onnx", "onnx"),
        ("build/engine", "engine"),
        ("build/calibrate", "statistics"),
        ("build/plan/plan.json", "plan"),
        ("build", "build"),
    ],
)
def test_inspect(built, workspace, capsys, artifact, kind):
    value = call(["inspect", workspace / artifact], capsys)
    assert value["kind"] == kind
    assert main(["inspect", str(workspace / artifact)]) == 0
    assert kind in capsys.readouterr().out
    if artifact == "build/slim":
        assert value["slim"] and any(site["rank"] < site["dense_rank"] for site in value["sites"])


def test_a_changed_artifact_is_refused(built, tmp_path, capsys):
    shutil.copytree(built / "slim", tmp_path / "slim")
    with (tmp_path / "slim" / "unet" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"x")
    assert main(["inspect", str(tmp_path / "slim")]) == 2
    assert "SHA-256" in capsys.readouterr().err


def test_compress_from_statistics_and_an_edited_plan(built, workspace, tmp_path, capsys):
    shared = ["compress", workspace / "tiny", "--prompts", workspace / "prompts.txt"]
    statistics = ["--statistics", built / build_folder.STATISTICS]
    plan = json.loads((built / build_folder.PLAN).read_text())
    name = next(n for n, s in plan["sites"].items() if s["group"] == "feed_forward" and s["rank"] > 8)
    plan["sites"][name]["rank"] = 8
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    value = call([*shared, *statistics, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"], capsys)
    assert value["parameters"]["slim"] < build_folder.read(built, "slim")["parameters"]["slim"]
    manifest.verify_manifest(tmp_path / "out")

    plan["sites"][name]["rank"] = plan["sites"][name]["dense_rank"] + 8
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    argv = [*shared, *statistics, "--plan", tmp_path / "plan.json", "--out", tmp_path / "other"]
    assert main([str(a) for a in argv]) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_compress_to_a_budget_of_macs(built, workspace, tmp_path, capsys):
    argv = ["compress", workspace / "tiny", "--prompts", workspace / "prompts.txt", "--macs", "6%"]
    argv += ["--statistics", built / build_folder.STATISTICS, "--out", tmp_path / "out"]
    value = call(argv, capsys)
    dense, slim = value["macs"]["dense"], value["macs"]["slim"]
    assert 0.06 <= (dense - slim) / dense < 0.07
    assert value["predicted"]["macs"]["slim"] == slim
    assert value["parameters"]["budget"] == value["parameters"]["slim"]
    assert value["budget"] == {"macs": "6%"}


def test_another_budget_measures_nothing_again(built, workspace, tmp_path, capsys, monkeypatch):
    measurements = []
    monkeypatch.setattr("slimdiff.planning.planner.measure_sensitivities", lambda *_, **__: measurements.append(1))
    found = build_folder.read(built, "sensitivity")
    text = (workspace / "recipe.yaml").read_text().replace("reduce: 8%", "macs: 6%")
    (workspace / "another.yaml").write_text(text)
    shutil.copytree(built, tmp_path / "build")
    whole = call(["build", workspace / "another.yaml", "--out", tmp_path / "build"], capsys)
    assert [s["name"] for s in whole["stages"] if s["reused"]] == ["calibrate", "sensitivity"]
    plan = build_folder.read(tmp_path / "build", "plan")
    assert plan["costs"]["macs"]["dense"] == found["macs"][""]
    measured = {name: site["sensitivity"] for name, site in plan["sites"].items()}
    assert measured.items() >= found["sensitivities"].items() and not measurements


def test_a_build_without_a_speedup_gate(built, workspace, tmp_path):
    text = (workspace / "recipe.yaml").read_text().replace("min_speedup: 0.01, ", "")
    (workspace / "ungated.yaml").write_text(text)
    shutil.copytree(built, tmp_path / "build")
    assert main(["build", str(workspace / "ungated.yaml"), "--out", str(tmp_path / "build"), "--json"]) == 0


def test_a_recipe_may_ask_for_the_frontier(built, workspace, tmp_path, capsys):
    sweep = "sweep: {points: [4%, 7%], runtime: torch, images: 1}\n"
    (workspace / "swept.yaml").write_text((workspace / "recipe.yaml").read_text() + sweep)
    shutil.copytree(built, tmp_path / "build")
    argv = ["build", workspace / "swept.yaml", "--out", tmp_path / "build"]
    whole = call(argv, capsys)
    made = [s["name"] for s in whole["stages"] if not s["reused"]]
    assert made == ["point-4pct-parameters", "point-7pct-parameters", "sweep", "report"]
    value = build_folder.read(tmp_path / "build", "sweep")
    sizes = [value["dense"]["parameters"], *(p["parameters"] for p in value["points"])]
    assert [p["budget"] for p in value["points"]] == ["4%", "7%"] and sizes == sorted(sizes, reverse=True)
    page = (tmp_path / "build" / build_folder.REPORT).read_text()
    assert all(page.count(f"{p['budget']}: ") >= 3 for p in value["points"]) and 'href="#frontier"' in page

    again = call([*argv, "--force", "sweep"], capsys)
    assert [s["name"] for s in again["stages"] if not s["reused"]] == made
    call(["build", workspace / "recipe.yaml", "--out", tmp_path / "build"], capsys)
    assert "#frontier" not in (tmp_path / "build" / build_folder.REPORT).read_text()
    assert main(["build", str(workspace / "recipe.yaml"), "--out", str(tmp_path / "build"), "--force", "sweep"]) == 2
    assert "no stage 'sweep'" in capsys.readouterr().err
