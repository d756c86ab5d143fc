"""`--runtime` on the commands: what runs where, and what is said when it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused
from PIL import Image

from deploy.cli.app import main
from exporters.validation.parity import image_psnr

for module in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(module, reason=f"{module} is an extra")


@pytest.fixture(scope="module")
def expected(workspace: Path) -> Image.Image:
    out = workspace / "torch.png"
    assert (
        main(["generate", str(workspace / "tiny"), "--prompt", "a red circle", "--out", str(out), "--steps", "3"]) == 0
    )
    return Image.open(out)


@pytest.mark.parametrize(
    ("runtime", "rest", "psnr_db"),
    [(None, None, 60), ("openvino-fp32", None, 60), ("openvino", None, 40), ("openvino-fp32", "onnx", 60)],
)
def test_generate_makes_torchs_image(exported, workspace, expected, tmp_path, capsys, runtime, rest, psnr_db):
    artifact = exported / "unet" if rest else exported
    argv = ["generate", artifact, "--prompt", "a red circle", "--out", tmp_path / "x.png", "--steps", "3"]
    argv += ["--runtime", runtime] * (runtime is not None) + ["--pipeline", workspace / "onnx"] * (rest is not None)
    value = call(argv, capsys)
    assert value["runtime"] == (runtime or "onnxruntime") and value["kind"] == "onnx"
    assert image_psnr(expected, Image.open(tmp_path / "x.png")) >= psnr_db


def test_validate_judges_openvino_by_the_precision_it_computes_in(exported, workspace, capsys):
    argv = ["validate", workspace / "tiny", exported, "--steps", "2", "--calls", "1"]
    value = call([*argv, "--runtime", "openvino-fp32"], capsys)
    assert value["passed"] and value["precision"] == "fp32"
    import openvino

    own = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    if own == "bf16":
        assert main([*map(str, argv), "--runtime", "openvino", "--json"]) in (0, 1)
        assert json.loads(capsys.readouterr().out)["precision"] == "bf16"
        assert not call([*argv, "--runtime", "openvino", "--precision", "fp32"], capsys, 1)["passed"]


@pytest.mark.slow
def test_bench_times_two_runtimes_against_each_other(exported, workspace, capsys):
    quick = ["--rounds", "3", "--warmup", "1", "--processes", "2"]
    argv = ["bench", exported, exported, *quick]
    value = call([*argv, "--base-runtime", "onnxruntime", "--runtime", "openvino"], capsys)
    assert value["runtime"].startswith("ONNX Runtime ") and " against OpenVINO " in value["runtime"]
    argv = ["bench", workspace / "tiny", exported, *quick, "--base-runtime", "torch"]
    value = call([*argv, "--runtime", "openvino-fp32"], capsys)
    assert (
        value["runtime"].startswith("torch 2")
        and " against OpenVINO " in value["runtime"]
        and value["speedup"]["median"] > 0
    )


@pytest.mark.parametrize(
    ("command", "runtime", "code", "told"),
    [
        ("generate onnx", "torch", 2, "is ONNX, which torch does not run: name the model"),
        ("generate onnx", "tensorrt", 2, "build an engine of it"),
        ("generate tiny", "openvino", 2, "export it first"),
        ("bench onnx onnx", "torch", 2, "is ONNX, which torch does not run"),
        ("bench tiny tiny", "tensorrt", 2, "export it first"),
        ("generate engine-sm89", "openvino", 2, "leave out --runtime for tensorrt-rtx"),
        ("generate engine-sm89", "tensorrt", 2, "leave out --runtime for tensorrt-rtx"),
        ("generate engine-sm89 --pipeline onnx", None, 3, "runs on sm89, and there is no GPU here"),
        ("generate onnx", "onnxruntime-cuda", 3, "has no CUDAExecutionProvider"),
        ("bench onnx onnx", "onnxruntime-tensorrt", 3, "has no TensorrtExecutionProvider"),
    ],
)
def test_what_does_not_run_is_told_in_one_line(
    request, exported, workspace, tmp_path, monkeypatch, capsys, command, runtime, code, told
):
    import onnxruntime

    if "engine" in command:
        request.getfixturevalue("engine")
        capsys.readouterr()
    if code == 3 and (torch.cuda.is_available() or "CUDAExecutionProvider" in onnxruntime.get_available_providers()):
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(workspace)
    argv: list[Any] = [*command.split(), *(["--runtime", runtime] if runtime else [])]
    if command.startswith("generate"):
        argv += ["--prompt", "a circle", "--out", tmp_path / "x.png"]
    assert told in refused(argv, capsys, code)
    assert not (tmp_path / "x.png").exists()


def test_an_engine_has_what_a_pipeline_reads_of_its_unet(engine, exported):
    assert (engine / "config.json").read_text() == (exported / "unet" / "config.json").read_text()


def test_doctor_tells_what_openvino_computes_in(capsys):
    found = {r["name"]: r for r in call(["doctor"], capsys)["runtimes"]}["openvino"]
    assert "CPU" in found["devices"] and found["cpu_default"] in ("f32", "bf16", "f16")
    assert main(["doctor"]) == 0
    assert f"CPU, computes in {found['cpu_default']} by default" in capsys.readouterr().out
