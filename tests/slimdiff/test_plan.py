"""Precisions in plans: read, written, kept by slim models, and refused where they are another model's."""

from __future__ import annotations

import json

import pytest

from slimdiff import Plan, compress, load_pipeline
from slimdiff.errors import InputError
from slimdiff.models import plan_of

LAYERS = {
    "conv_in": {"precision": "own", "noise_error": 8e-3, "reason": "it costs too much for its multiply-adds"},
    "mid_block.resnets.0.conv1": {"precision": "int8", "noise_error": 2e-5, "reason": None},
    "mid_block.resnets.0.time_emb_proj": {"precision": "own", "noise_error": None, "reason": None},
}


@pytest.fixture
def with_layers(compression) -> Plan:
    return Plan.parse({**json.loads(compression.plan.model_dump_json()), "layers": LAYERS}, "a plan")


def test_a_plan_of_before_opens_and_is_written_as_it_was(compression, tmp_path):
    content = json.loads(compression.plan.model_dump_json())
    assert "layers" not in content and Plan.parse(content, "a plan").layers == {}
    compression.plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == content == compression.plan.model_dump(mode="json")


def test_precisions_lie_beside_ranks_in_the_file(with_layers, compression, tmp_path):
    with_layers.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == with_layers and again.int8() == ["mid_block.resnets.0.conv1"]
    assert again.sites == compression.plan.sites and "1 layers in int8" in str(again)
    assert {path: layer.model_dump() for path, layer in again.layers.items()} == LAYERS


def test_what_is_no_precision_is_refused(with_layers):
    content = with_layers.model_dump(mode="json")
    for layer in ({"precision": "int4"}, {"precision": "int8", "noise_error": -1.0}, {"precision": "int8", "bits": 8}):
        with pytest.raises(InputError, match=r"a plan: layers\.conv_in\."):
            Plan.parse({**content, "layers": {"conv_in": layer}}, "a plan")


def test_numbers_are_numbers_and_keys_are_there_once(with_layers):
    text = with_layers.model_dump_json()
    site = next(iter(with_layers.sites.values()))
    for wrong, place in ((f'"{site.rank}"', ".rank: "), ("true", ".rank: "), (f"{site.rank}.0", ".rank: ")):
        with pytest.raises(InputError, match=place):
            Plan.parse(text.replace(f'"rank":{site.rank},', f'"rank":{wrong},', 1), "a plan")
    with pytest.raises(InputError, match="a plan is not JSON: the key 'align' is there twice"):
        Plan.parse(text.replace('"align":4', '"align":4,"align":8'), "a plan")


def test_a_slim_model_keeps_the_precisions_of_its_plan(with_layers, compression, pipeline, calibration, tmp_path):
    made = {"calibration": calibration, "statistics": compression.statistics}
    slim = compress(pipeline, ["a red circle"], plan=with_layers, **made)
    slim.pipeline.save_pretrained(tmp_path / "slim")
    assert plan_of(load_pipeline(tmp_path / "slim").unet).int8() == with_layers.int8()
    for odd in ("mid_block", "mid_block.resnets.0.norm1", "nowhere"):
        other = with_layers.model_copy(update={"layers": {odd: with_layers.layers["conv_in"]}})
        with pytest.raises(InputError, match=f"precision of {odd}, which is no linear or convolution"):
            compress(pipeline, ["a red circle"], plan=other, **made)
