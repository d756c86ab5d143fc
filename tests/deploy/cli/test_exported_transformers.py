"""Each family of diffusion transformers the whole way: slimmed, exported, validated, an engine, a bundle, images."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call
from every_pipeline.members import inputs_of, make_member
from families.family import SAMPLING
from families.whole_transformers import aura_flow_pipeline
from PIL import Image

for module in ("onnxscript", "onnxruntime", "polygraphy"):
    pytest.importorskip(module, reason=f"{module} is an extra")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
import onnx  # noqa: E402

from exporters.validation.parity import image_psnr  # noqa: E402
from slimdiff import Budget, CalibrationSettings, PlanSettings, compress  # noqa: E402

SIZE = ["--height", 16, "--width", 16]
PROMPT = ["--prompt", "a red circle"]
GUIDED = ["--steps", 2, "--guidance", 3]
TOKENS = ["--argument", "max_sequence_length=8"]
EXACT_SIZE = ["--argument", "use_resolution_binning=false"]
FAMILIES: dict[str, tuple[Callable[[], Any], list[Any], list[Any]]] = {
    "flux": (partial(make_member, "FluxPipeline"), SIZE + TOKENS, PROMPT),
    "sd3": (partial(make_member, "StableDiffusion3Pipeline"), SIZE + TOKENS, PROMPT),
    "pixart-alpha": (partial(make_member, "PixArtAlphaPipeline"), SIZE + TOKENS + EXACT_SIZE, PROMPT),
    "pixart-sigma": (partial(make_member, "PixArtSigmaPipeline"), SIZE + TOKENS + EXACT_SIZE, PROMPT),
    "dit": (partial(make_member, "DiTPipeline"), [], ["--class", 3]),
    "hunyuan-dit": (partial(make_member, "HunyuanDiTPipeline"), SIZE + EXACT_SIZE, PROMPT),
    "auraflow": (aura_flow_pipeline, SIZE + TOKENS, PROMPT),
}
"""Family -> makes a tiny member, what its graphs are for, and what an image is made from."""


class Way:
    """A family's dense and slim model, and the slim one's graphs, in folders."""

    def __init__(self, name: str, folder: Path) -> None:
        make, self.sized, self.material = FAMILIES[name]
        self.dense, self.slim, self.onnx = (folder / part for part in ("dense", "slim", "onnx"))
        pipeline = make()
        pipeline.save_pretrained(self.dense)
        names = {"prompt", "class_labels"}
        inputs = [{k: v for k, v in one.items() if k in names} for one in inputs_of(pipeline)]
        arguments = dict(json_argument(text) for text in self.sized if "=" in str(text))
        side = self.sized[1] if "--height" in self.sized else None
        size = {"height": side, "width": side}
        sampling = SAMPLING.model_copy(update={"arguments": arguments, **size})
        calibration = CalibrationSettings(samples=2, sampling=sampling)
        planning = PlanSettings(allocation="uniform", align=4)
        made = compress(pipeline, inputs, Budget("5%"), calibration=calibration, planning=planning)
        self.plan = made.plan.model_dump()
        made.pipeline.save_pretrained(self.slim)

    @property
    def arguments(self) -> list[Any]:
        """Those of the pipeline's call: a graph says itself which size it is for."""
        return self.sized[self.sized.index("--argument") :] if "--argument" in self.sized else []

    @property
    def compared(self) -> list[Any]:
        return ["--classes", "3"] if "--class" in self.material else []

    def image(self, argv: list[Any], capsys, out: Path) -> np.ndarray:
        call(["generate", *argv, *self.material, *GUIDED, "--out", out], capsys)
        return np.asarray(Image.open(out), dtype=float)


def json_argument(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


@pytest.fixture(scope="module", params=FAMILIES)
def way(request, tmp_path_factory) -> Way:
    return Way(request.param, tmp_path_factory.mktemp(request.param))


def test_a_family_goes_the_whole_way(way, tmp_path, capsys):
    made = call(["export", way.slim, "--out", way.onnx, *way.sized], capsys)
    assert "transformer/model.onnx" in made["graphs"]
    arguments = way.arguments
    found = call(["validate", way.slim, way.onnx, "--calls", 2, "--steps", 2, *arguments], capsys)
    assert found["passed"] and {"vae_decoder", "out_sample@trajectory"} <= {c["tensor"] for c in found["checks"]}
    if importlib.util.find_spec("openvino"):
        other = ["validate", way.slim, way.onnx, "--runtime", "openvino-fp32", "--calls", 1, "--no-image", *arguments]
        assert call(other, capsys)["passed"]

    expected = way.image([way.slim, *way.sized], capsys, tmp_path / "torch.png")
    drawn = way.image([way.onnx, *way.sized], capsys, tmp_path / "onnx.png")
    assert np.abs(drawn - expected).max() <= 1
    compared = call(["compare", way.dense, way.onnx, "--images", 1, *GUIDED, *way.compared, *way.arguments], capsys)
    assert compared["noise_error"]["relative_mse"] > 0

    if importlib.util.find_spec("tensorrt_rtx"):
        engine = ["engine", way.onnx, "--out", tmp_path / "engine", "--target", "sm89", "--backend", "tensorrt-rtx"]
        report = call(engine, capsys)
        slimmed = {name for name, site in way.plan["sites"].items() if site["rank"] < site["dense_rank"]}
        assert slimmed <= {row["site"] for row in report["sites"]} and all(row["ok"] for row in report["sites"])

    bundle = tmp_path / "bundle"
    call(["bundle", way.onnx, "--target", "edge", "--out", bundle], capsys)
    edge = way.image([bundle, *way.sized], capsys, tmp_path / "edge.png")  # in bf16 where the processor has that
    assert image_psnr(expected / 255, edge / 255) > 35

    planted = tmp_path / "planted"
    shutil.copytree(way.onnx, planted)
    module = plant(planted / "transformer" / "model.onnx")
    (planted / "manifest.json").unlink()
    wrong = call(["validate", way.slim, planted, "--calls", 1, "--steps", 2, "--no-image", *arguments], capsys, code=1)
    assert wrong["divergence"]["module"] == module


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    """Those of docs/transformers.md, of a tiny Flux."""
    pytest.importorskip("tensorrt_rtx", reason="the page builds an engine")
    monkeypatch.chdir(tmp_path)
    Way("flux", tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "transformers.md").read_text(encoding="utf-8")
    block = re.search(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for line in block[1].replace("512", "16").replace("=256", "=8").splitlines()]
    assert [command[1] for command in commands] == ["export", "validate", "engine", "bundle"]
    for command in commands:
        call(command[1:], capsys)


def plant(file: Path) -> str:
    """Put a fault into one linear of a graph; the module that it is in."""
    model = onnx.load(file)
    weights = {weight.name: weight for weight in model.graph.initializer}
    node = next(
        n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and ".ff" in n.name and n.input[1] in weights
    )
    values = onnx.numpy_helper.to_array(weights[node.input[1]]).copy()
    values[0] += 1
    weights[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(values, node.input[1]))
    onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data")
    return node.name.rpartition("/")[0]
