"""Whether a new runtime is a session file and a row: one is added from outside, and taken wherever one is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from exporters import registry
from exporters.latency.measure import bench
from exporters.latency.pair import Job
from exporters.latency.table import measure_latency
from exporters.runtimes.opening import open_session, version_of
from exporters.runtimes.pipeline import load_pipeline
from exporters.runtimes.unet import UNet
from exporters.settings import BenchSettings, TableSettings
from slimdiff.denoising.trajectory import predict
from slimdiff.errors import InputError, MissingPackageError
from slimdiff.settings import PlanSettings

pytest.importorskip("onnx", reason="graphs need the extra onnx")


@pytest.fixture
def toy() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)  # as the working folder of whoever has such a file
        from toy_runtime import TOY

        patch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
        registry.register(TOY)
        yield TOY.name


def test_it_computes_what_torch_does(toy, exported, dense, calls):
    unet = UNet.open(exported["dense"], toy)
    assert unet.session.runtime.startswith("Toy 1.") and version_of(toy)[0] == "1"
    expected = predict(dense, calls[0])
    assert torch.allclose(unet.predict(calls[0]), expected, atol=1e-4 * float(expected.abs().max()))


def test_a_whole_pipeline_runs_in_it(toy, onnx_folder):
    made = load_pipeline(onnx_folder, toy)
    image = made("a barn", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (1, 16, 16, 3) and made.unet.session.runtime.startswith("Toy ")


def test_processes_that_are_timed_take_it(toy, exported):
    jobs = [Job(name, str(exported["dense"]), name) for name in ("onnxruntime", toy)]
    found = bench(*jobs, BenchSettings(processes=2, rounds=3, warmup=1))
    assert found["runtimes"] == {"baseline": "onnxruntime", "candidate": toy} and " against Toy 1." in found["runtime"]
    assert found["speedup"]["median"] < 0.9  # node by node in Python


def test_settings_and_recipes_take_its_name(toy):
    from deploy.recipe.matrix import MatrixStage
    from deploy.recipe.recipe import Recipe

    assert TableSettings(runtime=toy).runtime == toy
    recipe = Recipe.model_validate({"model": "demo", "budget": {"speedup": 1.2, "runtime": toy}})
    assert recipe.budget.runtime == toy
    assert MatrixStage(targets=(toy,), shapes=({"height": 8, "width": 8},)).targets == (toy,)


@pytest.mark.slow
def test_layers_are_measured_in_it(toy, dense, calls, tmp_path):
    planning = PlanSettings(groups=("feed_forward",))
    settings = TableSettings(runtime=toy, ranks=2, rounds=3)
    table = measure_latency(dense, calls[0], planning, settings, cache=tmp_path)
    assert str(table.made_from["runtime"]).startswith(f"{toy} ") and table.dense > 0


def test_the_doctor_tells_of_it(toy, capsys):
    import json

    from deploy.cli.app import main

    assert main(["doctor", "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out)["runtimes"] if row["name"] == toy]
    assert row["installed"] and row["version"]


def test_without_its_row_there_is_no_such_runtime(exported):
    assert "toy" not in registry.names()
    with pytest.raises(InputError, match="no runtime 'toy' for graphs and engines; there is onnxruntime, "):
        open_session(exported["dense"], "toy")
    with pytest.raises(ValidationError, match="Input should be 'torch', 'onnxruntime', .* or 'openvino-bf16'"):
        TableSettings(runtime="toy")


def test_a_name_is_taken_once_and_what_is_missing_is_named(toy, exported):
    from toy_runtime import TOY

    with pytest.raises(InputError, match="there is a runtime 'toy' already"):
        registry.register(TOY)
    missing = registry.Runtime("other", "graph", "no_such_module", TOY.opens, "Other", extra="some")
    with pytest.raises(MissingPackageError, match=r"slimdiff\[some\]"):
        open_session(exported["dense"], missing)


def test_rows_are_read_without_loading_a_runtime():
    import subprocess
    import sys

    script = (
        "import sys, exporters.settings; from exporters.registry import names; "
        "assert names()[0] == 'torch' and 'openvino' in names('graph'); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'onnxruntime', 'openvino', 'numpy')))"
    )
    path = str(Path(registry.__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], cwd=path, check=True, timeout=120)
