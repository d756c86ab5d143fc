"""Where prompts come from if nobody says, and what is compared on."""

from __future__ import annotations

import json

from deploy.cli.app import main
from deploy.recipe.prompts import calibration_prompts, comparison_prompts, default_source
from slimdiff import prompts


def test_what_is_compared_on_was_not_calibrated_with():
    used = set(calibration_prompts("general", 64))
    assert not used & set(comparison_prompts("general", 64, 32, 0))
    assert used < set(comparison_prompts("general", 64, 500, 0))
    assert default_source("demo") == "embedded" and default_source("elsewhere") == "general"


def test_compress_and_compare_without_prompts(workspace, tmp_path, capsys):
    argv = ["compress", workspace / "tiny", "--out", tmp_path / "slim", "--reduce", "8%", "--samples", "2"]
    assert main([str(a) for a in [*argv, "--steps", "1", "--batch", "2"]]) == 0
    assert "2 prompts of the built-in general set" in capsys.readouterr().err
    argv = ["compare", workspace / "tiny", tmp_path / "slim", "--images", "1", "--trajectories", "1", "--steps", "1"]
    assert main([str(a) for a in [*argv, "--json"]]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["noise_error"]["relative_mse"] > 0 and value["quality"] == {}


def test_a_recipe_may_name_the_general_prompts(workspace, tmp_path):
    from deploy.build.workshop import Workshop
    from deploy.recipe.recipe import make_recipe

    content = {"model": "tiny", "prompts": "general", "calibration": {"samples": 9}}
    shop = Workshop(make_recipe(content, "recipe", workspace), tmp_path)
    calibrated = list(shop.material.prompts[:9])
    assert calibrated == prompts.general(9) and not set(calibrated) & set(shop.compared.prompts)
