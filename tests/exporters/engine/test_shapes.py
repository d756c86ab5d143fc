"""Shapes of engines, from what the settings say and the graph leaves open."""

from __future__ import annotations

import pytest

from exporters.engine.shapes import dims_of_inputs, engine_shapes
from exporters.engine.worker import network_shape
from exporters.graphs.reading import read_graph
from exporters.settings import EngineSettings, ShapeRange
from slimdiff.errors import InputError

OPEN = {
    "sample": ["batch", 4, "height", "width"],
    "timestep": [],
    "encoder_hidden_states": ["batch", 77, 768],
}


def test_open_dims_are_read_by_name(exported):
    assert dims_of_inputs(read_graph(exported["dense-open"])) == {
        "sample": ["batch", 4, 8, 8],
        "timestep": [],
        "encoder_hidden_states": ["batch", 7, 32],
    }


def test_dims_of_one_name_follow_one_another():
    shapes = engine_shapes(OPEN, EngineSettings(shapes={"sample": "2x4x64x48"}))
    assert shapes == {"fixed": {"sample": [2, 4, 64, 48], "timestep": [], "encoder_hidden_states": [2, 77, 768]}}
    ends = {"min": [1, 4, 8, 8], "opt": "2x4x64x64", "max": "4x4x96x64"}
    wanted = ShapeRange(**{end: {"sample": shape} for end, shape in ends.items()})
    profile = engine_shapes(OPEN, EngineSettings(profiles=[wanted]))["profiles"][0]
    assert profile["sample"] == {"min": [1, 4, 8, 8], "opt": [2, 4, 64, 64], "max": [4, 4, 96, 64]}
    assert [profile["encoder_hidden_states"][end][0] for end in ends] == [1, 2, 4]
    assert profile["timestep"] == {"min": [], "opt": [], "max": []}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "sample has open dims batchx4xheightxwidth.*say a batch"),
        ({"batch": 2}, "sample has open dims"),
        ({"shapes": {"latent": "2x4x8x8"}}, "no input 'latent': it has sample, timestep"),
        ({"shapes": {"sample": "2x3x8x8"}}, "sample has dims batchx4xheightxwidth, the engine was asked for 2x3x8x8"),
        ({"shapes": {"sample": "2x4x8"}}, "asked for 2x4x8"),
        ({"shapes": {"sample": "2x4x8x8", "encoder_hidden_states": "4x77x768"}}, "batch is 2 in sample and 4 in"),
    ],
)
def test_shapes_that_the_graph_does_not_take_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        engine_shapes(OPEN, EngineSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shapes": {"sample": "2x4xAx8"}}, "valid integer"),
        ({"shapes": {"sample": "0x4x8x8"}}, "greater than or equal to 1"),
        ({"batch": 2, "shapes": {"sample": "2x4x8x8"}}, "batch is given too"),
        ({"profiles": [{"min": {"a": "2"}, "opt": {"a": "1"}, "max": {"a": "4"}}]}, "goes up from min"),
        ({"profiles": [{"min": {"a": "2"}, "opt": {"b": "2"}, "max": {"a": "4"}}]}, "name the same inputs"),
    ],
)
def test_settings_that_say_no_shape_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        EngineSettings(**settings)


def test_what_profiles_agree_on_is_fixed_in_the_network():
    ends = {"min": "1x4x8x8", "opt": "2x4x8x8", "max": "4x4x8x8"}
    inputs = {"sample": ["batch", 4, "height", "width"], "timestep": [], "encoder_hidden_states": ["batch", 7, 32]}
    one = ShapeRange(**{end: {"sample": shape} for end, shape in ends.items()})
    wide = ShapeRange(**{end: {"sample": "2x4x8x16"} for end in ends})
    ranged = {n: engine_shapes(inputs, EngineSettings(profiles=p)) for n, p in (("one", [one]), ("two", [one, wide]))}
    assert network_shape(ranged["one"], "sample") == [-1, 4, 8, 8] and network_shape(ranged["one"], "timestep") == []
    assert network_shape(ranged["two"], "sample") == [-1, 4, 8, -1]
    assert network_shape(ranged["two"], "encoder_hidden_states") == [-1, 7, 32]
    fixed = engine_shapes(inputs, EngineSettings(shapes={"sample": "2x4x8x8"}))
    assert network_shape(fixed, "sample") == [2, 4, 8, 8]
