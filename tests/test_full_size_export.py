"""The full-size export benchmark on its smallest model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="ONNX Runtime needs the extra onnx")

from benchmarks.full_size import MODELS
from benchmarks.full_size_export import measure, table
from benchmarks.random_models import random_pipeline
from benchmarks.ranks import uniform_ranks
from exporters.settings import ExportSettings
from slimdiff.planning.costs import count_parameters
from slimdiff.slimming.skeleton import skeleton


@pytest.mark.slow
def test_a_row_is_measured_and_told(tmp_path):
    row = measure("tiny", "slim", ExportSettings(), tmp_path, torch.float32, check=True)
    assert set(row["bytes"]) == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    assert 4 * row["parameters"] <= row["bytes"]["unet"] < 4.6 * row["parameters"]
    assert row["leftovers"] == row["misfits"] == row["unknown"] == 0 and row["error"] < 1e-4
    assert min(row["peak"], row["before"]) > row["weights"] and row["wall"] > 0
    assert "| tiny, slim | 0.7 M | fp32 |" in table([row]) and "0 dense dimensions left" in table([row])


def test_slim_models_have_the_size_that_the_budget_says():
    unet = random_pipeline("tiny").unet
    slim = skeleton(unet, uniform_ranks(unet, "10%"))
    assert 0.1 <= 1 - count_parameters(slim) / MODELS["tiny"].parameters < 0.11
