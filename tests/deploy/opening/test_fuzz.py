"""Manifests and recipes of any content: each is taken, or refused with the reason; nothing else comes of one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from bundles import DESCRIPTION

from deploy.bundle.description import read_bundle
from deploy.recipe.recipe import load_recipe, make_recipe
from exporters.runtimes.pipeline import check_index
from slimdiff import InputError, SlimdiffError
from slimdiff.loading.model_directory import check_model_directory
from slimdiff.storage import manifest as manifests

pytest.importorskip("hypothesis", reason="the fuzz needs the extra dev")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FUZZ = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,  # the same examples on every machine: a failure in CI is a failure here
    database=None,
    suppress_health_check=list(HealthCheck),
)
NAMES = st.sampled_from(
    ["unet/model.onnx", "unet/config.json", "vae_decoder/model.onnx", "README.md", "../x.json", "/x.md", "a//b.json"]
)
ODD = st.sampled_from(
    [None, True, False, 0, -1, 1, 2**70, 0.5, float("inf"), "", "edge", "fp32", "onnxruntime", "demo", "12%", "0" * 64]
    + [".", "sm89", "1e999", "\ud800", "\0", "diffusers", "os", "x" * 3000, [], {}, [[]], {"": None}]
)
LEAVES = ODD | NAMES | st.text(max_size=6)
VALUES = st.one_of(
    LEAVES,
    st.integers(),
    st.floats(),
    st.lists(LEAVES, max_size=3),
    st.dictionaries(NAMES | st.text(max_size=3), LEAVES, max_size=2),
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a nest of dictionaries and lists."""
    found = [path]
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


@st.composite
def mutated(draw, whole: Any) -> Any:
    """`whole` with one to three places replaced, removed or added to."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        new = copy.deepcopy(draw(VALUES))
        if not path:
            value = draw(st.sampled_from([new, value]))
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "remove":
            del owner[path[-1]]
        elif how == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=5) | NAMES)] = new
        else:
            owner[path[-1]] = new
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    for name in ("README.md", "unet/config.json", "unet/model.onnx", "vae_decoder/model.onnx"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def manifest(folder) -> dict[str, Any]:
    return manifests.write_manifest(folder, "bundle", {"model": "x"}, DESCRIPTION.model_dump())


def outcome(open_it, *given: Any) -> str:
    """`taken` or `refused`; any other exception is the test's failure."""
    try:
        open_it(*given)
    except SlimdiffError as error:
        assert isinstance(error, InputError) and str(error)
        return "refused"
    return "taken"


def test_500_manifests(folder, manifest):
    seen = []

    @FUZZ
    @given(mutated(manifest))
    @example(manifest)
    @example([])
    def fuzz(changed):
        (folder / "manifest.json").write_text(json.dumps(changed))
        seen.append(outcome(read_bundle, folder))

    fuzz()
    assert len(seen) >= 500 and {"taken", "refused"} == set(seen)


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.38.0",
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["slimdiff.models", "SlimUNet2DConditionModel"],
    "safety_checker": [None, None],
}


def test_200_indexes(folder):
    seen = []

    @settings(FUZZ, max_examples=200)
    @given(mutated(INDEX))
    @example(INDEX)
    def fuzz(changed):
        (folder / "model_index.json").write_text(json.dumps(changed))
        seen.extend(outcome(check, folder) for check in (check_model_directory, check_index))

    (folder / "manifest.json").unlink(missing_ok=True)
    fuzz()
    assert len(seen) >= 400 and {"taken", "refused"} == set(seen)


RECIPE = {
    "model": "demo",
    "prompts": "embedded",
    "calibration": {"samples": 4, "sampling": {"steps": 2, "batch": 2}},
    "budget": {"reduce": "8%"},
    "plan": {"sensitivity_calls": 2, "groups": ["query_key", "value_output"]},
    "engine": {"targets": ["sm89"], "shapes": {"sample": "2x4x8x8"}},
    "sweep": {"points": ["4%", "8%"]},
    "bench": {"rounds": 6},
    "gates": {"parity": True, "min_speedup": 1.0},
}


def test_500_recipes(tmp_path):
    seen = []

    @FUZZ
    @given(mutated(RECIPE))
    @example(RECIPE)
    def fuzz(changed):
        if isinstance(changed, dict):
            seen.append(outcome(make_recipe, changed, "recipe.yaml", tmp_path))
        else:
            (tmp_path / "recipe.yaml").write_text(json.dumps(changed))
            seen.append(outcome(load_recipe, tmp_path / "recipe.yaml"))

    fuzz()
    assert len(seen) >= 500 and {"taken", "refused"} == set(seen)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS + "model: *a11\n",
        "model: &x [*x]\n",
        "model: demo\nprompts: &x {a: *x}\n",
        "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n",
        "model: 2001-99-99\n",
        "model: !!timestamp never\n",
        "model: !!int many\n",
        "model: !!float 1.2.3\n",
        "model: !!binary '*'\n",
        "model: !!python/object/apply:os.system ['true']\n",
        "model: !!python/name:os.system\n",
        "[" * 400,
        "{a: " * 400,
        "model: 0b\n",
        "model: 190:20:30:99999999\n",
        "model: '" + "x" * 5000 + "'\n",
        'model: "\\ud800"\nprompts: "\\0"\n',
        "1: 2\nnull: 3\n",
        "<<: 5\nmodel: demo\n",
        "<<: [1]\n",
        "--- 1\n--- 2\n",
        "model: demo\nbudget: {reduce: .nan}\n",
        "model: demo\nbudget: {reduce: " + "9" * 5000 + "}\n",
        "\x00",
        "\ufeff",
        "%YAML 9.9\n---\n",
    ],
)
def test_yaml_that_attacks(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    outcome(load_recipe, tmp_path / "recipe.yaml")


def test_aliases_are_taken_as_long_as_they_stay_small(tmp_path):
    text = "model: demo\ncalibration: {sampling: &s {steps: 2}}\ncompare: {sampling: *s}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").compare.sampling.steps == 2
    with pytest.raises(InputError, match="aliases"):
        (tmp_path / "recipe.yaml").write_text(LAUGHS + "model: *a11\n")
        load_recipe(tmp_path / "recipe.yaml")
