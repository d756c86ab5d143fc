"""UNets in int8: what NNCF quantises, what stays wide and why, and that every runtime computes what the graph says."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

for module in ("nncf", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is an extra")

from exporters.engine.build import build_engine  # noqa: E402
from exporters.graphs import quantise  # noqa: E402
from exporters.graphs.export import export_unet  # noqa: E402
from exporters.graphs.int8 import processors_for  # noqa: E402
from exporters.graphs.int8_costs import in_int8  # noqa: E402
from exporters.graphs.int8_layers import int8_layers, report_of, share_of_macs  # noqa: E402
from exporters.graphs.naming import weight_dims  # noqa: E402
from exporters.graphs.quantise import quantise_graph  # noqa: E402
from exporters.graphs.reading import inputs_of, read_graph  # noqa: E402
from exporters.layout import read_config  # noqa: E402
from exporters.runtimes.ort_session import OnnxRuntimeSession  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402
from exporters.settings import EngineSettings, ExportSettings  # noqa: E402
from exporters.validation.graph import AS_WRITTEN  # noqa: E402
from slimdiff.denoising.trajectory import predict  # noqa: E402
from slimdiff.errors import InputError  # noqa: E402
from slimdiff.plan import Plan  # noqa: E402
from slimdiff.planning.precision import choose_int8, errors_alone, settled_within  # noqa: E402

QKV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def relative_l2(candidate, reference) -> float:
    return float((candidate - reference).norm() / reference.norm())


def as_written(graph):
    """What a graph itself says, node by node in floats."""
    return UNet(OnnxRuntimeSession(graph, as_written=True), read_config(graph)).predict


@pytest.fixture(scope="module")
def wide_graph(tmp_path_factory, dense, calls):
    """The same UNet's graph in fp32."""
    return export_unet(dense, tmp_path_factory.mktemp("wide"), calls[0])


@pytest.fixture(scope="module")
def report(int8_graph):
    return report_of(read_graph(int8_graph))


def test_the_graph_says_what_is_in_int8_and_why_the_rest_is_not(int8_graph, dense, report):
    model = read_graph(int8_graph)
    assert list(int8_layers(model)) == report["layers"] and QKV in report["layers"]
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    every = {path for path, module in dense.named_modules() if isinstance(module, kinds)}
    wide = {row["layer"]: row for row in report["wide"]}
    assert every == set(wide) | set(report["layers"]) and not set(wide) & set(report["layers"])
    dear = [row for row in wide.values() if row["noise_error"] is not None]
    assert dear and all("costs too much" in row["reason"] for row in dear)
    assert all("one row" in row["reason"] for row in wide.values() if row["noise_error"] is None)
    assert {path for path in wide if "time" in path} == {path for path in every if "time" in path}
    assert report["quantiser"].startswith("nncf ")
    assert 0 < report["noise_error"] <= 3e-4 and report["share"] == pytest.approx(share_of_macs(model))


def test_names_dims_and_inputs_are_the_wide_graphs(int8_graph, wide_graph):
    model, wide = read_graph(int8_graph), read_graph(wide_graph)
    assert weight_dims(model) == weight_dims(wide) and inputs_of(model) == inputs_of(wide)
    layer = int8_layers(model)[QKV]
    assert layer.node.name == f"{QKV}/MatMul" and layer.node.inputs[1].producer().inputs[0].name == f"{QKV}.weight"
    assert not layer.zero_points[0].any() and not layer.zero_points[1].any()
    assert processors_for(model) == "any"  # 7 bits clip nowhere


def test_layers_alone_predict_what_all_of_them_change(int8_graph, dense, calls, report):
    reference, whole = [predict(dense, call) for call in calls], as_written(int8_graph)
    changed = sum(float((whole(call) - r).square().sum()) for call, r in zip(calls, reference, strict=True))
    whole_error = changed / sum(float(r.square().sum()) for r in reference)
    assert report["noise_error"] / 3 < whole_error < report["noise_error"] * 3


def test_torch_with_all_layers_in_int8_is_the_graph(int8_graph, dense, calls):
    from contextlib import ExitStack

    with ExitStack() as stack:
        for path, layer in int8_layers(read_graph(int8_graph)).items():
            stack.enter_context(in_int8(dense.get_submodule(path), layer))
        emulated = predict(dense, calls[1])
    graph = as_written(int8_graph)(calls[1])
    assert relative_l2(emulated, graph) < 0.2 * relative_l2(emulated, predict(dense, calls[1]))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "openvino-fp32"])
