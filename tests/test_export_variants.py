"""The comparison of ways to write a graph, on the smallest model."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="ONNX Runtime needs the extra onnx")

from benchmarks import export_variants
from benchmarks.export_variants import VARIANTS, measure, table
from exporters.settings import BenchSettings

QUICK = BenchSettings(processes=2, rounds=3, warmup=1)


@pytest.mark.parametrize(
    "told",
    [
        "ONNX Runtime's MultiHeadAttention",
        pytest.param("opset 23: Attention as one node", marks=pytest.mark.slow),
        pytest.param("older exporter, opset 20", marks=pytest.mark.slow),
        pytest.param("opset 20: GroupNorm in pieces", marks=pytest.mark.slow),
    ],
)
def test_a_variant_computes_the_same_and_is_timed(tmp_path, monkeypatch, told):
    monkeypatch.setattr(export_variants, "VARIANTS", {told: VARIANTS[told]})
    kept, scratch = tmp_path / "kept", tmp_path / "scratch"
    scratch.mkdir()
    rows = measure("tiny", ["onnxruntime"], QUICK, kept, scratch)
    (found,) = [row["runtimes"]["onnxruntime"] for row in rows]
    assert found["error"] < 1e-4 and found["speedup"]["low"] <= found["speedup"]["high"]
    assert not list(scratch.iterdir())  # no graph is left
    monkeypatch.setattr(export_variants, "VARIANTS", {told: None})  # what is kept is not measured again
    assert measure("tiny", ["onnxruntime"], QUICK, kept, scratch) == rows
    assert f"| {told} | " in table("tiny", rows)
