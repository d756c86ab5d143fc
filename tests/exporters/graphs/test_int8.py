"""Products by 8-bit weights: found as they are written, right where they are opened, refused where sums are clipped."""

from __future__ import annotations

import platform

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs need the extra onnx")
pytest.importorskip("onnxruntime", reason="quantises graphs, and runs them")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnxruntime.quantization import (  # noqa: E402
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from exporters import machine  # noqa: E402
from exporters.graphs.int8 import EXACT_PROCESSORS, processors_for, wide_products  # noqa: E402
from exporters.graphs.reading import read_graph  # noqa: E402
from exporters.latency.measure import bench  # noqa: E402
from exporters.latency.pair import Job  # noqa: E402
from exporters.machine import EXACT_INT8, exact_int8  # noqa: E402
from exporters.runtimes.opening import open_session  # noqa: E402
from slimdiff.errors import MissingPackageError  # noqa: E402

RNG = np.random.default_rng(0)
BYTE, SIGNED = QuantType.QUInt8, QuantType.QInt8
# Activations, weights, format, further options -> the format that must be found, or nothing.
STATIC = {
    "Q/DQ": (BYTE, SIGNED, QuantFormat.QDQ, {}, "Q/DQ"),
    "Q/DQ, signed activations": (SIGNED, SIGNED, QuantFormat.QDQ, {}, "Q/DQ"),
    "Q/DQ per channel": (BYTE, SIGNED, QuantFormat.QDQ, {"per_channel": True}, "Q/DQ"),
    "Q/DQ, weights as floats": (
        *(BYTE, SIGNED, QuantFormat.QDQ),
        {"per_channel": True, "extra_options": {"AddQDQPairToWeight": True}},
        "Q/DQ",
    ),
    "Q/DQ, 7 bits": (BYTE, SIGNED, QuantFormat.QDQ, {"reduce_range": True}, None),
    "Q/DQ, weights as floats, 7 bits": (
        *(BYTE, SIGNED, QuantFormat.QDQ),
        {"reduce_range": True, "extra_options": {"AddQDQPairToWeight": True}},
        None,
    ),
    "Q/DQ, unsigned weights": (BYTE, BYTE, QuantFormat.QDQ, {}, None),
    "operators": (BYTE, SIGNED, QuantFormat.QOperator, {}, "QOperator"),
    "operators, 7 bits": (BYTE, SIGNED, QuantFormat.QOperator, {"reduce_range": True}, None),
}
DYNAMIC = {
    "dynamic": (SIGNED, {}, "dynamic"),
    "dynamic, 7 bits": (SIGNED, {"reduce_range": True}, None),
    "dynamic, unsigned weights": (BYTE, {}, None),
}
WAYS = {name: way[-1] for name, way in (STATIC | DYNAMIC).items()}
REFUSED = {"onnxruntime": {"QOperator"}, "openvino-fp32": {"Q/DQ", "QOperator"}}


class Noise(CalibrationDataReader):
    """Two inputs, of one sign as after an activation: sums get large."""

    def __init__(self, shape):
        self.feeds = iter([{"x": RNG.uniform(0.5, 1.05, shape).astype(np.float32)} for _ in range(2)])

    def get_next(self):
        return next(self.feeds, None)


def graph_of(nodes, weights, shape):
    """A graph `x -> y`; weights have one sign, so that sums of products get large."""
    drawn = {n: (RNG.uniform(0.6, 1, s) / np.prod(s[1:])).astype(np.float32) for n, s in weights.items()}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in drawn.items()]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opsets = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.fixture(scope="module", params=["convolutions", "linears"])
def quantised(request, tmp_path_factory):
    """Files of one model, quantised in every way, and what its inputs look like."""
    folder, node = tmp_path_factory.mktemp("int8"), onnx.helper.make_node
    if request.param == "convolutions":
        shape, sizes = (2, 16, 8, 8), {"first": (16, 16, 3, 3), "second": (16, 16, 1, 1)}
        ends = node("Conv", ["x", "first"], ["a"], pads=[1] * 4), node("Conv", ["b", "second"], ["y"])
    else:
        shape, sizes = (2, 8, 64), {"first": (64, 64), "second": (64, 64)}
        ends = node("MatMul", ["x", "first"], ["a"]), node("MatMul", ["b", "second"], ["y"])
    model = graph_of([ends[0], node("Relu", ["a"], ["b"]), ends[1]], sizes, shape)
    onnx.save(model, folder / "model.onnx")
    files = {name: folder / f"{i}.onnx" for i, name in enumerate(WAYS)}
    for name, (activations, weights, how, options, _) in STATIC.items():
        types = {"activation_type": activations, "weight_type": weights}
        quantize_static(folder / "model.onnx", files[name], Noise(shape), quant_format=how, **types, **options)
    for name, (weights, options, _) in DYNAMIC.items():
        quantize_dynamic(folder / "model.onnx", files[name], weight_type=weights, **options)
    return files, {"x": RNG.uniform(0.8, 1, shape).astype(np.float32)}


