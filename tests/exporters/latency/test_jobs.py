"""Whether a denoiser in memory is timed by fresh processes as it would run."""

from __future__ import annotations

import json

import pytest
import torch

from exporters.graphs.export import unet_inputs
from exporters.latency.decision import Gate
from exporters.latency.measure import bench
from exporters.latency.pair import Job, write_job
from exporters.machine import machine_name
from exporters.registry import runtime_of
from exporters.runtimes.torch_model import TorchModel, save_model
from exporters.settings import BenchSettings
from slimdiff.denoising.trajectory import predict
from slimdiff.errors import InputError
from slimdiff.slimming.skeleton import skeleton

QUICK = BenchSettings(processes=2, rounds=3, warmup=1)


@pytest.fixture(scope="module")
def slim(dense):
    from slimdiff.groups import find_sites

    return skeleton(dense, {site.path: site.dense_rank // 2 for site in find_sites(dense)[0]}).eval()


def test_a_saved_denoiser_computes_the_same(slim, calls, tmp_path):
    save_model(slim, calls[0], tmp_path / "slim")
    opened = TorchModel(tmp_path / "slim", 1)
    assert torch.equal(opened.run(), predict(slim, calls[0]))
    assert opened.shapes == {name: list(tensor.shape) for name, tensor in unet_inputs(calls[0]).items()}
    half = TorchModel(tmp_path / "slim", 1, dtype="bfloat16")
    assert half.runtime == f"{opened.runtime}, bfloat16"
    assert not torch.equal(half.run(), opened.run()) and torch.allclose(half.run().float(), opened.run(), atol=0.1)


@pytest.mark.parametrize("runtime", [pytest.param("torch", marks=pytest.mark.slow), "onnxruntime"])
def test_the_result_is_what_the_contract_says(dense, slim, calls, tmp_path, runtime):
    if runtime != "torch":
        pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    models = {"dense": dense, "slim": slim}
    jobs = [write_job(name, model, calls[0], runtime, tmp_path / name) for name, model in models.items()]
    result = bench(*jobs, QUICK, gate=Gate.parse("speedup>=0.0001"))
    assert {"verdict", "speedup", "baseline", "candidate", "runtime", "machine"} <= set(result)
    assert set(result["speedup"]) == {"median", "low", "high"}
    assert result["gate"] == "speedup>=0.0001" and result["machine"] == machine_name()
    assert result["baseline"]["name"] == "dense" and result["runtime"].startswith(runtime_of(runtime).title)
    for side in ("baseline", "candidate"):
        assert 0 < result[side]["median_ms"] <= result[side]["p90_ms"]
    json.dumps(result, allow_nan=False)


def test_open_dims_have_the_sizes_that_are_asked_for(exported):
    path = str(exported["dense-open"])
    shapes = {"sample": [3, 4, 8, 8], "encoder_hidden_states": [3, 7, 32]}
    same = Job("open", path, "onnxruntime", shapes)
    assert bench(same, same, QUICK)["process_pairs"] == 2
    with pytest.raises(InputError, match=r"different shapes, .*3, 4, 8, 8.* and .*2, 4, 8, 8"):
        bench(same, Job("open", path, "onnxruntime"), QUICK)


def test_an_engine_is_not_written_for_a_job(dense, calls, tmp_path):
    with pytest.raises(InputError, match="no runtime 'tensorrt' for models and graphs"):
        write_job("dense", dense, calls[0], "tensorrt", tmp_path / "dense")
