"""The graph is the model: dims, names, dtypes, and nothing that is not needed."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from exporters.graphs.export import export_module, export_unet, unet_inputs
from exporters.graphs.naming import check_reduced_dims, weight_dims
from exporters.graphs.reading import read_graph
from exporters.settings import ExportSettings
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError

onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
ir = pytest.importorskip("onnx_ir", reason="the ONNX export needs the extra onnx")


def load(file):
    return onnx.load(str(file), load_external_data=False)


def test_inputs_and_outputs_are_optimums(exported):
    graph = load(exported["dense-fp16"]).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert shapes == {
        "sample": [2, 4, 8, 8],
        "timestep": [],
        "encoder_hidden_states": [2, 7, 32],
        "out_sample": [2, 4, 8, 8],
    }
    dtypes = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert dtypes["timestep"] == onnx.TensorProto.INT64
    assert dtypes["sample"] == dtypes["encoder_hidden_states"] == dtypes["out_sample"] == onnx.TensorProto.FLOAT16


def test_open_batch_is_open_in_the_batch_alone(exported):
    graph = load(exported["dense-open"]).graph
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert dims["sample"] == ["batch", 4, 8, 8]
    assert dims["encoder_hidden_states"] == ["batch", 7, 32]


def test_graph_is_small_and_weights_lie_beside_it(exported):
    for file in exported.values():
        model = load(file)
        assert {p.name for p in file.parent.iterdir()} == {"model.onnx", "model.onnx.data", "config.json"}
        outputs = {name for node in model.graph.node for name in node.output} - {"out_sample"}
        assert {v.name for v in model.graph.value_info} == outputs
        assert not any(n.metadata_props for n in model.graph.node)
        assert {o.version for o in model.opset_import if o.domain == ""} == {22}
        assert str(file.parent.parent) not in (file.parent / "config.json").read_text()


@pytest.mark.parametrize("name", ["dense", "dense-fp16", "dense-open"])
def test_every_linear_and_convolution_is_found_with_its_dims(exported, dense, name):
    found = weight_dims(read_graph(exported[name]))
    expected = {
        path: tuple(module.weight.shape)
        for path, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert found == expected


def test_weights_and_attention_are_named_after_modules(exported, dense):
    names = {i.name for i in load(exported["dense"]).graph.initializer}
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert f"{layer}.to_q.weight_t" in names
    assert "conv_in.weight" in names
    layers = sum(p.endswith((".attn1", ".attn2")) for p, _ in dense.named_modules())
    nodes = [node for node in read_graph(exported["dense"]).graph if node.op_type == "MatMul"]
    products = [n.name for n in nodes if all(ir.convenience.get_const_tensor(value) is None for value in n.inputs)]
    assert len(products) == 2 * layers
    assert f"{layer}/MatMul" in products


def test_reduced_dims_are_the_plans(exported, slim_and_plan):
    for name in ("slim", "slim-fp16"):
        rows = check_reduced_dims(exported[name], slim_and_plan[1])
        assert len(rows) == len(slim_and_plan[1].sites) and all(row["ok"] for row in rows)
    layers = {layer for row in rows for layer in row["found"]}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2"}


@pytest.mark.parametrize("group", ["query_key", "value_output", "feed_forward", "resnet"])
def test_a_plan_that_lies_is_caught_at_its_site(exported, slim_and_plan, group):
    plan = copy.deepcopy(slim_and_plan[1])
    name = next(n for n, s in plan.sites.items() if s.group == group)
    plan.sites[name].rank += 8
    assert [row["site"] for row in check_reduced_dims(exported["slim"], plan) if not row["ok"]] == [name]


def test_a_site_that_is_not_in_the_graph_is_told(exported, slim_and_plan):
    plan = copy.deepcopy(slim_and_plan[1])
    site = next(iter(plan.sites.values()))
    site.path = "nowhere"
    row = check_reduced_dims(exported["slim"], plan)[0]
    assert not row["ok"] and set(row["found"].values()) == {None}


def test_the_callers_model_is_as_before(calls, tmp_path, dense):
    unet = copy.deepcopy(dense).train()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    export_unet(unet, tmp_path, calls[0], ExportSettings(precision="fp16"))
    assert unet.training and unet.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["cross_attention_dim"] == 32


def test_sdxls_inputs_come_last(calls):
    added = {"time_ids": torch.zeros(2, 6), "text_embeds": torch.zeros(2, 16)}
    call = Call(0, 1, {**calls[0].arguments, "added_cond_kwargs": added, "timestep_cond": None})
    assert list(unet_inputs(call)) == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert set(added) == {"time_ids", "text_embeds"}


def test_arguments_without_an_input_are_refused(calls):
    call = Call(0, 1, {**calls[0].arguments, "encoder_attention_mask": torch.zeros(2, 7)})
    with pytest.raises(InputError, match="this call has encoder_attention_mask"):
        unet_inputs(call)


def test_no_such_file_and_no_graph_are_refused(tmp_path):
    with pytest.raises(InputError, match="no ONNX file"):
        read_graph(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff not a model")
    with pytest.raises(InputError, match="no ONNX model"):
        read_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("dim", ["batch", torch.export.Dim("height", min=2), 2 * torch.export.Dim("height", min=2)])
def test_an_open_dim_that_a_module_makes_a_constant_of_is_refused(dim, tmp_path):
    """The exporter writes a graph of one size, whose input says otherwise where the dim is a multiple."""

    class Counted(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(list(range(x.shape[0])))[:, None]

    with pytest.raises(InputError, match=r"a Counted computes for one size of x\.0, .*leave out --dynamic"):
        export_module(Counted(), {"x": torch.zeros(4, 3)}, ["out"], tmp_path, ExportSettings(), {"x": {0: dim}})


def test_a_number_that_is_nearly_zero_is_added(tmp_path):
    """Without it, zero would be divided by zero."""

    class Ratio(torch.nn.Module):
        def forward(self, x):
            return x / (x + 1e-15), x + 0.5, x + x

    file = export_module(Ratio(), {"x": torch.zeros(2, 3)}, ["ratio", "half", "twice"], tmp_path, ExportSettings())
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    ratio, half, twice = session.run(None, {"x": np.array([[0, 0, 1], [1, 0, 3]], np.float32)})
    assert ratio.tolist() == [[0, 0, 1], [1, 0, 1]]
    assert half.tolist() == [[0.5, 0.5, 1.5], [1.5, 0.5, 3.5]] and twice.tolist() == [[0, 0, 2], [2, 0, 6]]