def error(file, runtime, feed):
    """Against the graph, node by node in numpy."""
    expected = ReferenceEvaluator(str(file)).run(None, feed)[0]
    found = open_session(file, runtime, threads=1).run(feed)["y"]
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("way", WAYS)
def test_wide_weights_are_found_as_they_are_written(quantised, way, tmp_path):
    files, _ = quantised
    expected = [WAYS[way]] if WAYS[way] else []
    assert list(wide_products(read_graph(files[way]))) == expected
    assert processors_for(read_graph(files[way])) == (EXACT_PROCESSORS if expected else "any")
    beside = tmp_path / "model.onnx"
    onnx.save(onnx.load(files[way]), beside, save_as_external_data=True, location="w.data", size_threshold=0)
    assert (tmp_path / "w.data").stat().st_size and list(wide_products(read_graph(beside))) == expected


@pytest.mark.parametrize("runtime", REFUSED)
@pytest.mark.parametrize("way", WAYS)
def test_without_vnni_a_graph_is_computed_right_or_refused(quantised, way, runtime, monkeypatch):
    if runtime != "onnxruntime":
        pytest.importorskip("openvino", reason="openvino is an extra")
    monkeypatch.setenv(EXACT_INT8, "0")
    files, feed = quantised
    if WAYS[way] not in REFUSED[runtime]:
        assert error(files[way], runtime, feed) < 2e-2
        return
    with pytest.raises(MissingPackageError, match="multiplies by 8-bit weights .*no VNNI: .* 7-bit weights") as refusal:
        open_session(files[way], runtime)
    assert "\n" not in str(refusal.value) and str(files[way]) in str(refusal.value)
    with pytest.raises(MissingPackageError, match="multiplies by 8-bit weights"):
        bench(Job("graph", str(files[way]), runtime), Job("graph", str(files[way]), runtime))


@pytest.mark.skipif(not exact_int8(), reason="this processor has no VNNI: 8-bit sums are clipped on it")
@pytest.mark.parametrize("runtime", REFUSED)
@pytest.mark.parametrize("way", WAYS)
def test_with_vnni_8_bit_products_are_right(quantised, way, runtime):
    if runtime != "onnxruntime":
        pytest.importorskip("openvino", reason="openvino is an extra")
    files, feed = quantised
    assert error(files[way], runtime, feed) < 2e-2


def test_what_moves_between_quantiser_and_product_hides_nothing():
    """Dequantised weights that are transposed, activations that are reshaped; weights alone in int8 count as floats."""
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[2, 3, 4] x) => (float[6, 4] y) <float s = {0.1}, uint8 z = {0}, int8[4, 4] w = {
        100, -3, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4}, int64[2] to = {6, 4}> {
        wide = DequantizeLinear(w, s)
        weight = Transpose <perm = [1, 0]> (wide)
        INPUT
        flat = Reshape(input, to)
        y = MatMul(flat, weight)
    }"""
    import onnx_ir as ir

    for into, found in (
        ("bytes = QuantizeLinear(x, s, z) input = DequantizeLinear(bytes, s, z)", ["Q/DQ"]),
        ("input = Identity(x)", []),
    ):
        assert list(wide_products(ir.from_onnx_text(text.replace("INPUT", into)))) == found


@pytest.mark.parametrize(
    ("architecture", "flags", "exact"),
    [
        ("x86_64", "fpu avx2", False),
        ("x86_64", "fpu avx512f avx512_vnni", True),
        ("AMD64", "fpu avx_vnni", True),
        ("x86_64", "amx_tile amx_int8", True),
        ("x86_64", None, None),
        ("arm64", None, True),
        ("aarch64", None, True),
    ],
)
def test_what_a_processor_does_is_read_off_it(architecture, flags, exact, monkeypatch, tmp_path):
    monkeypatch.delenv(EXACT_INT8, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"model name\t: X\nflags\t\t: {flags}\n")
    assert exact_int8() is exact
    monkeypatch.setenv(EXACT_INT8, "1")
    assert exact_int8() is True


def test_where_the_system_does_not_tell_the_user_can(quantised, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    files, _ = quantised
    with pytest.raises(MissingPackageError, match=f"may lack VNNI .*{EXACT_INT8}=1"):
        open_session(files["operators"])
    monkeypatch.setenv(EXACT_INT8, "1")
    assert open_session(files["operators"]).precision == "fp32"
