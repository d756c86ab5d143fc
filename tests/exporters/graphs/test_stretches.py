"""A graph worked on in stretches is the graph worked on whole."""

from __future__ import annotations

import numpy as np
import pytest

for module in ("nncf", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is an extra")

from exporters.graphs import quantise  # noqa: E402
from exporters.graphs.int8_layers import int8_layers  # noqa: E402
from exporters.graphs.naming import weight_dims  # noqa: E402
from exporters.graphs.reading import inputs_of, outputs_of, read_graph, weight_of  # noqa: E402
from exporters.graphs.stretches import STRETCH_BYTES, cut, peak_bytes, work_in_stretches  # noqa: E402
from exporters.layout import read_config  # noqa: E402
from exporters.runtimes.ort_session import OnnxRuntimeSession  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402

FEW = 2**17
"""Bytes of a stretch that cut the tests' UNets into several."""


@pytest.fixture(scope="module")
def graph(exported):
    return exported["dense"]


@pytest.fixture(scope="module")
def feeds(graph, calls):
    return [quantise._feed(read_graph(graph), call, number) for number, call in enumerate(calls)]


def products(model):
    return [node.name for node in model.graph if weight_of(node) is not None]


def quantised(graph, feeds, names, most):
    def work(model, own):
        return quantise._stretch_quantised(names, graph.parent.resolve(), model, own)

    return work_in_stretches(graph, feeds, names, work, most)


def test_scales_and_weights_are_those_of_the_whole_graph(graph, feeds):
    names = {name for name in products(read_graph(graph)) if name.startswith(("conv_in", "down_blocks", "mid_block"))}
    assert len(cut(read_graph(graph).graph, FEW)) > 5
    whole, stretched = (quantised(graph, feeds[:2], names, most) for most in (STRETCH_BYTES, FEW))
    layers, others = int8_layers(whole), int8_layers(stretched)
    assert list(layers) == list(others) and len(layers) > 20
    for path, layer in layers.items():
        other = others[path]
        np.testing.assert_array_equal(layer.zero_points[0], other.zero_points[0])
        for scale, found in zip(layer.scales, other.scales, strict=True):
            np.testing.assert_allclose(found, scale, rtol=1e-5)
        np.testing.assert_allclose(other.weight(), layer.weight(), rtol=1e-5)
        assert (layer.bias() is None) == (other.bias() is None)
        if layer.bias() is not None:
            np.testing.assert_allclose(other.bias(), layer.bias(), atol=1e-5)
    # What several stretches read, such as the text, is quantised once.
    kinds = [sorted(node.op_type for node in model.graph) for model in (whole, stretched)]
    assert kinds[0] == kinds[1]


def test_stretches_without_work_put_the_graph_together_again(graph, feeds, calls, tmp_path):
    ir = pytest.importorskip("onnx_ir")
    model = read_graph(graph)
    seen = []
    same = work_in_stretches(graph, feeds, products(model)[-1:], lambda part, own: seen.append(own) or part, FEW)
    assert [node.name for node in same.graph] == [node.name for node in model.graph]
    assert weight_dims(same) == weight_dims(model) and set(same.graph.initializers) == set(model.graph.initializers)
    assert inputs_of(same) == inputs_of(model) and outputs_of(same) == outputs_of(model)
    assert len(seen) == 1 and len(seen[0]) == len(calls)  # the last one's alone
    ir.save(same, str(tmp_path / "model.onnx"), external_data="model.onnx.data")
    (tmp_path / "config.json").write_bytes((graph.parent / "config.json").read_bytes())
    ends = [UNet(OnnxRuntimeSession(file), read_config(file)).predict for file in (graph, tmp_path / "model.onnx")]
    assert np.array_equal(*(end(calls[1]).numpy() for end in ends))


def test_a_smaller_stretch_takes_less_memory_and_a_call_more(graph):
    whole = read_graph(graph).graph
    assert peak_bytes(whole, 1, FEW) < peak_bytes(whole, 1)
    assert peak_bytes(whole, 3) == peak_bytes(whole, 1)  # one stretch: nothing crosses
    assert peak_bytes(whole, 3, FEW) > peak_bytes(whole, 2, FEW)
