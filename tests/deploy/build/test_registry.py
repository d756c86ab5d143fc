"""A new stage is its file and a line in the registry."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.artifacts import build_folder
from deploy.build import run_build, steps
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop
from deploy.recipe.recipe import load_recipe, make_recipe
from slimdiff.errors import InputError, MissingPackageError
from slimdiff.storage import manifest


def run(shop: Workshop, _: Path) -> dict[str, int]:
    return {"sites": len(shop.plan.sites)}


def add(monkeypatch: pytest.MonkeyPatch, **more) -> None:
    toy = Stage("toy", run, needs=("plan",), settings=lambda shop: {"align": shop.recipe.plan.align}, **more)
    monkeypatch.setattr(steps, "STAGES", (*steps.STAGES[:-1], toy, steps.STAGES[-1]))


def test_stages_are_those_of_the_folder():
    recipe = make_recipe({"model": "demo"}, "recipe.yaml", Path())
    assert tuple(stage.name for stage in steps.stages_of(recipe)) == build_folder.STAGES
    recipe = make_recipe({"model": "demo", "sweep": {"points": ["5%", "10%"]}}, "recipe.yaml", Path())
    added = [s.name for s in steps.stages_of(recipe) if s.name not in build_folder.STAGES]
    assert added == ["point-5pct-parameters", "point-10pct-parameters", build_folder.SWEEP]


def test_a_new_stage_runs_is_skipped_and_can_be_forced(built, workspace, tmp_path, monkeypatch):
    figure = {"sites": {"dense": 0, "slim": 1}}
    add(monkeypatch, kind="toy", runs_on=lambda _: {"runtime": "none"}, figures=lambda _: figure)
    recipe, folder = load_recipe(workspace / "recipe.yaml"), tmp_path / "build"
    shutil.copytree(built, folder)

    def made(*force: str) -> list[str]:
        whole = run_build(recipe, "recipe", folder, force)
        assert [s["name"] for s in whole["stages"]] == [*build_folder.STAGES[:-1], "toy", "report"]
        assert whole["figures"]["sites"] == figure["sites"]
        return [s["name"] for s in whole["stages"] if not s["reused"]]

    assert made() == ["toy", "report"]
    assert build_folder.read(folder, "toy")["sites"] > 0 and build_folder.read_verdict(folder)
    content = manifest.verify_manifest(folder / "toy")
    assert content["kind"] == "toy" and content["runs_on"] == {"runtime": "none"}
    assert content["made_from"]["settings"] == {"align": 8} and content["made_from"]["inputs"].keys() == {"steps"}
    assert made() == []
    assert made("toy") == ["toy", "report"]


def test_packages_are_missed_before_any_work(workspace, tmp_path, monkeypatch):
    add(monkeypatch, packages=lambda shop: [("no_such_module", "toys")])
    recipe = load_recipe(workspace / "recipe.yaml")
    with pytest.raises(MissingPackageError, match=r"no_such_module is not installed: pip install 'slimdiff\[toys\]'"):
        run_build(recipe, "recipe", tmp_path / "build")
    with pytest.raises(InputError, match="there is no stage 'tow' to force: stages are calibrate, .*, toy, report"):
        run_build(recipe, "recipe", tmp_path / "build", ["tow"])
    assert not (tmp_path / "build").exists()
