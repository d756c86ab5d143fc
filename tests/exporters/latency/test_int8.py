"""The table of latencies in int8: every layer that may be rounded has what that saves, measured once a shape."""

from __future__ import annotations

import pytest

pytest.importorskip("nncf", reason="nncf is not installed: pip install 'slimdiff[int8]'")

from conftest import PROMPTS, SAMPLING, tiny_pipeline  # noqa: E402

from exporters.latency import int8 as latency_int8  # noqa: E402
from exporters.latency.alone import Measurement  # noqa: E402
from exporters.latency.int8 import Int8Costs, Int8Job  # noqa: E402
from exporters.latency.table import measure_latency  # noqa: E402
from exporters.settings import TableSettings  # noqa: E402
from slimdiff import InputError, PlanSettings  # noqa: E402
from slimdiff.denoising.int8 import count_layer_macs  # noqa: E402
from slimdiff.denoising.trajectory import record_calls  # noqa: E402
from slimdiff.groups import find_sites  # noqa: E402
from slimdiff.planning.knapsack import find_layers  # noqa: E402

PLANNING = PlanSettings(align=8, groups=("feed_forward",), precision="int8")
SETTINGS = TableSettings(runtime="onnxruntime", threads=1, ranks=2, rounds=3)


@pytest.fixture(scope="module")
def call(pipeline):
    return record_calls(pipeline, PROMPTS[:1], SAMPLING)[0]


@pytest.mark.slow
def test_every_layer_has_what_it_saves_and_a_shape_is_measured_once(tmp_path, monkeypatch):
    one_level = {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "attention_head_dim": 1,
    }
    pipeline = tiny_pipeline(**one_level)
    call = record_calls(pipeline, PROMPTS[:1], SAMPLING)[0]
    table = measure_latency(pipeline.unet, call, PLANNING, SETTINGS, cache=tmp_path)
    assert set(table.int8) == set(count_layer_macs(pipeline.unet, call))
    assert set(table.layers) == {site.path for site in find_sites(pipeline.unet)[0] if site.group == "feed_forward"}
    slim = next(path for path in table.int8 if path.endswith("ff.net.2"))
    assert len(table.int8[slim]) == latency_int8.RANKS and len(table.int8["conv_in"]) == 1
    assert table.dense - table.of({}, ["conv_in"]) == pytest.approx(table.int8["conv_in"][1])

    def again(*_args, **_kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(Measurement, "_take_turns", again)
    assert measure_latency(pipeline.unet, call, PLANNING, SETTINGS, cache=tmp_path).int8 == table.int8


def test_savings_are_shared_out_by_multiply_adds_and_scaled_to_the_whole(pipeline, call):
    layers = [x for x in find_layers(find_sites(pipeline.unet)[0], 8) if x.sites[0].group == "feed_forward"]
    costs = Int8Costs(pipeline.unet, call, layers, "model")
    jobs = list(costs.jobs({layer.path: layer.path for layer in costs.modules}))
    known = {job.key: {t: ms for r in job.ranks for t, ms in ((f"{r}", 3.0), (f"{r}-int8", 2.0))} for job in jobs}
    known["model-int8"] = {"1": 10.0, "1-int8": 10.0 - (len(jobs) - 1) / 2}  # the whole shows half of it
    saved, anchor = costs.savings(jobs, known)
    assert anchor == pytest.approx(0.5)
    path = layers[0].path
    up, down = (saved[f"{path}.net.{name}"][layers[0].dense_rank] for name in ("0.proj", "2"))
    assert up + down == pytest.approx(0.5) and up / down == pytest.approx(2.0)  # the gate's rows, too
    known["model-int8"] = {"1": 10.0, "1-int8": 11.0}
    saved, anchor = costs.savings(jobs, known)
    assert anchor == 0 and {ms for curve in saved.values() for ms in curve.values()} == {0.0}


def test_a_job_of_a_layer_alone_is_of_one_rank(pipeline, call):
    costs = Int8Costs(pipeline.unet, call, [], "model")
    alone = [job for job in costs.jobs({layer.path: layer.path for layer in costs.modules}) if job.layer is None]
    assert {job.path for job in alone} == {latency_int8.WHOLE, *costs.alone} and "conv_in" in costs.alone
    assert all(isinstance(job, Int8Job) and list(job.ranks) == [1] for job in alone)


def test_torch_runs_no_int8(pipeline, call):
    with pytest.raises(InputError, match=r"torch runs no int8 here: .* openvino"):
        measure_latency(pipeline.unet, call, PLANNING, TableSettings(runtime="torch"))
