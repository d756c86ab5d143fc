"""The table of latencies: what it holds, that it is measured once, and that a whole model bears it out."""

from __future__ import annotations

import copy
import json

import pytest
from conftest import PROMPTS, SAMPLING, tiny_unet

from exporters.latency import table as latency_table
from exporters.latency.table import _monotone, measure_latency
from exporters.settings import TableSettings
from slimdiff import PlanSettings
from slimdiff.denoising.trajectory import record_calls
from slimdiff.errors import MissingPackageError
from slimdiff.groups import find_sites
from slimdiff.planning.knapsack import find_layers
from slimdiff.planning.planner import chosen_sites

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


def test_layers_that_do_not_fit_into_memory_together_are_measured_in_groups(
    pipeline, call, table, tmp_path, monkeypatch
):
    groups = []

    def seen(runs, *others):
        groups.append(list(runs))
        return take_turns(runs, *others)

    take_turns = latency_table._take_turns
    monkeypatch.setattr(latency_table, "_take_turns", seen)
    monkeypatch.setattr(latency_table, "available_memory", lambda: -(2**40))  # whatever is open is too much
    found = measure_latency(pipeline.unet, call, PLANNING, IN_TORCH, cache=tmp_path)
    assert groups[0] == [("", "dense"), ("", "half")] and len(groups) == 1 + found.made_from["measured"]
    assert all(len({key for key, _ in group}) == 1 for group in groups)
    assert {p: list(c) for p, c in found.layers.items()} == {p: list(c) for p, c in table.layers.items()}
    assert all(0 < ms < found.dense for curve in found.layers.values() for ms in curve.values())


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

    monkeypatch.setattr(latency_table, "_measure", again)
    second = measure_latency(copy.deepcopy(pipeline.unet), call, PLANNING, IN_TORCH, cache=tmp_path)
    assert second.layers == first.layers and second.dense == first.dense and second.made_from["measured"] == 0
    with pytest.raises(AssertionError, match="measured again"):  # another runtime setting is another measurement
        measure_latency(
            copy.deepcopy(pipeline.unet), call, PLANNING, IN_TORCH.model_copy(update={"rounds": 4}), cache=tmp_path
        )
    files[0].write_text("{")
    with pytest.raises(AssertionError, match="measured again"):
        measure_latency(copy.deepcopy(pipeline.unet), call, PLANNING, IN_TORCH, cache=tmp_path)


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
