"""UNets that a user has quantised, before the commands: on processors that clip sums of bytes, and on others."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import call, refused

for module in ("onnxscript", "onnxruntime", "openvino", "polygraphy"):
    pytest.importorskip(module, reason=f"{module} is an extra")

from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static  # noqa: E402

from deploy import load  # noqa: E402
from exporters.graphs.int8 import EXACT_PROCESSORS  # noqa: E402
from exporters.graphs.reading import inputs_of, read_graph  # noqa: E402
from exporters.machine import EXACT_INT8  # noqa: E402

REFUSAL = "multiplies by 8-bit weights"


class Noise(CalibrationDataReader):
    def __init__(self, graph: Path):
        rng, inputs = np.random.default_rng(0), inputs_of(read_graph(graph))
        self.feeds = iter([{n: rng.standard_normal(s.shape).astype(s.dtype) for n, s in inputs.items()}])

    def get_next(self):
        return next(self.feeds, None)


def quantised(exported: Path, folder: Path, **options) -> Path:
    """The pipeline with its UNet's convolutions in int8."""
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("manifest.json"))
    graph = exported / "unet" / "model.onnx"
    for file in (folder / "unet").glob("model.onnx*"):
        file.unlink()
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "op_types_to_quantize": ["Conv"]}
    quantize_static(graph, folder / "unet" / "model.onnx", Noise(graph), **types, **options)
    return folder


@pytest.fixture(scope="module")
def wide(exported, tmp_path_factory) -> Path:
    return quantised(exported, tmp_path_factory.mktemp("int8") / "wide")


@pytest.fixture(scope="module")
def narrow(exported, tmp_path_factory) -> Path:
    return quantised(exported, tmp_path_factory.mktemp("int8") / "narrow", reduce_range=True)


@pytest.fixture(params=["0", "1"], ids=["without VNNI", "with VNNI"])
def vnni(request, monkeypatch) -> bool:
    monkeypatch.setenv(EXACT_INT8, request.param)
    return request.param == "1"


def test_generate_refuses_what_would_come_out_wrong_and_does_the_rest(wide, narrow, vnni, tmp_path, capsys):
    argv = ["--prompt", "a red circle", "--steps", "2", "--out", tmp_path / "x.png", "--runtime"]
    call(["generate", narrow, *argv, "openvino-fp32"], capsys)
    call(["generate", wide, *argv, "onnxruntime"], capsys)
    if vnni:
        call(["generate", wide, *argv, "openvino-fp32"], capsys)
    else:
        line = refused(["generate", wide, *argv, "openvino-fp32"], capsys, 3)
        assert REFUSAL in line and str(wide / "unet") in line and "--runtime onnxruntime" in line


def test_validate_says_which_processors_a_graph_is_for(wide, narrow, exported, monkeypatch, capsys):
    argv = ["--pipeline", exported.parent / "tiny", "--steps", "2", "--calls", "1", "--no-image"]
    for graph, processors in ((wide, EXACT_PROCESSORS), (narrow, "any")):  # neither within the bounds of fp32
        assert call(["validate", exported, graph, *argv], capsys, 1)["processors"] == processors
    inside = call(["validate", exported.parent / "tiny", wide, *argv], capsys, 1)
    assert inside["first_diverging"] == inside["divergence"]["module"] == "conv_in"
    monkeypatch.setenv(EXACT_INT8, "0")
    assert REFUSAL in refused(["validate", exported, wide, *argv, "--runtime", "openvino"], capsys, 3)


def test_bench_times_no_wrong_sums(wide, exported, monkeypatch, capsys):
    monkeypatch.setenv(EXACT_INT8, "0")
    assert REFUSAL in refused(["bench", exported, wide, "--runtime", "openvino"], capsys, 3)


def test_a_bundle_says_its_processors_and_passes_over_what_clips(wide, narrow, vnni, tmp_path, capsys):
    for source, processors in ((wide, EXACT_PROCESSORS), (narrow, "any")):
        out = tmp_path / source.name
        call(["bundle", source, "--target", "server", "--out", out], capsys)
        assert call(["inspect", out], capsys)["processors"] == processors
        assert (EXACT_PROCESSORS in (out / "README.md").read_text()) == (source == wide)
    chosen = load(tmp_path / "wide").chosen
    assert chosen.runtime == ("openvino" if vnni else "onnxruntime")
    assert any(REFUSAL in why for why in chosen.passed_over) != vnni
    assert load(tmp_path / "narrow").chosen.runtime == "openvino"


def test_doctor_says_what_becomes_of_sums_of_bytes(vnni, capsys):
    assert call(["doctor"], capsys)["int8_products"] == ("exact" if vnni else "clipped")
