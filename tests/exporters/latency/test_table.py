"""The table of latencies: what it holds, that it is measured once, and that a whole model bears it out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, SAMPLING, tiny_pipeline, tiny_unet

from exporters.latency import alone
from exporters.latency import table as latency_table
from exporters.latency.table import _monotone, measure_latency
from exporters.settings import TableSettings
from slimdiff import PlanSettings
from slimdiff.denoising.trajectory import record_calls
from slimdiff.errors import MissingPackageError
from slimdiff.groups import find_sites
from slimdiff.planning.knapsack import find_layers
from slimdiff.planning.planner import chosen_sites
from slimdiff.slimming.skeleton import skeleton

PLANNING = PlanSettings(align=8)
IN_TORCH = TableSettings(runtime="torch", threads=1, ranks=3, rounds=3)


@pytest.fixture(scope="module")
def call(pipeline):
    return record_calls(pipeline, PROMPTS[:1], SAMPLING)[0]


@pytest.fixture(scope="module")
def table(pipeline, call, tmp_path_factory):
    return measure_latency(pipeline.unet, call, PLANNING, IN_TORCH, cache=tmp_path_factory.mktemp("cache"))


def test_every_layer_has_a_rising_curve_up_to_its_dense_rank(pipeline, table):
    layers = find_layers(chosen_sites(find_sites(pipeline.unet)[0], PLANNING), PLANNING.align)
    assert set(table.layers) == {layer.path for layer in layers}
    for layer in layers:
        curve = table.layers[layer.path]
        assert list(curve) == sorted(curve) and {layer.candidates[0], layer.dense_rank} <= set(curve)
        assert list(curve.values()) == sorted(curve.values()) and min(curve.values()) > 0
    assert table.of({}) == table.dense > 0


def test_the_same_shape_is_measured_once(table):
    assert 0 < table.made_from["measured"] < len(table.layers)


def test_resnets_are_measured_where_they_may_be_slimmed(pipeline, call, tmp_path):
    planning = PlanSettings(groups=("resnet",))
    table = measure_latency(pipeline.unet, call, planning, IN_TORCH, cache=tmp_path)
    assert set(table.layers) == {s.path for s in find_sites(pipeline.unet)[0] if s.group == "resnet"}
    assert all(0 < ms < table.dense for curve in table.layers.values() for ms in curve.values())


def test_what_is_known_is_not_measured_again(pipeline, call, tmp_path, monkeypatch):
    first = measure_latency(pipeline.unet, call, PLANNING, IN_TORCH, cache=tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and json.loads(files[0].read_text())["machine"] == first.made_from["machine"]

    def again(*_args, **_kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(latency_table.Measurement, "_take_turns", again)
    second = measure_latency(copy.deepcopy(pipeline.unet), call, PLANNING, IN_TORCH, cache=tmp_path)
    assert second.layers == first.layers and second.dense == first.dense and second.made_from["measured"] == 0
    with pytest.raises(AssertionError, match="measured again"):  # another runtime setting is another measurement
        measure_latency(
            copy.deepcopy(pipeline.unet), call, PLANNING, IN_TORCH.model_copy(update={"rounds": 4}), cache=tmp_path
        )
    files[0].write_text("{")
    with pytest.raises(AssertionError, match="measured again"):
        measure_latency(copy.deepcopy(pipeline.unet), call, PLANNING, IN_TORCH, cache=tmp_path)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import PROMPTS, SAMPLING, tiny_pipeline
from test_table import IN_TORCH, PLANNING
from exporters.latency import table
from slimdiff.denoising.trajectory import record_calls

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
alone, seen = table.Measurement.alone, []
def third_is_killed(self, layer, ranks):
    seen.append(layer.path)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.{name})
    return alone(self, layer, ranks)
table.Measurement.alone = third_is_killed
pipeline = tiny_pipeline()
call = record_calls(pipeline, PROMPTS[:1], SAMPLING)[0]
table.measure_latency(pipeline.unet, call, PLANNING, IN_TORCH, cache=Path({cache!r}))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path, name):
    tests, here = Path(__file__).parents[2], Path(__file__).parent
    script = KILLED.format(tests=str(tests), name=name, cache=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(tests.parent)])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).returncode != 0
    (file,) = tmp_path.glob("latency-*.json")
    kept = json.loads(file.read_text())
    assert len(kept["models"]) == 1 and len(kept["layers"]) == 2
    pipeline = tiny_pipeline()
    call = record_calls(pipeline, PROMPTS[:1], SAMPLING)[0]
    second = measure_latency(pipeline.unet, call, PLANNING, IN_TORCH, cache=tmp_path)
    after = json.loads(file.read_text())
    assert second.made_from["measured"] == len(after["layers"]) - 2 > 0
    assert after["models"] == kept["models"] and kept["layers"].items() <= after["layers"].items()


def test_the_work_and_its_time_are_said_before_it_and_the_bar_counts_every_figure(
    pipeline, call, tmp_path, monkeypatch, caplog
):
    shown, said = [], []

    def counted(**arguments):
        said.extend(caplog.messages)
        shown.append(bar(**arguments))
        return shown[-1]

    bar = latency_table.bar
    monkeypatch.setattr(latency_table, "bar", counted)
    monkeypatch.setattr("slimdiff.progress._shown", True)
    with caplog.at_level("INFO", logger="slimdiff"):
        measure_latency(pipeline.unet, call, PLANNING, IN_TORCH, cache=tmp_path)
    assert any("figures to measure in torch" in line and "about" in line for line in said)
    (shown,) = shown
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())
    figures = sum(len(times) for table in ("layers", "models") for times in kept[table].values())
    assert shown.n == shown.total == figures


def test_runs_end_when_the_interval_is_narrow_and_at_the_most_there_may_be(pipeline, call, tmp_path):
    def runs(interval, seconds):
        settings = TableSettings(runtime="torch", threads=2, rounds=30, interval=interval)
        measurement = latency_table.Measurement(pipeline.unet, call, {}, settings)
        done = []
        measurement._take_turns({"a": lambda: time.sleep(seconds(done.append(1) or len(done)))})
        return len(done) - 1

    assert runs(1.0, lambda _: 0.002) == alone.FEWEST
    assert runs(0.2, lambda number: 0.004 if number % 2 else 0.02) == 30


def test_the_interval_of_a_median_lies_between_two_runs_in_order():
    assert alone.interval_width([1.0] * 8) == 0
    assert alone.interval_width([1, 2, 3, 4, 5, 6, 7, 8]) == pytest.approx((7 - 2) / 4.5, rel=0.5)


@pytest.mark.parametrize("group", ["feed_forward", "resnet"])
def test_a_layer_alone_is_cut_as_in_the_slim_model(pipeline, call, group):
    layers = find_layers(chosen_sites(find_sites(pipeline.unet)[0], PlanSettings(groups=(group,))), 8)
    inputs = latency_table._layer_inputs(pipeline.unet, layers, call)
    layer, rank = layers[0], layers[0].candidates[0]
    module = alone._alone(pipeline.unet, layer, rank, inputs[layer.path])
    module = getattr(module, "layer", module)
    expected = skeleton(pipeline.unet, {layer.path: rank}).get_submodule(layer.path).state_dict()
    assert {name: tuple(w.shape) for name, w in module.state_dict().items()} == {
        name: tuple(w.shape) for name, w in expected.items()
    }
    assert all(torch.equal(w, expected[name]) for name, w in module.state_dict().items())


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv(latency_table.CACHE, str(tmp_path / "mine"))
    assert latency_table.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv(latency_table.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert latency_table.cache_folder() == tmp_path / "slimdiff"


def test_noise_does_not_make_a_larger_rank_faster():
    curve = _monotone({"8": 1.0, "16": 3.0, "24": 2.0, "32": 4.0})
    assert list(curve.values()) == [1.0, 2.5, 2.5, 4.0]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_layers_run_in_another_runtime_as_in_the_model(call, tmp_path, runtime):
    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    unet = tiny_unet(down_block_types=down, up_block_types=("UpBlock2D",) * 3, mid_block_type=None)
    settings = TableSettings(runtime=runtime, threads=1, ranks=2, rounds=3)
    table = measure_latency(unet, call, PLANNING, settings, cache=tmp_path)
    assert table.made_from["runtime"].startswith(runtime) and len(table.layers) == table.made_from["measured"] == 3
    assert all(0 < ms < table.dense for curve in table.layers.values() for ms in curve.values())


def test_a_missing_runtime_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"slimdiff\[onnx\]"):
        measure_latency(tiny_unet(), call, PLANNING, TableSettings(), cache=tmp_path)
