"""The full-size benchmark on its smallest model."""

from __future__ import annotations

from benchmarks.full_size import MODELS, measure, table


def test_a_row_is_measured_and_told():
    row = measure("tiny", pairs=2, sensitivities=True)
    assert row["parameters"] == MODELS["tiny"].parameters and 0 <= row["over"] < 0.005
    assert all(row[name] > 0 for name in ("plain", "factorise", "knapsack", "slim", "statistics", "peak_slimming"))
    text = table([row])
    assert "| tiny, float32 |" in text and "sensitivities measured" in text
