"""The cost of dense and slim in every runtime, on the smallest model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="ONNX Runtime needs the extra onnx")

from benchmarks.full_size import MODELS
from benchmarks.random_models import random_unet
from benchmarks.ranks import ranks_for_speedup
from benchmarks.runtimes import RUNTIMES, Settings, main, measure, table
from exporters.settings import BenchSettings, TableSettings
from slimdiff.groups import find_sites
from slimdiff.planning.costs import CostTable, parameter_costs

FEW = Settings(
    threads=1,
    latency=BenchSettings(processes=2, rounds=3, warmup=1),
    table=TableSettings(ranks=2, rounds=3),
    speedup=1.03,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch-bf16", "onnxruntime"])
def test_a_row_is_measured_and_told(cache, tmp_path, runtime):
    check_row(measure("tiny", 1, runtime, FEW, cache, tmp_path), runtime)
    assert not list(tmp_path.iterdir())  # no graph is left


def check_row(row, runtime):
    assert list(row["variants"]) == ["-10%", "1.03x by table"]
    for found in row["variants"].values():
        assert found["parameters"] < row["parameters"] == MODELS["tiny"].parameters
        assert found["speedup"]["low"] <= found["speedup"]["median"] <= found["speedup"]["high"]
        assert ("predicted" in found) == ("reached" in found) == (runtime != "torch-bf16")
    assert row["table"]["threads"] == row["threads"] == 1 and row["peak"] > 0
    text = table([row])
    assert f"| {runtime} | 1 | tiny, -10% |" in text and "of 2 rows" in text


def test_ranks_keep_what_the_table_promises():
    unet = random_unet(MODELS["tiny"])
    parameters = parameter_costs(unet, find_sites(unet)[0])
    layers = {path: {rank: cost / 2e5 for rank, cost in row.items()} for path, row in parameters.layers.items()}
    fake = CostTable("latency_ms", 10.0, layers)
    ranks = ranks_for_speedup(unet, fake, 1.05)
    assert 1.05 <= fake.dense / fake.of(ranks) < 1.06
    assert len(set(ranks.values())) > 1


@pytest.mark.slow
def test_what_was_measured_is_told_and_kept(tmp_path, capsys):
    argv = ["--model=tiny", "--batch=1", "--runtime=torch", "--threads=1", "--processes=2", "--speedup=1.03"]
    argv += ["--table-ranks=2", "--table-rounds=3", f"--out={tmp_path}"]
    assert main([*argv, "--only=row"]) == 0
    (kept,) = tmp_path.glob("tiny-batch1-torch-*.json")
    row = json.loads(kept.read_text())
    check_row(row, "torch")
    row["variants"]["-10%"]["speedup"]["median"] = 77.0
    kept.write_text(json.dumps(row))
    capsys.readouterr()
    assert main(argv) == 0
    assert "77.00x" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_runtimes_one_after_the_other(tmp_path):
    """As a user runs it: every step a process of its own."""
    pytest.importorskip("openvino", reason="OpenVINO is an extra")
    command = [sys.executable, "-m", "benchmarks.runtimes", "--model=tiny", "--threads=1", "--processes=2"]
    command += ["--table-ranks=2", "--table-rounds=3", "--speedup=1.03", f"--out={tmp_path}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(f"| {runtime} | {batch} | tiny, -10% |" in said for runtime in RUNTIMES for batch in (1, 2))
