"""The GPU benchmark, which is one file of its own: its UNets are slimdiff's, and all of it runs small on a CPU."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import gpu
from benchmarks.full_size import MODELS as FULL_SIZE
from slimdiff.denoising.trajectory import Call
from slimdiff.groups import find_sites
from slimdiff.planning.costs import count_macs
from slimdiff.slimming.skeleton import skeleton

ARGUMENTS = "--model tiny --device cpu --dtype fp32 --batch 1,2 --rounds 8 --runtime eager,graph --part unet,attention"


def test_it_needs_torch_and_diffusers_alone():
    tree = ast.parse(Path(gpu.__file__).read_text())
    imported = {
        name.partition(".")[0]
        for node in tree.body  # at the top: what only a part needs is imported there
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "diffusers"}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "tiny"])
def test_layers_and_costs_are_those_of_slimdiffs_sites(name):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**gpu.MODELS[name].config)
    layers = {layer.path: layer for layer in gpu.find_layers(unet)}
    sites = [site for site in find_sites(unet)[0] if site.group != "resnet"]
    assert set(layers) == {site.path for site in sites}
    for path, layer in layers.items():
        here = [site for site in sites if site.path == path]
        assert {(s.dense_rank, s.heads) for s in here} == {(layer.dense, layer.heads)}
        assert layer.cost == sum(s.cost for s in here)
    if name != "tiny":
        assert sum(p.numel() for p in unet.parameters()) == FULL_SIZE[name].parameters


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_full_sizes_are_cut_by_what_was_asked(name):
    model = gpu.MODELS[name]
    layers = gpu.find_layers(gpu.build(model, {}, "meta", torch.float32))
    total = FULL_SIZE[name].parameters
    ranks = gpu.by_parameters(layers, total, model.reduce)
    left = sum(p.numel() for p in gpu.build(model, ranks, "meta", torch.float32).parameters())
    assert model.reduce <= 1 - left / total <= model.reduce + 0.02
    assert all(rank % gpu.ALIGN == 0 for rank in ranks.values())


def test_the_slim_unet_is_slimdiffs():
    model = gpu.MODELS["tiny"]
    dense = gpu.build(model, {}, "cpu", torch.float32)
    layers = gpu.find_layers(dense)
    ranks = {layer.path: layer.nearest(layer.dense * (0.3, 0.5, 0.7)[i % 3]) for i, layer in enumerate(layers)}
    assert len(set(ranks.values())) > 2
    expected = skeleton(dense, ranks)
    found = gpu.build(model, ranks, "cpu", torch.float32)
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    found.load_state_dict(expected.state_dict())
    inputs = gpu.inputs_of(model, 2, "cpu", torch.float32)
    outputs = [unet(**inputs).sample for unet in (found, expected, dense)]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    counted = gpu.count(model, ranks)
    one = gpu.inputs_of(model, 1, "cpu", torch.float32)
    assert counted["flops"] == 2 * count_macs(expected, Call(0, 501, one))
    assert counted["parameters"] == sum(p.numel() for p in expected.parameters())


def test_a_latency_budget_is_met_at_least_error():
    layers = [gpu.Layer(path, 64, 8, 1) for path in "ab"]
    # A unit of rank costs ten times as much time in a, so a is cut first.
    table = {"a": {r: r / 8 for r in range(16, 65, 8)}, "b": {r: r / 80 for r in range(16, 65, 8)}}
    ranks, saved = gpu.by_latency(layers, table, 3.0)
    assert saved >= 3.0 and ranks["a"] < ranks["b"]
    error = sum((1 - rank / 64) ** 2 for rank in ranks.values())
    for a, cost_a in table["a"].items():
        for b, cost_b in table["b"].items():
            if 8.8 - cost_a - cost_b >= saved:
                assert (1 - a / 64) ** 2 + (1 - b / 64) ** 2 >= error - 1e-12
    assert gpu.by_latency(layers, table, 0.0)[0] == {"a": 64, "b": 64}
    least, saved = gpu.by_latency(layers, table, 99.0)
    assert least == {"a": 16, "b": 16} and saved == pytest.approx(6.6)


def test_it_runs_writes_and_goes_on(tmp_path, capsys):
    argv = [*ARGUMENTS.split(), "--out", str(tmp_path / "gpu.json")]
    gpu.main([*argv, "--minutes", "0"])
    assert "2 cells are left" in capsys.readouterr().out
    gpu.main(argv)
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
    assert all(row["difference"] < 1e-5 for row in result["attention"]["fp32"])
    gpu.main(argv)
    again = capsys.readouterr()
    assert again.out == out and again.err == ""
    result["machine"]["torch"] = "1.0"
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="was measured elsewhere"):
        gpu.main(argv)
