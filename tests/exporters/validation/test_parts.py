"""A fault in one part is found, and named with its part; parts without one are exact."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("polygraphy", reason="parity is measured by Polygraphy")

from exporters.graphs.split import split_graph  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402
from exporters.validation.graph import check_parity  # noqa: E402

CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2"
FAULTS = {
    "prompt": (f"{CROSS}.to_v.weight_t", f"prompt: {CROSS}.to_v@t=981"),
    "time": ("up_blocks.1.resnets.0.time_emb_proj.bias", "time: up_blocks.1.resnets.0.time_emb_proj@t=981"),
    "step": (f"{CROSS}.to_out.0.weight_t", "step: out_sample@t=981"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sharp_graphs) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for name, file in sharp_graphs.items():
        split_graph(file, folder / name)
        shutil.copy(file.parent / "config.json", folder / name)
    return folder


def changed(part: Path, weight: str, by: float = 0.02) -> None:
    """Add noise to a weight of a part's graph."""
    model = onnx.load(part / "model.onnx")
    tensor = next(w for w in model.graph.initializer if w.name == weight)
    array = onnx.numpy_helper.to_array(tensor)
    noise = np.random.default_rng(0).standard_normal(array.shape)
    wrong = array + noise * (by * np.linalg.norm(array) / np.linalg.norm(noise))
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong.astype(array.dtype), weight))
    onnx.save(model, part / "model.onnx")


def test_parts_and_the_whole_graph_are_one_to_the_last_digits(folder, sharp_graphs, sharp, calls):
    found = check_parity(UNet.open(sharp_graphs["fp32"]), folder / "fp32", calls)
    assert found["passed"] and found["first_diverging"] is None
    assert {c["bound"] for c in found["checks"] if c["metric"] == "relative_l2"} == {1e-6}
    names = [c["tensor"].partition(":")[0] for c in found["checks"] if ":" in c["tensor"]]
    assert names == ["prompt", "time", "step"] * len(calls)
    for precision in ("fp32", "fp16"):
        found = check_parity(sharp, folder / precision, calls, every_module=True)
        assert found["passed"] and found["precision"] == precision, found["first_diverging"]


@pytest.mark.parametrize(
    "part, precision",
    [*((part, "fp32") for part in FAULTS), *(pytest.param(part, "fp16", marks=pytest.mark.slow) for part in FAULTS)],
)
def test_a_fault_is_named_with_its_part(folder, sharp_graphs, sharp, calls, tmp_path, part, precision):
    weight, name = FAULTS[part]
    wrong = shutil.copytree(folder / precision, tmp_path / "wrong")
    changed(wrong / part, weight, by=0.5)
    for reference in (UNet.open(sharp_graphs["fp32"]), sharp):
        found = check_parity(reference, wrong, calls)
        assert not found["passed"]
        assert found["first_diverging"] == name
        others = [c for c in found["checks"] if ":" in c["tensor"] and not c["tensor"].startswith(part)]
        assert others and all(c["passed"] for c in others)
    assert found["divergence"]["module"] == weight.rpartition(".")[0]  # the model in torch shows the inside


def test_a_fault_too_small_for_the_bounds_of_a_model_is_found_against_the_whole_graph(
    folder, sharp_graphs, sharp, calls, tmp_path
):
    wrong = shutil.copytree(folder / "fp32", tmp_path / "wrong")
    changed(wrong / "prompt", FAULTS["prompt"][0], by=1e-5)
    assert check_parity(sharp, wrong, calls)["passed"]
    found = check_parity(UNet.open(sharp_graphs["fp32"]), wrong, calls)
    assert found["first_diverging"] == FAULTS["prompt"][1]
