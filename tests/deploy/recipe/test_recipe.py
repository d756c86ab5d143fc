"""Recipes: what is wrong with one is told with its place and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.recipe.recipe import DEMO, load_recipe
from slimdiff.budget import Budget
from slimdiff.errors import InputError


def recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_the_demo_recipe_loads():
    found = load_recipe(DEMO)
    assert found.model == "demo" and found.prompts == "embedded" and found.gates.parity


def test_defaults_and_overrides(tmp_path):
    found = load_recipe(
        recipe(tmp_path, "model: demo\nbudget: {reduce: 100M}\nplan: {align: 16, groups: [feed_forward]}")
    )
    assert found.budget.budget() == Budget("100M") and found.plan.align == 16 and found.plan.groups == ("feed_forward",)
    assert found.prompts == "embedded"


@pytest.mark.parametrize("plan", ["", "plan:", "plan: {align: 16}", "plan: {precision: own, align: 16}"])
def test_a_setting_in_the_place_of_the_files_leaves_the_others(tmp_path, plan):
    found = load_recipe(recipe(tmp_path, f"model: demo\n{plan}"), {"plan": {"precision": "int8"}})
    assert (found.plan.precision, found.export.precision) == ("int8", "int8")
    assert found.plan.align == (16 if "16" in plan else 8)


def test_a_setting_that_does_not_go_with_the_files_is_refused(tmp_path):
    file = recipe(tmp_path, "model: demo\nplan: {precision: int8, int8_error: 1e-2}")
    with pytest.raises(InputError, match="give precision int8 with it"):
        load_recipe(file, {"plan": {"precision": "own"}})
    with pytest.raises(InputError, match="plan"):
        load_recipe(recipe(tmp_path, "model: demo\nplan: [8]"), {"plan": {"precision": "int8"}})


@pytest.mark.parametrize(("said", "read"), [("fast.json", "HERE/fast.json"), ("none", "none"), ("null", None)])
def test_a_schedule_lies_beside_the_recipe(tmp_path, said, read):
    found = load_recipe(recipe(tmp_path, f"model: demo\nschedule: {said}")).schedule
    assert found == (read and read.replace("HERE", str(tmp_path)))


@pytest.mark.parametrize("text", ["model: elsewhere", "model: elsewhere\nprompts: general"])
def test_the_general_prompts_are_the_default(tmp_path, text):
    assert load_recipe(recipe(tmp_path, text)).prompts == "general"


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("sweep: {points: [5%, 100M]}", ["5%", "100M"]),
        ("sweep: {by: speedup, points: [1.1, 1.2]}", ["1.1", "1.2"]),
        ("sweep: {by: macs}", ["5%", "10%", "15%", "20%", "25%"]),
    ],
)
def test_points_of_a_sweep(tmp_path, text, budgets):
    assert load_recipe(recipe(tmp_path, f"model: demo\n{text}")).sweep.texts == budgets


def test_relative_paths_are_the_recipes(tmp_path):
    (tmp_path / "model").mkdir()
    found = load_recipe(recipe(tmp_path, "model: model\nprompts: prompts.txt"))
    assert found.model == str(tmp_path / "model") and found.prompts == str(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: demo\ncalibraton: {}", ["unknown key 'calibraton'", "did you mean 'calibration'"]),
        ("model: demo\ncalibration: {sampels: 3}", ["in calibration", "'sampels'", "did you mean 'samples'"]),
        ("model: demo\ncalibration: {sampling: {step: 3}}", ["in calibration.sampling", "did you mean 'steps'"]),
        ("model: demo\nengine: {target: [sm89]}", ["in engine", "did you mean 'targets'"]),
        ("model: demo\nvalidate: {call: 3}", ["in validate", "did you mean 'calls'"]),
        ("model: demo\ngates: {xyz: 3}", ["in gates", "'xyz'", "known here: parity, min_speedup"]),
        ("model: demo\ncalibration: {samples: many}", ["calibration.samples", "valid integer", "'many'"]),
        ("model: demo\ncalibration: {samples: 0}", ["calibration.samples", "greater than or equal to 1"]),
        (
            "model: demo\nplan: {allocation: best}",
            ["plan.allocation", "'global', 'local', 'uniform' or 'softmax'", "'best'"],
        ),
        ("model: demo\nbudget: {reduce: lots}", ["budget.reduce", "100M", "25%", "'lots'"]),
        ("model: demo\nbudget: {macs: lots}", ["budget.macs", "50G", "25%", "'lots'"]),
        ("model: demo\nbudget: {reduce: 0%}", ["budget.reduce", "'0%' must lie between nothing and all", "25%"]),
        ("model: demo\nbudget: {reduce: " + 400 * "9" + "M}", ["budget.reduce", "between nothing and all"]),
        ("model: demo\nbudget: {macro: 5%}", ["budget.macro", "unknown key 'macro'", "did you mean 'macs'"]),
        ("model: demo\nbudget: {reduce: 5%, macs: 5%}", ["budget", "exactly one of", "reduce and macs"]),
        ("model: demo\nbudget: {speedup: 0.9}", ["budget.speedup", "greater than 1"]),
        ("model: demo\nbudget: {reduce: 5%, runtime: torch}", ["budget", "give speedup with it"]),
        ("model: demo\nbudget: {max_error: 0}", ["budget.max_error", "greater than 0"]),
        ("model: demo\nbudget: {max_error: .inf}", ["budget.max_error", "finite"]),
        ("model: demo\nengine: {targets: [h100]}", ["engine.targets", "sm89"]),
        ("model: demo\nsweep: {pionts: [5%]}", ["in sweep", "did you mean 'points'"]),
        ("model: demo\nsweep: {points: [lots]}", ["sweep", "100M"]),
        ("model: demo\nsweep: {by: speedup, points: [5%]}", ["sweep", "a speedup is", "such as 1.35, not '5%'"]),
        ("budget: {reduce: 12%}", ["'model' is missing"]),
        ("model: demo\nmodel: demo", ["'model' is there twice"]),
        ("model: [", ["not YAML"]),
        ("- model", ["not a recipe"]),
        ("", ["not a recipe"]),
    ],
)
def test_faults_are_told(tmp_path, text, parts):
    file = recipe(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_recipe(file)
    message = str(error.value)
    assert message.startswith(str(file)) and "\n" not in message
    for part in parts:
        assert part in message
    assert error.value.exit_code == 2


def test_a_missing_recipe(tmp_path):
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_that_is_no_text(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(file)


def test_weights_of_metrics_are_the_recipes(tmp_path):
    (tmp_path / "vgg16.pth").touch()
    text = "model: demo\ncompare: {metrics: {lpips: {weights: vgg16.pth}, ms_ssim: }}"
    text += "\ngates: {max_lpips: 0.2, min_ssim: 0.9}"
    metrics = load_recipe(recipe(tmp_path, text)).compare.metrics
    assert {name: metric.weights for name, metric in metrics.items()} == {
        "lpips": str(tmp_path / "vgg16.pth"),
        "ms_ssim": None,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "gates: {max_lpips: 0.2}",
            "gates.max_lpips is of lpips, which is not measured: ask for it in compare.metrics",
        ),
        ("gates: {min_clip: 20}", "gates.min_clip is of clip"),
        ("compare: {metrics: {beauty: }}", "there is no metric 'beauty': metrics are psnr, ssim"),
        ("compare: {metrics: {lpips: }}", "lpips needs weights, which are never fetched: give compare.metrics.lpips."),
        ("compare: {metrics: {fid: {weights: none.pt}}}", "compare.metrics.fid.weights: there is no"),
        ("compare: {metrics: {psnr: }, reference: real}", "reference is for fid and kid"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused_when_the_recipe_is_read(tmp_path, text, said):
    with pytest.raises(InputError) as refused:
        load_recipe(recipe(tmp_path, f"model: demo\n{text}"))
    assert said in str(refused.value) and "\n" not in str(refused.value)
