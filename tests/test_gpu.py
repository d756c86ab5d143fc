"""The GPU benchmark: its UNets and ranks are slimdiff's, and all of it runs small on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.full_size import MODELS
from benchmarks.gpu.__main__ import NEEDED
from benchmarks.gpu.cells import VARIANTS
from benchmarks.gpu.command import main
from benchmarks.gpu.layers import half, measure_layers, thin
from benchmarks.gpu.pictures import schedules_of
from benchmarks.gpu.unets import build, count, find_layers, make_inputs, model_of
from benchmarks.ranks import uniform_ranks
from slimdiff.models import plan_of
from slimdiff.planning.costs import count_parameters
from slimdiff.schedule import ScheduleSettings

ARGUMENTS = "--model tiny --device cpu --dtype fp32 --batch 1,2 --rounds 8 --runtime eager,graph --part unet,attention"


def run_without(*packages: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.gpu --help` where these packages cannot be imported."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({packages!r})); sys.argv[1:] = ['--help']; "
    code += "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


def test_it_needs_no_runtime_and_no_exporter():
    done = run_without("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt", "polygraphy", "ray")
    assert done.returncode == 0 and "--runtime" in done.stdout, done.stderr


def test_it_says_what_is_missing():
    done = run_without("scipy", "pydantic")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "benchmarks.gpu needs pydantic, scipy: python -m pip install pydantic scipy\n"
    assert {"torch", "diffusers"} <= set(NEEDED)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_full_sizes_are_cut_by_their_budget_to_heads_that_fuse(name):
    model = model_of(name)
    unet = build(model, {}, "meta", torch.float32)
    assert count_parameters(unet) == MODELS[name].parameters
    layers = find_layers(unet)
    ranks = uniform_ranks(unet, model.budget, layers)
    left = count_parameters(build(model, ranks, "meta", torch.float32))
    share = 100e6 / model.parameters if name == "sd15" else 0.25
    assert share <= 1 - left / model.parameters <= share * 1.01
    for layer in layers:
        cut = layer.candidates[:-1]
        assert all(rank % 8 == 0 and 4 * rank >= layer.dense_rank for rank in cut)
        assert layer.sites[0].heads == 1 or min(cut) >= 16
        assert {half(layer), layer.candidates[0], layer.dense_rank} <= set(thin(layer).candidates)
        assert len(thin(layer).candidates) <= 7


def test_a_slim_unet_has_its_ranks_and_costs_less():
    model = model_of("tiny")
    ranks = {layer.path: half(layer) for layer in find_layers(build(model, {}, "meta", torch.float32))}
    slim = build(model, ranks, "cpu", torch.float32)
    assert plan_of(slim).ranks().items() >= ranks.items()
    assert torch.isfinite(slim(**make_inputs(model, "cpu", torch.float32)).sample).all()
    dense, cut = count(model, {}), count(model, ranks)
    assert cut["flops"] < dense["flops"] and cut["parameters"] == count_parameters(slim) < dense["parameters"]


def test_the_layers_add_up_to_the_whole():
    model = model_of("tiny")
    layers = [thin(layer) for layer in find_layers(build(model, {}, "meta", torch.float32))]
    table, whole = measure_layers(model, layers, "cpu", torch.float32, 8)
    assert set(table.layers) == {layer.path for layer in layers} and table.dense == whole["dense_ms"]
    for layer in layers:
        curve = table.layers[layer.path]
        assert list(curve) == layer.candidates and list(curve.values()) == sorted(curve.values())
    saved = table.dense - table.of({layer.path: half(layer) for layer in layers})
    if whole["anchor"] != 1:
        assert saved == pytest.approx(whole["dense_ms"] - whole["half_ms"])


def test_it_runs_writes_and_goes_on(tmp_path, capsys):
    argv = [*ARGUMENTS.split(), "--out", str(tmp_path / "gpu.json")]
    main([*argv, "--minutes", "0"])
    assert "2 cells are left" in capsys.readouterr().out
    main(argv)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| tiny | eager |")]
    assert len(rows) == 2 * 3 and all(row.count("|") == 11 for row in rows)
    assert "Not measured: graph (needs a GPU)." in out and "left" not in out
    result = json.loads((tmp_path / "gpu.json").read_text())
    cell = result["cells"]["tiny/eager/fp32/2"]
    for variant in ("parameters", "latency"):
        speedup = cell[variant]["speedup"]
        assert 0 < speedup["low"] <= speedup["median"] <= speedup["high"] and cell[variant]["finite"]
        assert result["plans"]["tiny"][variant]["parameters"] < result["plans"]["tiny"]["dense"]["parameters"]
    assert result["plans"]["tiny"]["latency"]["expected"] > 1
    assert all(row["difference"] < 1e-5 for row in result["attention"]["fp32"])
    main(argv)
    again = capsys.readouterr()
    assert again.out == out and again.err == ""
    result["machine"]["torch"] = "1.0"
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="was measured elsewhere"):
        main(argv)


def test_pictures_are_timed_by_ranks_schedule_and_precision(tmp_path, capsys):
    argv = "--model tiny --device cpu --part pictures --runtime eager,graph --dtype fp32,bf16 --batch 1 --rounds 8"
    main([*argv.split(), "--steps", "6", "--out", str(tmp_path / "gpu.json")])
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "gpu.json").read_text())["pictures"]["tiny/eager/1"]
    rows = {f"fp32/{variant}/{kind}" for variant in VARIANTS for kind in ("full", "scheduled")} | {"bf16/dense/full"}
    assert set(found["pictures"]) == rows and found["pictures"]["fp32/dense/full"]["speedup"]["median"] == 1
    assert found["pictures"]["fp32/dense/scheduled"]["speedup"]["low"] > 1.2  # 3 of 6 guided, 2 of 6 whole
    assert sum(line.startswith("| tiny | eager | 1 | ") for line in out.splitlines()) == len(rows)
    assert found["schedule"] in out and "tiny | graph" not in out


@pytest.mark.parametrize(("name", "levels"), [("sd15", 4), ("sdxl", 3)])
def test_full_sizes_have_schedules(name, levels):
    found = schedules_of(model_of(name), ScheduleSettings(guidance_interval="0:0.5", deep_every=3), 25)
    assert found["full"].is_full() and found["full"].levels == levels
    assert found["scheduled"].depth == f"up_blocks.{levels - 1}" and len(found["scheduled"].whole) == 9
