"""A graph whose 8-bit products overflow on a processor is refused there, and no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from exporters.graphs import int8
from exporters.graphs.reading import read_graph
from exporters.runtimes.opening import open_session
from slimdiff.errors import InputError

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((1, 16, 8, 8)).astype(np.float32)


class Images(CalibrationDataReader):
    def __init__(self) -> None:
        self.rest = iter([{"x": IMAGE}])

    def get_next(self):
        return next(self.rest, None)


@pytest.fixture(scope="module")
def floating(tmp_path_factory) -> Path:
    """A convolution and a linear."""
    weights = {
        "kernel": RNG.standard_normal((16, 16, 3, 3)).astype(np.float32),
        "matrix": RNG.standard_normal((8, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["h"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["h", "matrix"], ["y"], name="linear"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 16, 8, 8)) for name in "xy"]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "two", values[:1], values[1:], tensors)
    file = tmp_path_factory.mktemp("int8") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    return file


def static(floating: Path, out: Path, form=QuantFormat.QDQ, **options) -> Path:
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True} | options
    quantize_static(floating, out, Images(), quant_format=form, **options)
    return out


def dynamic(floating: Path, out: Path, **options) -> Path:
    quantize_dynamic(floating, out, weight_type=options.pop("weight_type", QuantType.QInt8), **options)
    return out


def weights_alone(floating: Path, out: Path) -> Path:
    """The linear's weight in 8 bits, multiplied as floating-point numbers."""
    model = onnx.load(floating)
    matrix = model.graph.initializer[1]
    integers = np.full((8, 8), 127, np.int8)
    matrix.CopyFrom(numpy_helper.from_array(integers, "integers"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["integers", "scale"], ["matrix"]))
    onnx.save(model, out)
    return out


WRITTEN = {
    "static Q/DQ": (static, {}, True),
    "static Q/DQ of signed activations": (static, {"activation_type": QuantType.QInt8}, True),
    "static operators": (static, {"form": QuantFormat.QOperator}, True),
    "dynamic": (dynamic, {}, True),
    "static Q/DQ of 7 bits": (static, {"reduce_range": True}, False),
    "dynamic of 7 bits": (dynamic, {"reduce_range": True}, False),
    "dynamic of unsigned weights": (dynamic, {"weight_type": QuantType.QUInt8}, False),
    "weights alone": (weights_alone, {}, False),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_graph_that_would_overflow_is_refused_where_it_would(name, floating, tmp_path, monkeypatch):
    write, options, overflows = WRITTEN[name]
    file = write(floating, tmp_path / "model.onnx", **options)
    assert int8.processors_for(read_graph(file)) == (int8.PROCESSORS if overflows else None)
    for right in (True, None):
        monkeypatch.setattr(int8, "multiplies_bytes", lambda right=right: right)
        assert open_session(file).run({"x": IMAGE})["y"].shape == IMAGE.shape
    monkeypatch.setattr(int8, "multiplies_bytes", lambda: False)
    if not overflows:
        open_session(file)
        return
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(InputError, match=r"overflow on this processor.*7 bits") as caught:
            open_session(file, runtime)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_floating_point_graph_runs_on_every_processor(floating):
    assert int8.processors_for(read_graph(floating)) is None


def test_weights_in_a_file_of_their_own_are_looked_at(floating, tmp_path):
    for name, options in (("eight", {}), ("seven", {"reduce_range": True})):
        model = onnx.load(static(floating, tmp_path / f"{name}.onnx", **options))
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / "model.onnx", save_as_external_data=True, size_threshold=0)
        overflows = int8.processors_for(read_graph(tmp_path / name / "model.onnx")) is not None
        assert overflows == (name == "eight")


@pytest.mark.skipif(int8.multiplies_bytes() is not True, reason="this processor has no VNNI, or does not say so")
def test_a_processor_that_multiplies_bytes_gives_what_the_graph_says(tmp_path):
    """The largest bytes there are, whose neighbours add up to 64,770."""
    nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["y"])]
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, (1, 64))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, (1, 64))]
    weight = numpy_helper.from_array(np.full((64, 64), 127, np.int8), "b")
    graph = helper.make_graph(nodes, "bytes", inputs, outputs, [weight])
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    product = session.run(None, {"a": np.full((1, 64), 255, np.uint8)})[0]
    assert (product == 64 * 255 * 127).all()


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512_vnni\n", True),
        ("AMD64", "flags\t\t: fpu avx2 avx_vnni\n", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f\n", False),
        ("x86_64", None, None),
        ("aarch64", None, True),
    ],
)
def test_what_a_processor_does_is_read_off_its_flags(machine, cpuinfo, expected, monkeypatch):
    def read(_self, **_options):
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(int8.platform, "machine", lambda: machine)
    monkeypatch.setattr(int8.Path, "read_text", read)
    assert int8.multiplies_bytes.__wrapped__() is expected
