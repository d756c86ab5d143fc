"""Graphs in int8 before `check_parity`: right ones pass, and whatever is planted in one is found, with its layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

for module in ("nncf", "onnxscript", "onnxruntime", "polygraphy"):
    pytest.importorskip(module, reason=f"{module} is an extra")

import onnx  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from exporters.validation.graph import check_parity  # noqa: E402
from exporters.validation.parity import BOUNDS, INT8_PSNR_DB, NOISE_ERROR, check_images  # noqa: E402

LAYER = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_right_graph_is_within_the_bounds_of_int8_and_not_of_fp32(runtime, int8_graph, dense, calls):
    from exporters.runtimes.unet import UNet

    pytest.importorskip(runtime, reason=f"{runtime} is an extra")
    found = check_parity(dense, UNet.open(int8_graph, runtime), calls)
    assert found["passed"] and found["precision"] == "int8" and found["divergence"] is None
    metrics = {row["metric"]: row for row in found["checks"]}
    assert {"finite", "relative_l2", "noise_error", "int8", "zero_point", "weight_steps", "int8_error"} <= set(metrics)
    assert metrics["noise_error"]["bound"] == NOISE_ERROR["int8"] and metrics["noise_error"]["value"] > 0
    assert any(row["tensor"].startswith("out_sample as written") for row in found["checks"])
    if runtime == "onnxruntime":
        wide = check_parity(dense, UNet.open(int8_graph, runtime), calls[1:2], precision="fp32")
        assert not wide["passed"]


def edited(graph: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a graph with a fault."""
    shutil.copytree(graph.parent, folder)
    model = onnx.load(folder / graph.name)
    change(model)
    (folder / f"{graph.name}.data").unlink()
    onnx.save(model, folder / graph.name)
    return folder / graph.name


def constant(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    """The fault of one constant being another."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        old = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(old).astype(old.dtype), name))

    return edit


def one_channel(scales: np.ndarray) -> np.ndarray:
    scales = scales.copy()
    scales[3] *= 1.1
    return scales


def not_quantised(model: onnx.ModelProto) -> None:
    """The layer multiplies what its quantisers would have rounded."""
    node = next(n for n in model.graph.node if n.name == f"{LAYER}/MatMul")
    maker = {output: n for n in model.graph.node for output in n.output}
    quantiser = maker[maker[node.input[0]].input[0]]
    node.input[0] = quantiser.input[0]


FAULTS = {
    "the scale of its input, too coarse": (constant(f"{LAYER}.input_scale", lambda s: s * 16), "int8_error"),
    "the scale of its input, too fine": (constant(f"{LAYER}.input_scale", lambda s: s / 16), "int8_error"),
    "the scale of one channel": (constant(f"{LAYER}.weight_scale", one_channel), "weight_steps"),
    "the zero point of its input": (constant(f"{LAYER}.input_zero_point", lambda z: z + 3), "zero_point"),
    "the zero point of its weight": (constant(f"{LAYER}.weight_zero_point", lambda z: z + 1), "zero_point"),
    "it is not quantised": (not_quantised, "int8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_its_layer(fault, int8_graph, dense, calls, tmp_path):
    change, metric = FAULTS[fault]
    found = check_parity(dense, edited(int8_graph, tmp_path / "wrong", change), calls[1:2])
    assert not found["passed"] and found["first_diverging"] == LAYER
    assert found["divergence"]["module"] == LAYER and found["divergence"]["problem"]
    assert metric in {row["metric"] for row in found["checks"] if not row["passed"] and row["tensor"] == LAYER}


def test_bounds_are_wider_than_those_of_rounding_and_no_wider_than_pictures_bear():
    assert BOUNDS["bf16"].relative_l2 < BOUNDS["int8"].relative_l2 < 1
    image = np.random.default_rng(0).random((16, 16, 3))
    rows = [check_images([image], [image + offset], INT8_PSNR_DB)[0]["passed"] for offset in (0.02, 0.1)]
    assert rows == [True, False]
