"""Ranks and int8 in one plan, from `compress` and from a recipe to graphs that follow it."""

from __future__ import annotations

import json

import pytest

for package in ("nncf", "onnxscript"):
    pytest.importorskip(package, reason="int8 needs the extras onnx and int8")

from command_line import call, refused  # noqa: E402
from conftest import PROMPTS  # noqa: E402

from deploy.build.workshop import Workshop  # noqa: E402
from deploy.cli.app import main  # noqa: E402
from deploy.recipe.recipe import load_recipe  # noqa: E402
from exporters.graphs.export import export_unet  # noqa: E402
from exporters.graphs.int8_layers import int8_layers, is_int8  # noqa: E402
from exporters.graphs.pipeline import example_call  # noqa: E402
from exporters.graphs.reading import read_graph  # noqa: E402
from exporters.latency.pair import write_job  # noqa: E402
from exporters.settings import ExportSettings  # noqa: E402
from slimdiff import InputError, Plan, load_pipeline  # noqa: E402

FEW = ["--samples", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def slim(workspace, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "slim"
    budget = ["--reduce", "8%", "--precision", "int8", "--int8-error", "1e-2"]
    argv = ["compress", workspace / "tiny", "--out", out, *budget, *FEW, "--prompts", workspace / "prompts.txt"]
    assert main([*map(str, argv), "--quiet"]) == 0
    return out


def test_an_export_follows_the_plan_without_being_asked(slim, workspace, tmp_path, capsys):
    plan = Plan.load(slim / "plan.json")
    assert plan.int8() and plan.parameters["slim"] < plan.parameters["dense"]
    prompts = ["--prompts", workspace / "prompts.txt", "--int8-calls", "4"]
    value = call(["export", slim, "--out", tmp_path / "onnx", *prompts], capsys)
    assert value["precision"] == "int8" and set(value["int8"]["layers"]) == set(plan.int8())
    graph = read_graph(tmp_path / "onnx" / "unet" / "model.onnx")
    assert set(int8_layers(graph)) == set(plan.int8())
    dear = {row["layer"]: row for row in value["int8"]["wide"]}
    assert all(dear[path]["reason"] == plan.layers[path].reason for path in dear)
    assert main([*map(str, ["validate", slim, tmp_path / "onnx"]), "--quiet"]) == 0
    capsys.readouterr()
    value = call(["export", slim, "--out", tmp_path / "wide", "--precision", "fp32"], capsys)
    assert value["precision"] == "fp32" and not is_int8(read_graph(tmp_path / "wide" / "unet" / "model.onnx"))


def test_what_leaves_the_plans_precision_out_says_so(slim, tmp_path, caplog):
    pipeline = load_pipeline(slim)
    export_unet(pipeline.unet, tmp_path / "graph", example_call(pipeline))
    count = len(Plan.load(slim / "plan.json").int8())
    assert f"the model's plan puts {count} layers into int8, and its graph is in fp32" in caplog.text
    asked = ExportSettings(precision="int8")
    with pytest.raises(InputError, match="torch takes models, and int8 is asked of a graph"):
        write_job("slim", pipeline.unet, example_call(pipeline), "torch", tmp_path / "job", asked)


@pytest.mark.parametrize(
    ("export", "dense", "slim"), [("", "fp32", "int8"), ("export: {precision: fp16}", "fp16", "fp16")]
)
def test_a_builds_dense_graph_has_the_precision_that_was_asked_for(export, dense, slim, workspace, tmp_path):
    recipe = (workspace / "recipe.yaml").read_text().replace("plan: {", "plan: {precision: int8, ") + export
    (workspace / "int8-plan.yaml").write_text(recipe)
    shop = Workshop(load_recipe(workspace / "int8-plan.yaml"), tmp_path)
    vars(shop)["slim"] = shop.dense  # as far as its modules go
    assert (shop.exported_as("dense").precision, shop.exported_as("slim").precision) == (dense, slim)


@pytest.mark.slow
def test_a_bundle_for_an_edge_takes_what_the_plan_says(slim, tmp_path, capsys):
    pytest.importorskip("openvino", reason="an edge runs OpenVINO, which is an extra")
    plan = Plan.load(slim / "plan.json")
    value = call(["bundle", slim, "--target", "edge", "--out", tmp_path / "edge"], capsys)
    assert [d["precision"] for d in value["denoisers"]] == ["int8"]
    rounded = [int8_layers(read_graph(file)) for file in (tmp_path / "edge").rglob("model.onnx")]
    assert [set(layers) for layers in rounded if layers] == [set(plan.int8())]


def test_compress_says_what_is_in_int8_and_what_is_not(workspace, tmp_path, capsys):
    argv = ["compress", workspace / "tiny", "--out", tmp_path / "slim", "--max-error", "0.05", "--precision", "int8"]
    value = call([*argv, *FEW, "--prompts", workspace / "prompts.txt"], capsys)
    plan = Plan.load(tmp_path / "slim" / "plan.json")
    assert value["int8"]["layers"] == plan.int8() != []
    assert {row["layer"] for row in value["int8"]["wide"]} | set(plan.int8()) == set(plan.layers)
    assert value["predicted"]["bytes"]["slim"] < value["predicted"]["bytes"]["dense"]
    assert value["noise_error"] <= 0.05


def test_torch_runs_no_int8_and_a_bound_alone_says_nothing(workspace, tmp_path, capsys):
    asked = ["compress", workspace / "tiny", "--out", tmp_path / "slim"]
    line = refused([*asked, "--speedup", "1.2", "--runtime", "torch", "--precision", "int8", *FEW], capsys)
    assert "torch runs no int8 here" in line
    assert "give precision int8" in refused([*asked, "--reduce", "8%", "--int8-error", "1e-4"], capsys)
    assert not (tmp_path / "slim").exists()


@pytest.mark.slow
def test_a_recipe_builds_the_slim_model_in_int8_and_the_dense_one_as_it_is(workspace, tmp_path):
    recipe = (workspace / "recipe.yaml").read_text().replace("plan: {", "plan: {precision: int8, int8_error: 0.01, ")
    recipe += "matrix: {targets: [openvino], shapes: [16x16], precision: [fp32, int8]}\n"
    (tmp_path / "recipe.yaml").write_text(recipe.replace("model: tiny", f"model: {workspace / 'tiny'}"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    assert main(["build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "build"), "--quiet"]) == 0
    graphs = {
        name: read_graph(next((tmp_path / "build" / "export" / name).rglob("model.onnx"))) for name in ("dense", "slim")
    }
    assert is_int8(graphs["slim"]) and not is_int8(graphs["dense"])
    plan = Plan.load(tmp_path / "build" / "plan" / "plan.json")
    assert set(int8_layers(graphs["slim"])) == set(plan.int8())
    for cell, rounded in (("openvino-1x16x16-fp32", False), ("openvino-1x16x16-int8", True)):
        graph = read_graph(next((tmp_path / "build" / "cells" / cell / "export" / "slim").rglob("model.onnx")))
        assert is_int8(graph) is rounded
    shares = json.loads((tmp_path / "build" / "build.json").read_text())["figures"]["int8_macs"]
    assert shares["dense"] == 0 < shares["slim"] < 1
