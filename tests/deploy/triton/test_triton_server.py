"""A real Triton server loads the repository and makes images, on a CPU: that of the wheel nvidia-pytriton.

It has no ONNX Runtime backend: one in Python, by Triton's own interface for that, stands in for it below. All else is
the server's own: its checks of configurations, its batching, and the backend that the pipeline runs in. It wants
numpy 1, so it gets packages of its own: `TRITON_PACKAGES` names a folder with nvidia-pytriton, numpy<2, onnxruntime,
torch, diffusers and transformers, for this version of Python.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

from deploy.triton import TritonSettings, write_repository
from exporters.graphs.export import export_unet
from exporters.graphs.pipeline import example_call
from exporters.runtimes.pipeline import load_pipeline
from exporters.settings import ExportSettings
from exporters.validation.parity import image_psnr
from slimdiff.denoising.trajectory import sample_images
from slimdiff.settings import Sampling
from slimdiff.storage import manifest

PACKAGES = Path(os.environ.get("TRITON_PACKAGES", ""))
if not (PACKAGES / "pytriton").is_dir():
    pytest.skip("no Triton server: TRITON_PACKAGES names no folder with one", allow_module_level=True)
# Without it, tritonclient.http raises no ImportError.
pytest.importorskip("gevent", reason="Triton's HTTP client is in the extra triton")
triton = pytest.importorskip("tritonclient.http", reason="Triton's client is in the extra triton")
pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="Triton's schema is in the extra triton")
from deploy.triton.server.client import generate  # noqa: E402

SETTINGS = TritonSettings(device="cpu", concurrency=2, max_batch=4, queue_delay_us=300_000, max_steps=10)
BACKEND = """
import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = os.path.join(args["model_repository"], args["model_version"], config["default_model_filename"])
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        counts = [request.inputs()[0].as_numpy().shape[0] for request in requests]
        names = [tensor.name() for tensor in requests[0].inputs()]
        given = {n: [pb_utils.get_input_tensor_by_name(r, n).as_numpy() for r in requests] for n in names}
        found = self.session.run(None, {n: np.concatenate(arrays) for n, arrays in given.items()})
        outputs = [output.name for output in self.session.get_outputs()]
        parts = [np.split(array, np.cumsum(counts)[:-1]) for array in found]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(n, part[i]) for n, part in zip(outputs, parts)])
            for i in range(len(requests))
        ]
"""


@pytest.fixture(scope="module")
def source(exported, pipeline, tmp_path_factory) -> Path:
    """The exported pipeline with a UNet of an open batch."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("source") / "onnx")
    (folder / manifest.MANIFEST).unlink()
    export_unet(pipeline.unet, folder / "unet", example_call(pipeline), ExportSettings(dynamic_batch=True))
    return folder


@pytest.fixture(scope="module")
def url(source, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    write_repository(source, folder / "repository", SETTINGS)
    installed = PACKAGES.absolute() / "pytriton" / "tritonserver"
    stub = installed / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    backends = shutil.copytree(installed / "backends", folder / "backends")
    (backends / "python" / stub.name).unlink(missing_ok=True)
    shutil.copy(stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_text(BACKEND)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [installed / "bin" / "tritonserver", f"--model-repository={folder / 'repository' / 'models'}"]
    command += [f"--backend-directory={backends}", "--disable-auto-complete-config", "--http-address=127.0.0.1"]
    command += [f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
    command += ["--backend-config=python,stub-timeout-seconds=400"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(installed.parent.parent / "nvidia_pytriton.libs")}
    log = folder / "log.txt"
    with log.open("wb") as out:  # its Python takes no PYTHONPATH, but looks into the folder that it is started in
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=PACKAGES)
    try:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            try:
                with urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_the_server_makes_diffusers_image(url, source, tmp_path):
    client = tmp_path / "client.py"
    shutil.copy(Path(generate.__code__.co_filename), client)
    out = tmp_path / "out.png"
    argv = ["--prompt", "a large red circle", "--seed", "3", "--steps", "3", "--guidance", "4", "--out", out]
    subprocess.run([sys.executable, client, *argv, "--url", url], check=True)
    sampling = Sampling(steps=3, guidance=4.0, batch=1, seed=3, height=16, width=16)
    expected = sample_images(load_pipeline(source, threads=1), ["a large red circle"], sampling)[0]
    assert image_psnr(expected, Image.open(out)) >= 60


def test_requests_share_calls_of_the_unet(url):
    alone = generate(url, prompt="a small blue star", seed=1, steps=4)
    with triton.InferenceServerClient(url) as client:
        before = client.get_inference_statistics("unet")["model_stats"][0]
        with ThreadPoolExecutor(2) as threads:
            steps = (4, 6)  # different ones, so that the timesteps in a batch differ
            images = list(threads.map(lambda n: generate(url, prompt="a small blue star", seed=1, steps=n), steps))
        after = client.get_inference_statistics("unet")["model_stats"][0]
    samples, calls = (int(after[k]) - int(before[k]) for k in ("inference_count", "execution_count"))
    assert samples == 2 * sum(steps) and calls < sum(steps)
    assert image_psnr(alone / 255, images[0] / 255) >= 50


def test_bad_requests_get_a_line(url):
    for values, told in (({"steps": 11}, "steps must be 1 to 10, not 11"), ({"guidance": -1.0}, "0 to 100")):
        with pytest.raises(Exception, match=told) as error:
            generate(url, prompt="a circle", **values)
        assert "Traceback" not in str(error.value)


def test_the_server_took_the_configurations_as_they_are(url):
    with triton.InferenceServerClient(url) as client:
        unet, pipeline = (client.get_model_config(name) for name in ("unet", "text_to_image"))
    assert unet["max_batch_size"] == 4 and unet["dynamic_batching"]["max_queue_delay_microseconds"] == 300_000
    assert [int(size) for size in pipeline["output"][0]["dims"]] == [16, 16, 3]