def test_runtimes_compute_what_the_graph_says(runtime, int8_graph, dense, calls):
    if "openvino" in runtime:
        pytest.importorskip("openvino", reason="openvino is an extra")
    unet = UNet.open(int8_graph, runtime)
    assert unet.session.precision == "int8"
    written = as_written(int8_graph)
    for call in calls:
        own = relative_l2(written(call), predict(dense, call))
        bound = AS_WRITTEN.relative_l2 if runtime == "openvino" else own  # its own choice may be bf16
        assert relative_l2(unet.predict(call), written(call)) < bound


def test_an_engine_quantises_what_the_graph_does(rtx, int8_graph, tmp_path, report):
    settings = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
    found = build_engine(int8_graph, tmp_path, settings)
    assert found["int8"] == report["layers"] and found["precision"] == "int8"
    from exporters.engine.sites import demand_int8

    with pytest.raises(InputError, match=f"{report['layers'][0]} is not in int8"):
        demand_int8(found["int8"][1:], report["layers"], "the network", InputError)
    with pytest.raises(InputError, match=f"{report['layers'][0]} is in int8, and should not be"):
        demand_int8(found["int8"], report["layers"][1:], "the network", InputError)


def test_layers_are_chosen_by_what_they_cost_for_their_work():
    errors = {"dear": 5e-4, "cheap": 1e-5, "large": 6e-4, "never": 2e-3}
    macs = {"dear": 10, "cheap": 10, "large": 1000, "never": 10**6}
    assert choose_int8(errors, macs, 1e-3) == ["cheap", "large"]
    assert choose_int8(errors, macs, 1.0) == list(errors) and choose_int8(errors, macs, 1e-6) == []


def copied(wide_graph, tmp_path):
    """The dense UNet's graph in fp32, to be quantised."""
    for file in wide_graph.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model.onnx"


def test_what_is_named_and_what_is_constant_stays_wide(wide_graph, dense, calls, tmp_path, capfd):
    unet, path = copy.deepcopy(dense), "mid_block.resnets.0.conv2"
    unet.get_submodule(path).register_forward_pre_hook(lambda _module, args: (torch.zeros_like(args[0]),))
    settings = ExportSettings(precision="int8", int8_error=1e-2, keep_fp32=["*.attn2"])
    report = quantise_graph(copied(wide_graph, tmp_path), unet, calls, settings)
    assert capfd.readouterr().out == ""  # stdout belongs to results
    wide = {row["layer"]: row["reason"] for row in report["wide"]}
    assert wide[path] == "its input is 0 in all calls" and "conv_in" in report["layers"]
    named = [layer for layer in wide if ".attn2." in layer]
    assert named and {wide[layer] for layer in named} == {"keep_fp32 names it"}
    assert not any(".attn2." in layer for layer in report["layers"])


def test_open_sizes_are_counted_and_calibrated_as_the_calls_have_them(dense, calls, tmp_path, report):
    settings = ExportSettings(precision="int8", int8_error=3e-4, dynamic_batch=True, dynamic_size=True)
    graph = export_unet(dense, tmp_path, calls[0], settings, calibration=calls)
    found = report_of(read_graph(graph))
    assert found["layers"] == report["layers"] and found["share"] == report["share"] == share_of_macs(read_graph(graph))
    larger = copy.deepcopy(calls[0])
    larger.arguments["sample"] = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    assert relative_l2(UNet.open(graph).predict(larger), predict(dense, larger)) < 0.1


def test_a_plan_says_what_is_in_int8(wide_graph, dense, calls, tmp_path):
    said = {
        QKV: {"precision": "int8", "noise_error": 1e-5},
        "conv_in": {"precision": "own", "noise_error": 0.2, "reason": "it costs too much"},
        "time_embedding.linear_1": {"precision": "int8", "noise_error": 2e-5},
    }
    about = {"model_class": "UNet2DConditionModel", "model_hash": "", "allocation": "global", "align": 8, "sites": {}}
    plan = Plan.parse({**about, "parameters": {"dense": 1, "slim": 1}, "layers": said}, "a plan")
    asked = ExportSettings(precision="int8", int8_error=1e-9)  # which is for exports that choose
    graph = copied(wide_graph, tmp_path)
    report = quantise_graph(graph, dense, calls, asked, plan)
    assert set(report["layers"]) == {QKV, "time_embedding.linear_1"} == set(int8_layers(read_graph(graph)))
    assert report["noise_error"] == pytest.approx(3e-5)
    wide = {row["layer"]: row for row in report["wide"]}
    assert wide["conv_in"] == {"layer": "conv_in", "reason": "it costs too much", "noise_error": 0.2}
    assert wide["conv_out"]["reason"] == "the plan keeps it so"
    plan.layers["mid_block"] = plan.layers[QKV]
    with pytest.raises(InputError, match="the plan puts mid_block into int8, and the UNet's graph has no product"):
        quantise_graph(copied(wide_graph, tmp_path), dense, calls, asked, plan)


