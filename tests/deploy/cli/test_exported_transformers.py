"""Each family of diffusion transformers the whole way: slimmed, exported, validated, an engine, a bundle, images."""

from __future__ import annotations

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
import torch
from command_line import call, refused
from every_pipeline.members import inputs_of, make_member
from families.family import SAMPLING
from families.transformers import dit
from families.whole_transformers import aura_flow_pipeline, changed_member, chroma_pipeline, sana_pipeline
from PIL import Image

for module in ("onnxscript", "onnxruntime", "polygraphy"):
    pytest.importorskip(module, reason=f"{module} is an extra")

pytestmark = pytest.mark.timeout(1800)
import onnx  # noqa: E402

from deploy.cli.app import main  # noqa: E402
from exporters.graphs.pipeline import example_call  # noqa: E402
from exporters.layout import read_config  # noqa: E402
from exporters.runtimes.opening import open_session  # noqa: E402
from exporters.runtimes.pipeline import load_pipeline  # noqa: E402
from exporters.validation.parity import image_psnr  # noqa: E402
from slimdiff import Budget, CalibrationSettings, PlanSettings, compress  # noqa: E402
from slimdiff.denoising.trajectory import predict  # noqa: E402
from slimdiff.loading.pipelines import load_pipeline as load_in_torch  # noqa: E402

LARGE = ["--height", 64, "--width", 64]
SIZE = ["--height", 16, "--width", 16]
PROMPT = ["--prompt", "a red circle"]
GUIDED = ["--steps", 2, "--guidance", 3]
TOKENS = ["--argument", "max_sequence_length=8"]
EXACT_SIZE = ["--argument", "use_resolution_binning=false"]
SECOND = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
FAMILIES: dict[str, tuple[Callable[[], Any], list[Any], list[Any]]] = {
    "flux": (partial(make_member, "FluxPipeline"), SIZE + TOKENS, PROMPT),
    "flux-dev": (partial(changed_member, "FluxPipeline", guidance_embeds=True), SIZE + TOKENS, PROMPT),
    "chroma": (chroma_pipeline, SIZE + TOKENS, PROMPT),
    "sd3": (partial(make_member, "StableDiffusion3Pipeline"), SIZE + TOKENS, PROMPT),
    "sd3.5": (partial(changed_member, "StableDiffusion3Pipeline", **SECOND), SIZE + TOKENS, PROMPT),
    "pixart-alpha": (partial(make_member, "PixArtAlphaPipeline"), SIZE + TOKENS + EXACT_SIZE, PROMPT),
    "pixart-sigma": (partial(make_member, "PixArtSigmaPipeline"), SIZE + TOKENS + EXACT_SIZE, PROMPT),
    "dit": (partial(make_member, "DiTPipeline"), [], ["--class", 3]),
    "hunyuan-dit": (partial(make_member, "HunyuanDiTPipeline"), SIZE + EXACT_SIZE, PROMPT),
    "sana": (sana_pipeline, LARGE + TOKENS + EXACT_SIZE, PROMPT),
    "auraflow": (aura_flow_pipeline, SIZE + TOKENS, PROMPT),
}
"""Family -> makes a tiny member, what its graphs are for, and what an image is made from."""
QUICK = ("flux",)
"""Whose tests are not slow, but for the longest."""


class Way:
    """A family's dense and slim model, and the slim one's graphs, in folders."""

    def __init__(self, name: str, folder: Path) -> None:
        make, self.sized, self.material = FAMILIES[name]
        self.dense, self.slim, self.onnx = (folder / part for part in ("dense", "slim", "onnx"))
        pipeline = make()
        pipeline.save_pretrained(self.dense)
        names = {"prompt", "class_labels"}
        inputs = [{k: v for k, v in one.items() if k in names} for one in inputs_of(pipeline)]
        calibration = CalibrationSettings(samples=2, sampling=SAMPLING.model_copy(update=self.sampling))
        planning = PlanSettings(allocation="uniform", align=4)
        compression = compress(pipeline, inputs, Budget("5%"), calibration=calibration, planning=planning)
        self.plan = compression.plan.model_dump()
        compression.pipeline.save_pretrained(self.slim)
        self.report: dict[str, Any] = {}

    @property
    def sampling(self) -> dict[str, Any]:
        """Size and arguments of the pipeline's call."""
        arguments = dict(json_argument(text) for text in self.sized if "=" in str(text))
        side = self.sized[1] if "--height" in self.sized else None
        return {"height": side, "width": side, "arguments": arguments}

    @property
    def arguments(self) -> list[Any]:
        """Those of the pipeline's call: a graph says itself which size it is for."""
        return self.sized[self.sized.index("--argument") :] if "--argument" in self.sized else []

    @property
    def open_size(self) -> bool:
        return self.dense.parent.name.startswith("flux")

    @property
    def dynamic(self) -> str:
        return "batch,size" if self.open_size else "batch"

    @property
    def compared(self) -> list[Any]:
        return ["--classes", "3"] if "--class" in self.material else []

    def export(self, capsys) -> dict[str, Any]:
        """What the command reports; it is run when this is first asked for."""
        self.report = self.report or call(["export", self.slim, "--out", self.onnx, *self.sized], capsys)
        return self.report

    def validate(self, candidate: Path, capsys, *more: Any, code: int = 0) -> dict[str, Any]:
        return call(["validate", self.slim, candidate, "--steps", 2, *more, *self.arguments], capsys, code=code)

    def image(self, source: Path, capsys, out: Path) -> np.ndarray:
        """Of the size that the graphs are for."""
        sized = self.arguments if source == self.onnx else self.sized
        call(["generate", source, *sized, *self.material, *GUIDED, "--out", out], capsys)
        return np.asarray(Image.open(out), dtype=float)


