"""How many parameters of the public models leave a step's graph, counted in the graph without weights."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")

from benchmarks.full_size import MODELS
from benchmarks.split_sizes import measure, table


def test_every_parameter_of_the_tiny_model_is_in_one_part():
    row = measure("tiny")
    assert sum(row["parts"].values()) == row["parameters"] == MODELS["tiny"].parameters
    assert min(row["parts"].values()) > 0
    assert table([row]).splitlines()[-1].startswith("| tiny | 0.8 M | ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prompt", "time", "share"),
    [("sd15", 19_169_280, 27_875_520, 0.0547), ("sdxl", 340_787_200, 24_922_560, 0.1424)],
)
def test_what_leaves_the_step_of_public_models(name, prompt, time, share):
    row = measure(name)
    assert sum(row["parts"].values()) == row["parameters"] == MODELS[name].parameters
    assert (row["parts"]["prompt"], row["parts"]["time"]) == (prompt, time)
    assert (prompt + time) / row["parameters"] == pytest.approx(share, abs=5e-5)
