"""`slimdiff validate` on good graphs and on tampered ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deploy.cli.app import main

onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("polygraphy", reason="parity is measured by Polygraphy")


def validate(argv: list[Any], capsys, code: int = 0) -> dict[str, Any]:
    assert main(["validate", *(str(a) for a in argv), "--steps", "2", "--calls", "2", "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def graphs(workspace, pipeline, tmp_path_factory) -> dict[str, Path]:
    from exporters.graphs.export import export_unet
    from exporters.graphs.pipeline import example_call
    from exporters.settings import ExportSettings

    folder = tmp_path_factory.mktemp("graphs")
    call = example_call(pipeline)
    return {
        p: export_unet(pipeline.unet, folder / p, call, ExportSettings(precision=p)).parent for p in ("fp32", "fp16")
    }


@pytest.fixture(scope="module")
def tampered(graphs, tmp_path_factory) -> Path:
    """The last convolution gives 2 % more: the direction of the output stays."""
    folder = tmp_path_factory.mktemp("tampered")
    model = onnx.load(str(graphs["fp32"] / "model.onnx"))
    for name in ("conv_out.weight", "conv_out.bias"):
        weight = next(w for w in model.graph.initializer if w.name == name)
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.02, name))
    onnx.save(model, str(folder / "model.onnx"))
    shutil.copy(graphs["fp32"] / "config.json", folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_good_graph(workspace, graphs, capsys, precision):
    value = validate([workspace / "tiny", graphs[precision]], capsys)
    assert value["passed"] and value["precision"] == precision
    assert value["first_diverging"] is None and value["divergence"] is None
    assert value["reference"] == "model, fp32" and len(value["timesteps"]) == 2
    metrics = {c["metric"] for c in value["checks"]}
    assert metrics == {"finite", "cosine", "relative_l2", "psnr_db"}
    image = next(c for c in value["checks"] if c["metric"] == "psnr_db")
    assert image["tensor"] == "image#0" and image["value"] >= image["bound"] == 35
    inside = [c["tensor"] for c in value["checks"] if c["tensor"].startswith("every tensor")]
    assert inside == [f"every tensor@t={t}" for t in value["timesteps"] if precision == "fp16"]


def test_a_tampered_graph(workspace, tampered, capsys):
    value = validate([workspace / "tiny", tampered, "--no-image"], capsys, 1)
    assert not value["passed"] and value["first_diverging"] == "conv_out"
    assert value["divergence"]["node"] == "conv_out/Conv" and value["divergence"]["kind"] == "own error"
    assert {c["metric"] for c in value["checks"] if not c["passed"]} == {"relative_l2"}


def test_a_tampered_graph_in_words(workspace, tampered, capsys):
    argv = [str(workspace / "tiny"), str(tampered), "--steps", "1", "--calls", "1", "--no-image"]
    assert main(["validate", *argv]) == 1
    text = capsys.readouterr().out
    assert "they differ, first at conv_out" in text
    assert "conv_out goes wrong at node conv_out/Conv: relative L2 0.02" in text


def test_every_module(workspace, graphs, capsys):
    value = validate([workspace / "tiny", graphs["fp32"], "--no-image", "--every-module"], capsys)
    own = [c for c in value["checks"] if c["metric"] == "own_relative_l2"]
    assert value["passed"] and "conv_in" in {c["tensor"] for c in own} and all(c["value"] < 1e-5 for c in own)


def test_what_cannot_be_validated_is_told(workspace, graphs, capsys):
    argv = [str(graphs["fp16"]), str(graphs["fp32"]), "--pipeline", str(workspace / "tiny")]
    assert main(["validate", *argv]) == 2
    assert "fp32" in capsys.readouterr().err
    assert main(["validate", str(workspace / "tiny"), str(workspace / "tiny"), "--every-module"]) == 2
    assert "CANDIDATE ONNX" in capsys.readouterr().err
