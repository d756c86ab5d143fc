"""What each kind of step takes: measured once, of whole pictures, and as often in a picture as its schedule says."""

from __future__ import annotations

import pytest
from conftest import SAMPLING

from exporters.latency import steps as module
from exporters.latency.steps import measure_picture, measure_steps
from exporters.settings import TableSettings
from slimdiff import PlanSettings
from slimdiff.planning.pictures import Picture
from slimdiff.schedule import make_schedule

IN_TORCH = TableSettings(runtime="torch", threads=1, ranks=2, rounds=3)
SCHEDULE = make_schedule(3, 8, guidance_interval=(0.0, 0.5), deep_every=2, depth="up_blocks.1")
KINDS = {(True, True), (True, False), (False, True), (False, False)}


def test_every_kind_of_step_is_timed_once(pipeline, tmp_path, monkeypatch):
    asked = {"settings": IN_TORCH, "cache": tmp_path}
    costs = measure_steps(pipeline, SAMPLING, depth="up_blocks.1", unguided=True, **asked)
    assert costs.kinds.keys() == KINDS and min(costs.kinds.values()) > 0 and costs.rest > 0
    guided = measure_steps(pipeline, SAMPLING, depth="up_blocks.1", unguided=False, **asked)
    assert guided.kinds.keys() == {(True, True), (True, False)}
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("it was measured before"))
    assert measure_steps(pipeline, SAMPLING, depth="up_blocks.1", unguided=True, **asked) == costs


def test_a_picture_takes_its_steps_and_what_is_beside_them(pipeline, tmp_path):
    planning = PlanSettings(align=16, groups=("feed_forward",))
    table = measure_picture(pipeline, Picture(SCHEDULE, 2), SAMPLING, planning, IN_TORCH, cache=tmp_path)
    costs = measure_steps(pipeline, SAMPLING, depth="up_blocks.1", unguided=True, settings=IN_TORCH, cache=tmp_path)
    assert table.name == "latency_ms_per_image" and table.dense == pytest.approx(costs.of(SCHEDULE))
    assert table.of({path: min(curve) for path, curve in table.layers.items()}) <= table.dense
    assert table.made_from["rest_ms"] == costs.rest and len(table.made_from["steps_ms"]) == 4
