"""The stage that compares: with the metrics of the recipe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import PROMPTS
from PIL import Image

from deploy.build import run_build
from deploy.build.steps.compare import STAGE
from deploy.build.verdict import judge
from deploy.recipe.recipe import make_recipe
from slimdiff.errors import InputError


@pytest.fixture
def shop(pipeline, compression, weights, tmp_path):
    """What the stage asks of a build, for one that shows no images."""
    (tmp_path / "real").mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20), (90 * number, 0, 9)).save(tmp_path / "real" / f"{number}.png")
    metrics = {"clip": {"weights": str(weights["clip"])}, "fid": {"weights": str(weights["inception"])}}
    compare = {"images": 2, "shown": 0, "trajectories": 1, "sampling": {"steps": 1}, "metrics": metrics}
    gates = {"parity": False, "min_clip": 99, "max_fid": 1000, "min_ssim": 0.001}
    content = {"model": "tiny", "compare": {**compare, "reference": "real"}, "gates": gates}
    recipe = make_recipe(content, "recipe.yaml", tmp_path)
    return SimpleNamespace(
        recipe=recipe,
        sampling=recipe.compare.sampling,
        dense=pipeline,
        slim=compression.pipeline,
        captions=PROMPTS,
        has_evaluator=False,
        exporting={},
        captions_hash={},
        schedule=None,
        scheduled={},
    )


def test_a_build_measures_what_its_recipe_asks_for_and_its_gates_bound_it(shop, tmp_path):
    found = STAGE.run(shop, tmp_path)
    assert found["images"]["metrics"].keys() == {"psnr", "ssim"} and found["quality"].keys() == {"clip", "fid"}
    assert found["quality"]["fid"]["reference"] == 2
    judged = judge(shop.recipe.gates, {"compare": found, "validate": {}, "bench": {}})
    assert {gate["gate"]: gate["verdict"] for gate in judged} == {"ssim": "pass", "clip": "fail", "fid": "pass"}


def test_the_comparison_is_made_again_where_weights_or_real_images_are_others(shop, tmp_path):
    before = STAGE.inputs(shop)
    assert {"clip", "fid", "reference", "quality"} <= before.keys() and STAGE.inputs(shop) == before
    (tmp_path / "real" / "0.png").unlink()
    after = STAGE.inputs(shop)
    assert {key for key in before if before[key] != after[key]} == {"reference"}
    # The place of the weights is none of the result's business.
    assert str(tmp_path) not in str(STAGE.settings(shop))


def test_weights_that_cannot_be_read_are_refused_before_a_build_begins(tmp_path):
    (tmp_path / "odd.pth").write_bytes(b"nothing")
    content = {"model": "demo", "compare": {"metrics": {"lpips": {"weights": "odd.pth"}}}}
    with pytest.raises(InputError, match="odd.pth cannot be read as weights"):
        run_build(make_recipe(content, "recipe.yaml", tmp_path), "name", tmp_path / "build")
    assert not (tmp_path / "build").exists()
