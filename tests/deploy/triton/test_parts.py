"""A UNet in parts is served as three models, of which two are asked once for a prompt and once for a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deploy.triton import TritonSettings, write_repository
from deploy.triton.server.text_to_image import TextToImage
from exporters.engine.check import runs_on
from exporters.graphs.export import export_unet
from exporters.graphs.pipeline import example_call
from exporters.graphs.reading import inputs_of, outputs_of, read_graph
from exporters.graphs.split import split_graph
from exporters.runtimes.pipeline import load_pipeline
from exporters.settings import ExportSettings
from exporters.validation.parity import image_psnr
from slimdiff.errors import InputError
from slimdiff.storage import manifest

pytest.importorskip("onnx", reason="graphs are of the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="Triton's schema is in the extra triton")

from triton_repository import Server, read_config  # noqa: E402

PARTS = {"unet_prompt", "unet_time", "unet_step"}


@pytest.fixture(scope="module")
def sources(exported, pipeline, tmp_path_factory) -> dict[str, Path]:
    """The exported pipeline with its UNet in parts, of a fixed batch and of an open one."""
    folders = {}
    for name in ("fixed", "open"):
        folders[name] = shutil.copytree(exported, tmp_path_factory.mktemp(name) / "onnx")
        (folders[name] / manifest.MANIFEST).unlink()
        unet = folders[name] / "unet"
        if name == "open":
            export_unet(pipeline.unet, unet, example_call(pipeline), ExportSettings(dynamic_batch=True))
        split_graph(unet / "model.onnx", unet)
        for whole in unet.glob("model.onnx*"):
            whole.unlink()
    return folders


@pytest.fixture(scope="module")
def repositories(sources, tmp_path_factory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("triton") / name for name in sources}
    for name, source in sources.items():
        write_repository(source, found[name], TritonSettings(device="cpu"))
    return found


@pytest.mark.parametrize(
    ("batch", "options", "batches"),
    [
        ("fixed", {"guidance": 4.0}, [2] * 3),
        ("fixed", {"guidance": 1.0}, [2] * 3),  # half of it is not used
        ("open", {"guidance": 4.0, "negative_prompt": "a blue star"}, [2] * 3),
        ("open", {"guidance": 1.0}, [1] * 3),
    ],
)
def test_a_prompt_becomes_diffusers_image(repositories, exported, pipeline, batch, options, batches):
    models = repositories[batch] / "models"
    assert {folder.name for folder in models.iterdir()} == {"text_encoder", "vae_decoder", "text_to_image", *PARTS}
    server = Server(models)
    serves = TextToImage(models / "text_to_image" / "1" / "pipeline", server)
    found = serves("a large red circle", seed=3, steps=3, **options)
    expected = pipeline(
        "a large red circle",
        negative_prompt=options.get("negative_prompt"),
        num_inference_steps=3,
        guidance_scale=options["guidance"],
        generator=torch.Generator().manual_seed(3),
        height=16,
        width=16,
        output_type="np",
    ).images[0]
    assert image_psnr(expected, found / 255) >= 50
    asked = {name: server.batches[name] for name in sorted(PARTS)}
    assert asked == {"unet_prompt": batches[:1], "unet_step": batches, "unet_time": batches}
    again = serves("a large red circle", seed=4, steps=3, **options)
    assert len(server.batches["unet_prompt"]) == 1 and len(server.batches["unet_time"]) == 3
    other = serves("a small blue star", seed=4, steps=3, **options)
    assert len(server.batches["unet_prompt"]) == 2 and (other != again).any()


def test_engines_of_its_parts_lie_beside_their_graphs(sources, tmp_path):
    """What `slimdiff engine` writes for the step, but for the engine, which takes TensorRT and a GPU to build."""
    source = shutil.copytree(sources["fixed"], tmp_path / "onnx")
    step = source / "unet" / "step"
    (step / "model.engine").write_bytes(b"an engine")
    with pytest.raises(InputError, match="unet/step has no manifest.json"):
        write_repository(source, tmp_path / "out", TritonSettings(backend="tensorrt"))
    graph = read_graph(step / "model.onnx")
    inputs, outputs = (
        [{"name": name, "shape": list(spec.shape), "dtype": spec.dtype} for name, spec in side.items()]
        for side in (inputs_of(graph), outputs_of(graph))
    )
    parts = {
        "shapes": {"fixed": {tensor["name"]: tensor["shape"] for tensor in inputs}},
        "versions": {"tensorrt": "10.13.3.9"},
        "runs_on": {"gpu": {"name": "NVIDIA L4", "capability": "sm89", "driver": "580"}},
        "precision": "fp32",
    }
    report = {"backend": "tensorrt", "version": "10.13.3.9", "parts": parts, "key": manifest.fingerprint(parts)}
    (step / "engine.json").write_text(json.dumps({**report, "inputs": inputs, "outputs": outputs}))
    manifest.write_manifest(step, "engine", {}, runs_on(report))
    write_repository(source, tmp_path / "out", TritonSettings(backend="tensorrt"))
    served = {name: read_config(tmp_path / "out" / "models" / name) for name in PARTS}
    platforms = {"unet_prompt": "onnxruntime_onnx", "unet_time": "onnxruntime_onnx", "unet_step": "tensorrt_plan"}
    assert {name: config.platform for name, config in served.items()} == platforms
    assert {spec.name for spec in served["unet_step"].input} == {tensor["name"] for tensor in inputs}


def test_its_models_batch_where_the_whole_one_does(repositories):
    for name in PARTS:
        assert read_config(repositories["open"] / "models" / name).max_batch_size == 8
        assert read_config(repositories["fixed"] / "models" / name).max_batch_size == 0
    config = read_config(repositories["open"] / "models" / "unet_time")
    assert [(spec.name, list(spec.dims)) for spec in config.input] == [("timestep", [1])]


def test_the_folder_makes_diffusers_image_here_too(sources, pipeline):
    graphs = load_pipeline(sources["open"], threads=1)
    images = []
    for each in (pipeline, graphs):
        each.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        images.append(each("a red circle", generator=torch.Generator().manual_seed(0), **options).images[0])
    assert image_psnr(*images) >= 50


def test_a_repository_without_one_of_the_parts_is_not_written(sources, tmp_path):
    broken = shutil.copytree(sources["fixed"], tmp_path / "broken")
    shutil.rmtree(broken / "unet" / "step")
    with pytest.raises(InputError, match="has no unet/model.onnx"):
        write_repository(broken, tmp_path / "out", TritonSettings(device="cpu"))
    broken = shutil.copytree(sources["fixed"], tmp_path / "without")
    shutil.rmtree(broken / "unet" / "time")
    with pytest.raises(InputError, match="not of one export"):
        write_repository(broken, tmp_path / "out", TritonSettings(device="cpu"))