def json_argument(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def way(request, tmp_path_factory) -> Way:
    return Way(request.param, tmp_path_factory.mktemp(request.param))


def test_a_slim_transformer_is_exported_and_makes_the_same_image(way, tmp_path, capsys):
    assert "transformer/model.onnx" in way.export(capsys)["graphs"]
    report = way.validate(way.onnx, capsys, "--calls", 2)
    assert report["passed"] and {"vae_decoder", "out_sample@trajectory"} <= {c["tensor"] for c in report["checks"]}
    expected = way.image(way.slim, capsys, tmp_path / "torch.png")
    assert np.abs(way.image(way.onnx, capsys, tmp_path / "onnx.png") - expected).max() <= 1


def test_its_folder_in_a_pipeline_becomes_a_graph(way, tmp_path, capsys):
    report = call(["export", way.slim / "transformer", "--out", tmp_path / "alone", *way.sized], capsys)
    assert report["graphs"] == ["model.onnx"]
    assert way.validate(tmp_path / "alone", capsys, "--calls", 1, "--no-image")["passed"]


def test_its_folder_alone_is_refused(tmp_path, capsys):
    dit().transformer.save_pretrained(tmp_path / "alone")
    for more in ([], ["--height", 64]):
        line = refused(["export", tmp_path / "alone", "--out", tmp_path / "onnx", *more], capsys)
        assert "a DiTTransformer2DModel alone does not say what it is called with: name its pipeline" in line


def test_it_is_compared_with_the_dense_model(way, capsys):
    way.export(capsys)
    report = call(["compare", way.dense, way.onnx, "--images", 1, *GUIDED, *way.compared, *way.arguments], capsys)
    assert report["noise_error"]["relative_mse"] > 0


def test_it_runs_in_openvino(way, capsys):
    pytest.importorskip("openvino", reason="openvino is an extra")
    way.export(capsys)
    assert way.validate(way.onnx, capsys, "--runtime", "openvino-fp32", "--calls", 1, "--no-image")["passed"]


@pytest.mark.slow
def test_in_half_precision_its_language_models_stay_in_fp32(way, tmp_path, capsys):
    argv = ["export", way.slim, "--out", tmp_path / "half", *way.sized, "--precision", "fp16"]
    assert main([str(flag) for flag in argv]) == 0
    said = capsys.readouterr().err
    for folder in (tmp_path / "half").glob("text_encoder*"):
        kind, graph = read_config(folder)["architectures"][0], open_session(folder)
        assert (graph.precision == "fp32") != kind.startswith("CLIP") and (graph.precision == "fp32") == (kind in said)
    assert way.validate(tmp_path / "half", capsys, "--calls", 1)["passed"]


def test_it_becomes_an_engine_with_the_plans_dims(way, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="engines need the extra tensorrt-rtx")
    way.export(capsys)
    engine = ["engine", way.onnx, "--out", tmp_path / "engine", "--target", "sm89", "--backend", "tensorrt-rtx"]
    report = call(engine, capsys)
    slimmed = {name for name, site in way.plan["sites"].items() if site["rank"] < site["dense_rank"]}
    assert slimmed <= {row["site"] for row in report["sites"]} and all(row["ok"] for row in report["sites"])


def test_it_is_bundled_for_an_edge(way, tmp_path, capsys):
    way.export(capsys)
    call(["bundle", way.onnx, "--target", "edge", "--out", tmp_path / "bundle"], capsys)
    expected = way.image(way.slim, capsys, tmp_path / "torch.png")
    edge = way.image(tmp_path / "bundle", capsys, tmp_path / "edge.png")  # in bf16 where the processor has that
    assert image_psnr(expected / 255, edge / 255) > 35


def test_a_fault_in_its_graph_is_found(way, tmp_path, capsys):
    way.export(capsys)
    planted = tmp_path / "planted"
    shutil.copytree(way.onnx, planted)
    module = plant(planted / "transformer" / "model.onnx")
    (planted / "manifest.json").unlink()
    report = way.validate(planted, capsys, "--calls", 1, "--no-image", code=1)
    assert report["divergence"]["module"] == module


@pytest.mark.slow
def test_it_answers_as_torch_does_in_open_dims(way, tmp_path, capsys):
    """In batches and, where its positions are inputs, sizes that it was not traced at."""
    size = {"height": 24, "width": 32} if way.open_size else {name: way.sampling[name] for name in ("height", "width")}
    call(["export", way.slim, "--out", tmp_path, *way.sized, "--dynamic", way.dynamic], capsys)
    slim, graphs = load_in_torch(way.slim), load_pipeline(tmp_path)
    for batch in (1, 3):
        example = example_call(slim, batch=batch, **size, arguments=way.sampling["arguments"])
        expected = predict(slim.transformer, example)
        assert len(expected) == batch
        torch.testing.assert_close(graphs.transformer.predict(example), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_sizes_are_not_left_open_where_positions_are_constants(way, tmp_path, capsys):
    argv = ["export", way.slim, "--out", tmp_path / "onnx", *way.sized, "--dynamic", "size"]
    if way.open_size:
        pytest.skip("its positions are inputs")
    assert "--dynamic size: the graph of a Slim" in refused(argv, capsys)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
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
    """Put a fault into one linear, or convolution, of a graph; the module that it is in."""
    model = onnx.load(file)
    weights = {weight.name: weight for weight in model.graph.initializer}
    node = next(
        n
        for n in model.graph.node
        if n.op_type in ("MatMul", "Gemm", "Conv") and ".ff" in n.name and n.input[1] in weights
    )
    values = onnx.numpy_helper.to_array(weights[node.input[1]]).copy()
    values[0] += 1
    weights[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(values, node.input[1]))
    onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data")
    return node.name.rpartition("/")[0]
