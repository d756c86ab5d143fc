"""The benchmark of int8 at full size, on a UNet that is not."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from benchmarks.full_size import MODELS  # noqa: E402
from benchmarks.full_size_int8 import PAIRS, UNETS, all_in_int8, bars, main  # noqa: E402
from benchmarks.random_models import random_unet  # noqa: E402
from slimdiff.models import plan_of  # noqa: E402


def test_every_product_but_the_time_layers_is_in_int8():
    unet = random_unet(MODELS["tiny"])
    plan = all_in_int8(unet, plan_of(unet))
    assert {"conv_in", "conv_out", "mid_block.attentions.0.proj_in"} < set(plan.int8())
    assert not any("time" in path for path in plan.int8()) and set(plan.int8()) == set(plan.layers)


def test_bars_are_held_against_what_is_measured():
    made = {unet: {"bytes": size} for unet, size in zip(UNETS, (100, 26, 88, 24), strict=True)}
    found = {pair: {"speedup": {"median": times}} for pair, times in zip(PAIRS, (1.2, 1.8, 1.5, 1.1), strict=True)}
    lines = bars(made, {"openvino-fp32": found, "onnxruntime": found})
    assert [line.split(" (")[0] for line in lines] == [
        "Files of slim int8 are 0.240 of dense fp32's",
        "openvino-fp32: slim int8 is 1.20 times as fast as dense-int8",
        "openvino-fp32: slim int8 is 1.80 times as fast as dense-fp32",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_measures_once_what_it_prints_each_time(tmp_path, capfd):
    for module in ("nncf", "onnxscript", "openvino"):
        pytest.importorskip(module, reason=f"{module} is an extra")
    asked = ["--model=tiny", "--runtime=openvino-fp32", "--processes=2", f"--work={tmp_path}"]
    assert main(asked) == 0
    first, said = capfd.readouterr()
    assert all(f"tiny, {unet}" in first for unet in UNETS) and said.count(" min\n") == len(UNETS)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert main(asked) == 0 and capfd.readouterr().out == first
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
