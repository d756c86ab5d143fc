"""Planted faults are caught, and named: the module, and the node within it."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from slimdiff.errors import InputError

onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("polygraphy", reason="parity is measured by Polygraphy")

from exporters.runtimes.unet import UNet  # noqa: E402
from exporters.validation.divergence import find_divergence, graph_inputs, own_errors  # noqa: E402
from exporters.validation.fragments import OnnxFragments  # noqa: E402
from exporters.validation.graph import check_parity  # noqa: E402
from exporters.validation.parity import BOUNDS  # noqa: E402

LAYER = "mid_block.attentions.0.transformer_blocks.0"


def reweigh(model, name, change) -> None:
    weight = next(w for w in model.graph.initializer if w.name == name)
    array = change(onnx.numpy_helper.to_array(weight).astype(np.float32))
    weight.CopyFrom(onnx.numpy_helper.from_array(array.astype(onnx.numpy_helper.to_array(weight).dtype), name))


def node_of(model, name):
    return next(n for n in model.graph.node if n.name == name)


def one_percent(name: str):
    def change(weight):
        noise = np.random.default_rng(0).standard_normal(weight.shape)
        return weight + noise * (0.01 * np.linalg.norm(weight) / np.linalg.norm(noise))

    return lambda model: reweigh(model, name, change)


def transposed(model) -> None:
    reweigh(model, f"{LAYER}.attn1.to_v.weight_t", lambda w: w.T.copy())


def wrong_scale(model) -> None:
    """Queries alone by sqrt(2): what forgetting to fold sqrt(r / d) into them would do."""
    node = node_of(model, f"{LAYER}.attn1/Mul")
    scale = next(w for w in model.graph.initializer if w.name == node.input[1])
    wrong = onnx.numpy_helper.from_array((onnx.numpy_helper.to_array(scale) * 2**0.5).astype(np.float32), "wrong")
    model.graph.initializer.append(wrong)
    node.input[1] = "wrong"


def scaled_output(model) -> None:
    for name in ("conv_out.weight", "conv_out.bias"):
        reweigh(model, name, lambda w: 1.02 * w)


def residual_left_out(model) -> None:
    node = node_of(model, f"{LAYER}/Add")
    node.input[1] = node.input[0]


def another_epsilon(model) -> None:
    attribute = next(a for a in node_of(model, f"{LAYER}.norm2/LayerNormalization").attribute if a.name == "epsilon")
    attribute.f = 0.05


FAULTS = {
    "1 % on a query projection": (
        one_percent("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight_t"),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q/MatMul",
    ),
    "1 % on a value projection": (
        one_percent(f"{LAYER}.attn2.to_v.weight_t"),
        f"{LAYER}.attn2.to_v",
        f"{LAYER}.attn2.to_v/MatMul",
    ),
    "1 % on a feed-forward": (
        one_percent(f"{LAYER}.ff.net.2.weight_t"),
        f"{LAYER}.ff.net.2",
        f"{LAYER}.ff.net.2/MatMul",
    ),
    "1 % on a convolution": (
        one_percent("up_blocks.1.resnets.0.conv1.weight"),
        "up_blocks.1.resnets.0.conv1",
        "up_blocks.1.resnets.0.conv1/Conv",
    ),
    "1 % on the time embedding": (
        one_percent("time_embedding.linear_1.weight"),
        "time_embedding.linear_1",
        "time_embedding.linear_1/Gemm",
    ),
    "transposed matrix": (transposed, f"{LAYER}.attn1.to_v", f"{LAYER}.attn1.to_v/MatMul"),
    "wrong softmax scale": (wrong_scale, f"{LAYER}.attn1", f"{LAYER}.attn1/Mul"),
    "scaled output": (scaled_output, "conv_out", "conv_out/Conv"),
    "residual left out": (residual_left_out, LAYER, f"{LAYER}/Add"),
    "another epsilon": (another_epsilon, f"{LAYER}.norm2", f"{LAYER}.norm2/LayerNormalization"),
}


@pytest.fixture
def plant(sharp_graphs, tmp_path):
    """Plants a fault in a copy of a graph; gives the file."""

    def planted(fault, precision="fp32"):
        model = onnx.load(str(sharp_graphs[precision]))
        fault(model)
        onnx.save(model, str(tmp_path / "model.onnx"))
        shutil.copy(sharp_graphs[precision].parent / "config.json", tmp_path)
        return tmp_path / "model.onnx"

    return planted


def check(file, sharp, calls, precision, **more):
    return check_parity(sharp, UNet.open(file, threads=1), calls, precision=precision, **more)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_without_fault_passes_and_no_module_is_named(sharp_graphs, sharp, calls, precision):
    result = check(sharp_graphs[precision], sharp, calls, precision, every_module=True)
    assert result["passed"] and result["first_diverging"] is None and result["divergence"] is None
    modules = {c["tensor"] for c in result["checks"] if c["metric"] == "own_relative_l2"}
    weighted = {path for path, m in sharp.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert weighted <= modules, "every layer with weights is held against the model"
    inside = [c["tensor"] for c in result["checks"] if c["tensor"].startswith("every tensor")]
    assert inside == ([f"every tensor@t={c.timestep}" for c in calls] if precision == "fp16" else [])
    assert find_divergence(OnnxFragments(sharp_graphs[precision]), sharp, calls[0], 5e-3)["kind"] == "accumulated"
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(plant, sharp, calls, fault):
    change, module, node = FAULTS[fault]
    result = check(plant(change), sharp, calls[:2], "fp32")
    assert not result["passed"]
    found = result["divergence"]
    assert (found["kind"], found["module"], found["node"]) == ("own error", module, node)
    assert result["first_diverging"] == found["tensor"] and found["tensor"].startswith(module)
    assert found["relative_l2"] > found["bound"] == BOUNDS["fp32"].relative_l2
    json.dumps(result, allow_nan=False)


def test_cosine_alone_would_not_see_a_scaled_output(plant, sharp, calls):
    result = check(plant(scaled_output), sharp, calls[:1], "fp32")
    assert {c["metric"] for c in result["checks"] if not c["passed"]} == {"relative_l2"}


def test_in_fp16_a_large_fault_is_named_among_the_roundings(plant, sharp, calls):
    result = check(plant(transposed, "fp16"), sharp, calls[:1], "fp16")
    assert result["first_diverging"] == f"{LAYER}.attn1.to_v" and result["divergence"]["relative_l2"] > 0.1


def test_in_fp16_a_small_fault_is_found_by_checking_every_module(plant, sharp, calls):
    change, module, _ = FAULTS["1 % on a value projection"]
    file = plant(change, "fp16")
    assert check(file, sharp, calls[:1], "fp16")["passed"], "1 % of one matrix is lost in fp16's bounds of the output"
    result = check(file, sharp, calls[:1], "fp16", every_module=True)
    assert not result["passed"] and result["first_diverging"] == module
    assert [c["tensor"] for c in result["checks"] if not c["passed"]] == [module]


def test_two_faults_the_first_in_execution_order_is_named(plant, sharp, calls):
    def both(model) -> None:
        FAULTS["1 % on a convolution"][0](model)
        FAULTS["1 % on a feed-forward"][0](model)

    file = plant(both)
    assert check(file, sharp, calls[:1], "fp32")["first_diverging"] == f"{LAYER}.ff.net.2"
    wrong = [e.tensor for e in own_errors(OnnxFragments(file), sharp, calls[0]) if not e.within(1e-4)]
    assert wrong == [f"{LAYER}.ff.net.2", "up_blocks.1.resnets.0.conv1"]


def test_another_models_graph_is_named_by_its_shape(exported, slim_and_plan, calls):
    slim = slim_and_plan[0]
    result = check(exported["dense"], slim, calls[:1], "fp32")
    assert not result["passed"] and result["first_diverging"] == "down_blocks.0.resnets.0.conv1"
    assert "shape" in result["divergence"]["problem"]


def test_errors_that_only_add_up_blame_no_module(sharp_graphs, sharp, calls):
    drifting = copy.deepcopy(sharp)
    for parameter in drifting.conv_out.parameters():
        parameter.data *= 1.001
    result = check_parity(sharp, drifting, calls[:1], graph=sharp_graphs["fp32"])
    assert result["divergence"]["kind"] == "accumulated" and result["first_diverging"] == "out_sample@t=981"
    assert result["divergence"]["largest"]["relative_l2"] < 1e-5


def test_a_part_says_what_it_misses(sharp_graphs):
    fragments = OnnxFragments(sharp_graphs["fp32"])
    node = next(n for n in fragments.nodes if n.name == "conv_in/Conv")
    with pytest.raises(InputError, match="needs sample"):
        fragments.run([node], {}, [node.outputs[0].name])


def test_parts_give_what_the_whole_gives(sharp_graphs, sharp, calls):
    """The graph cut at its middle block, run in two halves."""
    fragments = OnnxFragments(sharp_graphs["fp32"])
    whole = UNet.open(sharp_graphs["fp32"], threads=1)
    feed = graph_inputs(calls[0])
    cut = fragments.module_outputs(["mid_block"])["mid_block"]
    nodes, reads = fragments.between(set(fragments.inputs), [cut])
    assert set(reads) <= set(fragments.inputs)
    (middle,) = fragments.run(nodes, feed, [cut])
    rest, reads = fragments.between({cut, *fragments.inputs}, fragments.outputs)
    assert cut in reads and len(rest) < len(fragments.nodes)
    (out,) = fragments.run(rest, {**feed, cut: middle}, fragments.outputs)
    np.testing.assert_allclose(out, whole.predict(calls[0]).numpy(), rtol=1e-4, atol=1e-5)
    shifted = partial(fragments.run, rest, results=fragments.outputs)({**feed, cut: middle + 1})
    assert not np.allclose(out, shifted[0])


def test_parity_of_two_artifacts_is_one_call(sharp_graphs, sharp, calls):
    """A graph is looked into where its model is at hand; else outputs alone are held against each other."""
    result = check_parity(sharp, sharp_graphs["fp16"], calls[:1])
    assert result["passed"] and result["precision"] == "fp16"
    assert result["checks"][-1]["tensor"] == f"every tensor@t={calls[0].timestep}"
    graph = UNet.open(sharp_graphs["fp32"], threads=1)
    wrong = copy.deepcopy(sharp)
    wrong.conv_out.weight.data *= 1.02
    for candidate in (sharp_graphs["fp16"].parent, wrong):
        result = check_parity(graph, candidate, calls[:1], precision="fp32")
        assert not result["passed"] and {c["metric"] for c in result["checks"]} == {"finite", "cosine", "relative_l2"}
    with pytest.raises(InputError, match="every_module is for a graph"):
        check_parity(graph, sharp, calls, every_module=True)
