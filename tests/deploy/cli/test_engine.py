"""`slimdiff engine` on a graph of one convolution: reuse, rebuilding, several engines, and bad input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from deploy.cli.app import main
from exporters.engine.check import check_engine
from exporters.engine.gpu import Gpu
from slimdiff.storage import manifest

onnx = pytest.importorskip("onnx", reason="engines are built from ONNX")


@pytest.fixture
def graph(tmp_path) -> Path:
    """A folder with a convolution of an open batch, its weights in `model.onnx.data`."""
    for module in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: engines need the extra tensorrt-rtx")
    return write_graph(tmp_path / "onnx", seed=0)


def write_graph(folder: Path, seed: int) -> Path:
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).standard_normal((8, 4, 3, 3)).astype(np.float16)
    node = helper.make_node("Conv", ["sample", "conv.weight"], ["out_sample"], "conv/Conv", pads=[1, 1, 1, 1])
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", channels, 8, 8])
        for name, channels in (("sample", 4), ("out_sample", 8))
    ]
    kept = [numpy_helper.from_array(weights, "conv.weight")]
    content = helper.make_graph([node], "g", tensors[:1], tensors[1:], kept)
    model = helper.make_model(content, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    folder.mkdir(exist_ok=True)
    options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save_model(model, str(folder / "model.onnx"), **options)
    return folder


def engine(capsys, *argv, code=0):
    """Run the command with `--json`; its result, or the line that it fails with."""
    assert main(["engine", *map(str, argv), "--target", "sm89", "--backend", "tensorrt-rtx", "--json"]) == code
    seen = capsys.readouterr()
    if code == 0:
        return json.loads(seen.out)
    assert seen.out == ""
    return next(line for line in seen.err.splitlines() if line.startswith("slimdiff: error: "))


def test_an_engine_is_built_once_and_again_when_its_weights_change(graph, tmp_path, capsys):
    out = tmp_path / "engine"
    first = engine(capsys, graph, "--out", out, "--batch", 2)
    assert (first["reused"], first["built_because"]) == (False, "there is none yet")
    written = (out / "model.engine").stat().st_mtime_ns
    second = engine(capsys, graph, "--out", out, "--batch", 2)
    assert second["reused"] and (out / "model.engine").stat().st_mtime_ns == written
    assert second["key"] == first["key"] == manifest.read_manifest(out)["made_from"]["key"]
    write_graph(graph, seed=1)
    third = engine(capsys, graph, "--out", out, "--batch", 2)
    assert (third["reused"], third["built_because"]) == (False, "weights changed")
    assert check_engine(out, gpu=lambda: Gpu("a GPU", "sm89", "580.65"))["inputs"][0]["shape"] == [2, 4, 8, 8]


def test_several_shapes_are_several_engines(graph, tmp_path, capsys):
    out = tmp_path / "engines"
    made = engine(capsys, graph, "--out", out, "--batch", 1, "--batch", 2)["engines"]
    assert [(e["name"], e["inputs"][0]["shape"][0], e["reused"]) for e in made] == [
        ("batch-1", 1, False),
        ("batch-2", 2, False),
    ]
    again = engine(capsys, graph, "--out", out, "--shapes", "sample:2x4x8x8", "--shapes", "sample:4x4x8x8")["engines"]
    assert [e["name"] for e in again] == ["sample-2x4x8x8", "sample-4x4x8x8"]
    assert again[0]["key"] == made[1]["key"]
    assert set(manifest.verify_manifest(out)["made_from"]["engines"]) == {
        "batch-1",
        "batch-2",
        *(e["name"] for e in again),
    }
    for folder in ("batch-1", "sample-4x4x8x8"):
        assert check_engine(out / folder, gpu=lambda: Gpu("a GPU", "sm89", "580.65"))
    assert all(e["reused"] for e in engine(capsys, graph, "--out", out, "--batch", 1, "--batch", 2)["engines"])
    assert "'engines', and an engine would take" in engine(capsys, graph, "--out", out, "--batch", 1, code=2)


def test_a_range_of_shapes(graph, tmp_path, capsys):
    ends = [f"--{end}-shapes=sample:{n}x4x8x8" for end, n in (("min", 1), ("opt", 2), ("max", 4))]
    made = engine(capsys, graph, "--out", tmp_path / "engine", *ends)
    assert made["parts"]["shapes"] == {
        "profiles": [{"sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [4, 4, 8, 8]}}]
    }
    assert made["inputs"][0]["shape"] == [-1, 4, 8, 8]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "sample has open dims batchx4x8x8"),
        (["--batch", "2", "--shapes", "sample:2x4x8x8"], "one way"),
        (["--shapes", "2x4x8x8"], "sample:2x4x64x64"),
        (["--shapes", "sample:2x4xhigh"], "--shapes: "),
        (["--min-shapes", "sample:2x4x8x8"], "as many of each"),
        (["--batch", "0"], "--batch: "),
        (["--batch", "2", "--batch", "2"], "twice"),
    ],
)
def test_shapes_that_cannot_be(graph, tmp_path, capsys, argv, says):
    assert says in engine(capsys, graph, "--out", tmp_path / "engine", *argv, code=2)
    assert not (tmp_path / "engine").exists()


def test_an_engine_is_no_place_for_several(graph, tmp_path, capsys):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model.engine").write_bytes(b"x")
    manifest.write_manifest(tmp_path / "engine", "engine", {})
    argv = ["--out", tmp_path / "engine", "--batch", 1, "--batch", 2]
    assert "'engine', and a set of engines would take its place" in engine(capsys, graph, *argv, code=2)


def test_other_peoples_folders_are_left_alone(graph, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("four years")
    assert "did not write" in engine(capsys, graph, "--out", tmp_path / "mine", "--batch", 1, "--batch", 2, code=2)