def test_too_little_memory_is_said_before_it_ends_the_process(monkeypatch, caplog):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10e9))
    quantise._warn_of_memory(10**10)
    assert not caplog.messages
    quantise._warn_of_memory(10**10 + 1)
    assert "NNCF takes about 10 GB here, and 10 GB are free" in caplog.messages[0]


def test_what_cannot_be_calibrated_is_refused_in_one_line(wide_graph, dense, calls, tmp_path):
    graph, asked = copied(wide_graph, tmp_path), partial(ExportSettings, precision="int8")
    before = graph.read_bytes()
    with pytest.raises(InputError, match="calibrated on recorded denoiser calls, and there are none"):
        export_unet(dense, tmp_path / "none", calls[0], asked())
    broken = copy.deepcopy(calls)
    broken[1].arguments["encoder_hidden_states"][0, 0, 0] = float("inf")
    with pytest.raises(InputError, match=r"the input of \S+\.attn2\.to_k is not finite at t=501"):
        quantise_graph(graph, dense, broken, asked())
    with pytest.raises(InputError, match="no layer of this UNet stays within int8_error 1e-12"):
        quantise_graph(graph, dense, calls, asked(int8_error=1e-12))
    with pytest.raises(InputError, match="keep_fp32: no module matches 'nothing'"):
        quantise_graph(graph, dense, calls, asked(keep_fp32=["nothing"]))
    assert graph.read_bytes() == before


def test_a_graph_of_another_batch_is_calibrated_on_samples_in_turn(dense, calls, tmp_path):
    from exporters.graphs.quantise import _feed

    call = copy.deepcopy(calls[0])
    for name in ("sample", "encoder_hidden_states"):
        call.arguments[name] = call.arguments[name][[0, 1, 1]]
    model = read_graph(export_unet(dense, tmp_path, call))
    feeds = [_feed(model, calls[0], number) for number in range(2)]
    rows = calls[0].arguments["sample"].numpy()
    assert np.array_equal(feeds[0]["sample"], rows[[0, 1, 0]]) and np.array_equal(feeds[1]["sample"], rows[[1, 0, 1]])


@pytest.mark.slow
def test_nncf_reports_its_use_to_nobody():
    code = "from exporters.graphs.quantise import _nncf; _nncf(); import nncf.telemetry as t; print(type(t.telemetry))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NNCF", "PYTEST"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "MagicMock" in done.stdout  # in the place of what would send


def alone_in_int8(dense, layers, calls, settled=None):
    return errors_alone(dense, list(layers), calls, lambda p: in_int8(dense.get_submodule(p), layers[p]), settled)


def test_errors_alone_are_those_of_whole_passes(int8_graph, dense, calls):
    layers = int8_layers(read_graph(int8_graph))
    alone = alone_in_int8(dense, layers, calls)
    assert list(alone) == list(layers)
    reference = [predict(dense, call) for call in calls]
    for path in (list(layers)[0], QKV, list(layers)[-1]):
        with in_int8(dense.get_submodule(path), layers[path]):
            changed = sum(
                float((predict(dense, c) - r).double().square().sum()) for c, r in zip(calls, reference, strict=True)
            )
        assert alone[path] == pytest.approx(
            changed / sum(float(r.double().square().sum()) for r in reference), rel=1e-6
        )
    assert not any("forward" in vars(module) for module in dense.modules())


def test_no_more_calls_are_taken_than_the_choice_needs(int8_graph, dense, calls, caplog):
    caplog.set_level("INFO", logger="slimdiff")
    layers = dict(list(int8_layers(read_graph(int8_graph)).items())[-3:])
    seen = []
    alone_in_int8(dense, layers, calls, lambda before, known: bool(seen.append((before, known))))
    assert len(seen) == len(calls) - 1 == 2  # never settled: every call, held against the one before
    assert alone_in_int8(dense, layers, calls, lambda *_: True) == seen[0][1] != seen[1][1]
    assert "what 3 layers cost alone: about" in caplog.messages[0] and "of 3 calls at most" in caplog.messages[0]


def test_measurements_agree_that_choose_almost_the_same_layers():
    macs = {"large": 96, "small": 4, "other": 100}
    settled = settled_within(macs, 1e-3)
    errors = {"large": 4e-4, "small": 4e-4, "other": 1e-4}
    assert settled(errors, {**errors, "small": 2e-3})  # 4 of 200 MACs
    assert not settled(errors, {**errors, "large": 2e-3})
