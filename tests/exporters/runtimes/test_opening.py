"""Opening a graph or an engine: what can go wrong, each in one line, and never another runtime than the one named."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
import torch

from exporters.engine.gpu import gpu_here
from exporters.graphs.reading import read_graph, weight_files
from exporters.registry import names
from exporters.runtimes.module import answer
from exporters.runtimes.opening import open_session
from exporters.runtimes.unet import UNet
from slimdiff.errors import InputError, MissingPackageError

HERE = ["onnxruntime", "openvino-fp32"]


@pytest.fixture
def copied(exported, tmp_path):
    """A graph's folder that a test may break."""
    return shutil.copytree(exported["dense"].parent, tmp_path / "graph")


def available(module: str) -> None:
    pytest.importorskip(module.partition("-")[0], reason=f"{module} is an extra")


@pytest.mark.parametrize("runtime", HERE)
def test_a_session_says_what_it_is(exported, runtime):
    available(runtime)
    session = open_session(exported["dense-open"], runtime)
    assert session.inputs["sample"] == ("batch", 4, 8, 8) and session.inputs["timestep"] == ()
    assert list(session.outputs) == ["out_sample"] and session.precision == "fp32"
    assert session.dtypes["timestep"] == "int64" and session.dtypes["out_sample"] == "float32"
    assert "CPU" in session.runtime and any(c.isdigit() for c in session.runtime)


def test_openvino_says_in_which_precision_it_computes(exported, calls):
    """bf16 shows in the values, and where the CPU has none, it is not said to be there."""
    openvino = pytest.importorskip("openvino", reason="openvino is an extra")
    single, own = (UNet.open(exported["dense"], r, threads=1) for r in ("openvino-fp32", "openvino"))
    distance = (own.predict(calls[0]) - single.predict(calls[0])).norm() / single.predict(calls[0]).norm()
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert own.session.precision == "fp32" and distance < 1e-5
        with pytest.raises(MissingPackageError, match="does not compute in bf16"):
            open_session(exported["dense"], "openvino-bf16")
    else:
        assert own.session.precision == "bf16" and 1e-4 < distance < 0.1
        assert open_session(exported["dense"], "openvino-bf16").precision == "bf16"


def test_openvino_holds_no_more_than_the_last_shapes(exported, tiny):
    available("openvino")
    unet = UNet.open(exported["dense-open"], "openvino-fp32", threads=1)
    first = unet.predict(tiny.calls(1)[0])
    for batch in (2, 3, 4):
        unet.predict(tiny.calls(batch)[0])
    assert len(unet.session._compiled) == 2
    assert torch.equal(unet.predict(tiny.calls(1)[0]), first)


@pytest.mark.parametrize("runtime", HERE)
def test_a_shape_that_it_was_not_made_for(exported, runtime, calls):
    available(runtime)
    session = open_session(exported["dense"], runtime)
    with pytest.raises(InputError, match=r"takes sample \(2, 4, 8, 8\).*slimdiff export --height"):
        UNet(session, {}).predict(type(calls[0])(0, 1, calls[0].arguments | {"sample": torch.zeros(2, 4, 16, 16)}))
    with pytest.raises(InputError, match="takes sample, timestep, encoder_hidden_states; given were sample"):
        answer(session, {"sample": torch.zeros(2, 4, 8, 8)})


@pytest.mark.parametrize("runtime", HERE)
def test_weights_that_are_not_there_or_not_whole(copied, runtime):
    available(runtime)
    data = copied / "model.onnx.data"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model.onnx.data has \d+ bytes, and model.onnx takes \d+ from it"):
        open_session(copied, runtime)
    data.unlink()
    with pytest.raises(InputError, match="keeps its weights in model.onnx.data, which is not beside it"):
        open_session(copied, runtime)


def test_weights_inside_the_graph_are_no_fault(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnx.save(onnx.load(str(exported["dense"])), str(tmp_path / "model.onnx"))
    assert weight_files(tmp_path / "model.onnx", read_graph(tmp_path / "model.onnx")) == []


@pytest.mark.parametrize("runtime", HERE)
def test_what_is_no_graph(copied, tmp_path, runtime):
    available(runtime)
    onnx = pytest.importorskip("onnx")
    with pytest.raises(InputError, match="there is no ONNX file"):
        open_session(tmp_path, runtime)
    (copied / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is no ONNX model"):
        open_session(copied, runtime)
    broken = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["nowhere"], ["y"])], "g", [], [])
    onnx.save(onnx.helper.make_model(broken), str(copied / "model.onnx"))
    with pytest.raises(InputError, match=r"does not load .*model.onnx: \S") as told:
        open_session(copied, runtime)
    assert "\n" not in str(told.value)


def test_a_unet_without_its_config(copied):
    available("onnxruntime")
    (copied / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="is not a model's config"):
        UNet.open(copied)
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match="has its config.json beside it"):
        UNet.open(copied)


def test_it_never_runs_on_another_provider(exported):
    ort = pytest.importorskip("onnxruntime")
    for runtime, provider in (("cuda", "CUDA"), ("tensorrt", "Tensorrt")):
        if f"{provider}ExecutionProvider" not in ort.get_available_providers():
            with pytest.raises(MissingPackageError, match=rf"no {provider}Exec.*slimdiff\[gpu\]"):
                open_session(exported["dense"], f"onnxruntime-{runtime}")


@pytest.mark.parametrize("runtime", ["tpu", "torch", ""])
def test_other_runtimes_are_refused_with_those_that_there_are(exported, runtime):
    with pytest.raises(InputError, match="onnxruntime, onnxruntime-cuda, .*openvino.*tensorrt-rtx"):
        open_session(exported["dense"], runtime)


@pytest.mark.parametrize("runtime", names("graph"))
def test_a_missing_package_is_named_with_its_extra(exported, monkeypatch, runtime):
    module = runtime.partition("-")[0]
    extra = "gpu" if runtime.startswith("onnxruntime-") else {"onnxruntime": "onnx"}.get(module, module)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"slimdiff\[{extra}\]"):
        open_session(exported["dense"], runtime)


@pytest.fixture(scope="module")
def built(exported, tmp_path_factory):
    """An engine for sm89, built by TensorRT-RTX."""
    for module in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: engines need the extra tensorrt-rtx")
    from exporters.engine.build import build_engine
    from exporters.settings import EngineSettings

    folder = tmp_path_factory.mktemp("engine")
    build_engine(exported["dense-fp16"], folder, EngineSettings(backend="tensorrt-rtx", targets=["sm89"]))
    return folder


@pytest.fixture
def engine_folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "engine")


def test_an_engine_is_checked_before_it_is_opened(engine_folder):
    """Up to where the GPU is needed; `test_engine_check.py` has the rest."""
    with pytest.raises(InputError, match="is an engine for tensorrt-rtx, which tensorrt does not run"):
        open_session(engine_folder, "tensorrt")
    if gpu_here() is not None:
        pytest.skip("there is a GPU here, which the engine may be for")
    with pytest.raises(MissingPackageError, match="runs on sm89, and there is no GPU here"):
        open_session(engine_folder, "tensorrt-rtx")


def test_a_changed_engine_is_not_opened(engine_folder):
    (engine_folder / "model.engine").write_bytes(b"something else")
    with pytest.raises(InputError, match="model.engine is not the file that the manifest describes"):
        open_session(engine_folder, "tensorrt-rtx")


def test_what_is_no_engine(tmp_path):
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(InputError, match="has no manifest.json"):
        open_session(tmp_path, "tensorrt")
