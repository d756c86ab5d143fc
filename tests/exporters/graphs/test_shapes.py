"""Every tensor's shape is known, and nothing of the dense model is left in a slim one's graph."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_unet

from slimdiff.errors import SlimdiffError
from slimdiff.groups import find_sites
from slimdiff.models import plan_of
from slimdiff.slimming.skeleton import skeleton

onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")

from exporters.graphs.export import export_unet  # noqa: E402
from exporters.graphs.reading import read_graph, shape_of  # noqa: E402
from exporters.graphs.shapes import add_shapes, check_leftovers, leftover_dims  # noqa: E402

TWO_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RESNET = "mid_block.resnets.0"


@pytest.fixture(scope="module")
def slim(dense):
    """Heads of 16 and 32 cut to 8, feed-forwards to a quarter, resnets to a half; one feed-forward stays dense."""
    kept = {"query_key": lambda n: 8, "value_output": lambda n: 8, "feed_forward": lambda n: n // 4}
    sites = find_sites(dense)[0]
    ranks = {site.path: kept.get(site.group, lambda n: n // 2)(site.dense_rank) for site in sites}
    del ranks["mid_block.attentions.0.transformer_blocks.0.ff"]
    return skeleton(dense, ranks)


@pytest.fixture(scope="module")
def graph(slim, calls, tmp_path_factory):
    return export_unet(slim, tmp_path_factory.mktemp("slim"), calls[0])


@pytest.fixture
def model(graph):
    return onnx.load(str(graph), load_external_data=False)


def saved(model, graph):
    """The changed graph beside the original's weights."""
    file = graph.parent / "changed.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def node_of(model, name):
    return next(node for node in model.graph.node if node.name == name)


def test_every_tensor_has_the_shape_that_it_has_in_onnx_runtime(graph, model, calls, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    values = [value for node in read_graph(graph).graph for value in node.outputs]
    shapes = {value.name: shape_of(value) for value in values if value.shape is not None}
    names = [name for node in model.graph.node for name in node.output if name]
    assert set(names) <= set(shapes) and all(isinstance(d, int) for name in names for d in shapes[name])
    asked = names[:: len(names) // 40]
    whole = onnx.load(str(graph))
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    outputs = [onnx.helper.make_tensor_value_info(name, types[name], None) for name in asked]
    whole.graph.output.extend(o for o in outputs if o.name != "out_sample")
    session = ort.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(asked, {name: tensor.numpy() for name, tensor in calls[0].arguments.items()})
    assert [array.shape for array in found] == [shapes[name] for name in asked]


def test_a_graph_that_gives_another_shape_than_torch_is_refused(model):
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 9
    with pytest.raises(SlimdiffError, match=r"\(2, 4, 9, 8\) in torch and \(2, 4, 8, 8\) in the graph"):
        add_shapes(model)


def test_a_graph_whose_shapes_clash_is_refused(model):
    del model.graph.value_info[:]
    weight = next(i for i in model.graph.initializer if i.name == f"{ATTENTION}.to_out.0.weight_t")
    weight.dims[0] += 8
    with pytest.raises(SlimdiffError, match="cannot be inferred"):
        add_shapes(model)


def test_nothing_dense_is_left_in_a_slim_graph(graph, slim):
    assert leftover_dims(graph, plan_of(slim)) == []
    check_leftovers(graph, plan_of(slim))


def test_as_many_heads_as_a_head_has_dense_dimensions_are_nothing_dense(calls, tmp_path):
    """Eight heads, of eight dimensions each before: the heads stay eight."""
    dense = tiny_unet(attention_head_dim=8, block_out_channels=(64, 64), **TWO_LEVELS)
    ranks = {site.path: 4 for site in find_sites(dense)[0] if site.group in ("query_key", "value_output")}
    assert export_unet(skeleton(dense, ranks), tmp_path, calls[0]).is_file()


def test_every_slimmed_layer_of_the_dense_graph_is_found(exported, slim):
    plan = plan_of(slim)
    found = {row["site"] for row in leftover_dims(exported["dense"], plan)}
    assert found == {site.path for site in plan.sites.values() if site.rank < site.dense_rank}


def test_a_planted_dense_shape_is_found(graph, model, slim):
    name = f"{ATTENTION}/MatMul"  # the scores; its heads are of 16 in the dense model
    for value in model.graph.value_info:
        if value.name == node_of(model, name).input[0]:
            value.type.tensor_type.shape.dim[3].dim_value = 32
    rows = leftover_dims(saved(model, graph), plan_of(slim))
    assert [row["site"] for row in rows] == [ATTENTION] and "32 is dense" in rows[0]["what"]


def test_a_planted_dense_reshape_is_found(graph, model, slim):
    reshape = [n for n in model.graph.node if n.op_type == "Reshape" and n.name.startswith(f"{ATTENTION}/")][-1]
    for weight in model.graph.initializer:
        if weight.name == reshape.input[1]:
            weight.CopyFrom(onnx.numpy_helper.from_array(torch.tensor([2, 64, 32]).numpy(), weight.name))
    rows = leftover_dims(saved(model, graph), plan_of(slim))
    assert any("tells" in row["what"] and row["dims"] == [2, 64, 32] for row in rows)


def test_a_planted_dense_weight_is_found(graph, model, slim):
    norm = next(n for n in model.graph.node if n.name == f"{RESNET}.norm2/GroupNormalization")
    norm.input[1] = "planted"
    model.graph.initializer.append(onnx.numpy_helper.from_array(torch.ones(64).numpy(), "planted"))
    rows = leftover_dims(saved(model, graph), plan_of(slim))
    assert [(row["site"], row["tensor"], row["dims"]) for row in rows] == [(RESNET, "planted", [64])]
    with pytest.raises(SlimdiffError, match=f"dense dimensions are left in .*, the first at {RESNET}"):
        check_leftovers(saved(model, graph), plan_of(slim))


def test_a_weight_that_nobody_reads_is_found(graph, model, slim):
    unread = model.graph.initializer.add()
    unread.CopyFrom(onnx.numpy_helper.from_array(torch.zeros(3).numpy(), "unread"))
    rows = leftover_dims(saved(model, graph), plan_of(slim))
    assert [(row["tensor"], row["dims"]) for row in rows] == [("unread", [3])]


def test_a_slim_model_that_is_not_as_planned_is_not_exported(slim, calls, tmp_path):
    lying = copy.deepcopy(slim)
    plan = plan_of(slim).model_dump(mode="json")
    for site in plan["sites"].values():
        site["rank"] -= 4 if site["path"] == ATTENTION else 0
    lying.register_to_config(slim_plan=plan)
    with pytest.raises(SlimdiffError, match=r"first at .*attn1: to_q's weight \[16\] \(the plan keeps 8\)"):
        export_unet(lying, tmp_path, calls[0])
