"""A Triton model repository: its configurations hold for its files, and its pipeline makes diffusers' image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import EulerDiscreteScheduler
from families.images import xl
from pydantic import ValidationError

import deploy
from deploy.cli.app import main
from deploy.triton import TritonSettings, write_repository
from deploy.triton.server.text_to_image import Cancelled, TextToImage
from exporters.engine.check import runs_on
from exporters.engine.shapes import dims_of_inputs, engine_shapes
from exporters.graphs.export import export_unet
from exporters.graphs.pipeline import example_call, export_pipeline
from exporters.graphs.reading import read_graph
from exporters.runtimes.ort_session import inference_session
from exporters.runtimes.pipeline import load_pipeline
from exporters.settings import EngineSettings, ExportSettings
from exporters.validation.parity import image_psnr
from slimdiff.errors import InputError
from slimdiff.storage import manifest

onnx = pytest.importorskip("onnx", reason="graphs are of the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="Triton's schema is in the extra triton")

from triton_repository import Server, read_config, schema  # noqa: E402

CPU = TritonSettings(device="cpu")


@pytest.fixture(scope="module")
def sources(exported, pipeline, tmp_path_factory) -> dict[str, Path]:
    """The exported pipeline, and the same with a UNet of an open batch."""
    open_batch = shutil.copytree(exported, tmp_path_factory.mktemp("open") / "onnx")
    (open_batch / manifest.MANIFEST).unlink()
    export_unet(pipeline.unet, open_batch / "unet", example_call(pipeline), ExportSettings(dynamic_batch=True))
    return {"fixed": exported, "open": open_batch}


@pytest.fixture(scope="module")
def repositories(sources, tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, source in sources.items():
        found[name] = tmp_path_factory.mktemp("triton") / name
        files = write_repository(source, found[name], CPU)
        assert files == sorted(p for p in found[name].rglob("*") if p.is_file()) and files
    return found


@pytest.mark.parametrize("batch", ["fixed", "open"])
def test_configurations_are_in_tritons_schema_and_name_what_is_there(repositories, batch):
    models = repositories[batch] / "models"
    assert {f.name for f in models.iterdir()} == {"text_encoder", "unet", "vae_decoder", "text_to_image"}
    for folder in models.iterdir():
        config = read_config(folder)
        assert config.name == folder.name and (folder / "1" / config.default_model_filename).is_file()
        tensors = [*config.input, *config.output]
        assert all(spec.data_type and spec.dims and min(spec.dims) > 0 for spec in tensors)
        (group,) = config.instance_group
        assert group.kind == schema.ModelInstanceGroup.KIND_CPU and group.count >= 1
        batching = folder.name in ("text_encoder", "vae_decoder") or (folder.name, batch) == ("unet", "open")
        assert config.max_batch_size == (8 if batching else 0)
        assert config.HasField("dynamic_batching") == batching
        if folder.name == "text_to_image":
            assert config.backend == "python" and [spec.name for spec in config.input if not spec.optional] == [
                "prompt"
            ]
            continue
        assert config.platform == "onnxruntime_onnx"
        session = inference_session(folder / "1" / config.default_model_filename, threads=1)
        assert [i.name for i in session.get_inputs()] == [spec.name for spec in config.input]
        assert [o.name for o in session.get_outputs()] == [spec.name for spec in config.output]
        warmup = config.model_warmup[0].inputs
        assert {name: list(w.dims) for name, w in warmup.items()} == {s.name: list(s.dims) for s in config.input}


def test_settings_reach_the_configurations(sources, tmp_path):
    settings = TritonSettings(instances=2, concurrency=6, max_batch=16, queue_delay_us=250, max_steps=7)
    write_repository(sources["open"], tmp_path, settings)
    unet, pipeline = (read_config(tmp_path / "models" / name) for name in ("unet", "text_to_image"))
    assert unet.max_batch_size == 16 and unet.dynamic_batching.max_queue_delay_microseconds == 250
    assert (unet.instance_group[0].count, unet.instance_group[0].kind) == (2, schema.ModelInstanceGroup.KIND_GPU)
    assert pipeline.instance_group[0].count == 6 and pipeline.instance_group[0].kind == unet.instance_group[0].KIND_CPU
    assert pipeline.parameters["max_steps"].string_value == "7"
    with pytest.raises(ValidationError, match="engines run on a GPU"):
        TritonSettings(backend="tensorrt", device="cpu")


@pytest.mark.parametrize(
    ("batch", "options", "unet_batches"),
    [
        ("fixed", {"guidance": 4.0}, [2] * 3),
        ("fixed", {"guidance": 1.0}, [2] * 3),  # half of it is not used
        ("open", {"guidance": 4.0, "negative_prompt": "a blue star"}, [2] * 3),
        ("open", {"guidance": 1.0}, [1] * 3),
    ],
)
def test_a_prompt_becomes_diffusers_image(repositories, sources, batch, options, unet_batches):
    server = Server(repositories[batch] / "models")
    text_to_image = TextToImage(repositories[batch] / "models" / "text_to_image" / "1" / "pipeline", server)
    found = text_to_image("a large red circle", seed=3, steps=3, **options)

    reference = load_pipeline(sources["open"], threads=1)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        "a large red circle",
        negative_prompt=options.get("negative_prompt"),
        num_inference_steps=3,
        guidance_scale=options["guidance"],
        generator=torch.Generator().manual_seed(3),
        height=16,
        width=16,
        output_type="np",
    ).images[0]
    assert list(found.shape) == list(server.configs["text_to_image"].output[0].dims)
    assert found.dtype == np.uint8 and np.ptp(found) > 25
    assert image_psnr(expected, found / 255) >= 50  # rounding to bytes alone costs all above
    assert server.batches["unet"] == unet_batches and server.batches["vae_decoder"] == [1]


@pytest.mark.slow
def test_sdxl_becomes_diffusers_image(tmp_path):
    pipeline = xl()
    pipeline.scheduler = EulerDiscreteScheduler()  # the second of three steps is at 499.5
    export_pipeline(pipeline, tmp_path / "onnx", ExportSettings(dynamic_batch=True))
    write_repository(tmp_path / "onnx", tmp_path / "out", CPU)
    server = Server(models := tmp_path / "out" / "models")
    assert "text_encoder_2" in server.sessions
    serves = TextToImage(models / "text_to_image" / "1" / "pipeline", server)
    for negative_prompt in ("", "a blue star"):
        found = serves("a red circle", negative_prompt, seed=3, steps=3, guidance=4.0)
        options = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": negative_prompt or None}
        same = pipeline("a red circle", generator=torch.Generator().manual_seed(3), output_type="np", **options)
        assert image_psnr(same.images[0], found / 255) >= 50 and np.ptp(found) > 25


def test_an_engine_of_the_served_graph_has_a_timestep_per_sample(repositories):
    model = read_graph(repositories["open"] / "models" / "unet" / "1" / "model.onnx")
    shapes = engine_shapes(dims_of_inputs(model), EngineSettings(batch=2))["fixed"]
    assert shapes["timestep"] == [2] and shapes["sample"] == [2, 4, 8, 8]


@pytest.fixture(scope="module")
def text_to_image(repositories) -> TextToImage:
    models = repositories["fixed"] / "models"
    return TextToImage(models / "text_to_image" / "1" / "pipeline", Server(models), max_steps=5)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        *(({"steps": n}, f"steps must be 1 to 5, not {n}") for n in (0, 6)),
        *(({"guidance": x}, f"guidance must be 0 to 100, not {x}") for x in (float("nan"), -1.0)),
    ],
)
def test_requests_out_of_range_are_refused(text_to_image, values, told):
    with pytest.raises(ValueError, match=told):
        text_to_image(**{"prompt": "a circle", "steps": 3, **values})


def test_requests_that_do_not_say_are_served_as_the_model_was_calibrated(sources, tmp_path):
    write_repository(sources["fixed"], tmp_path, usage={"steps": 1, "guidance": 0.0})
    serves = TextToImage(tmp_path / "models/text_to_image/1/pipeline", Server(tmp_path / "models"))
    assert np.array_equal(serves("a circle"), serves("a circle", steps=1, guidance=0.0))


def test_a_cancelled_request_stops_after_the_step(text_to_image):
    before = len(text_to_image.pipeline.unet.infer.batches.get("unet", []))
    with pytest.raises(Cancelled):
        text_to_image("a circle", steps=5, is_cancelled=lambda: True)
    assert len(text_to_image.pipeline.unet.infer.batches["unet"]) == before + 1


def test_a_scheduler_of_fractions_is_refused_where_the_graph_takes_whole_timesteps(text_to_image, monkeypatch):
    monkeypatch.setattr(text_to_image.pipeline, "scheduler", EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="takes whole timesteps, not 499.5: export the model again"):
        text_to_image("a circle", steps=3)


def test_seeds_make_different_images_and_the_same_one_the_same(text_to_image):
    first, again, other = (text_to_image("a circle", steps=2, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def write_engine(folder: Path, shapes: dict[str, Any], backend: str = "tensorrt") -> None:
    """What `slimdiff engine` writes for the UNet, but for the engine, which takes TensorRT and a GPU to build."""
    fixed = shapes.get("fixed") or {name: [-1, *ends["opt"][1:]] for name, ends in shapes["profiles"][0].items()}
    dtypes = {"timestep": "int64"}
    inputs = [{"name": n, "shape": s, "dtype": dtypes.get(n, "float16")} for n, s in fixed.items()]
    parts = {
        "shapes": shapes,
        "versions": {backend: "10.13.3.9"},
        "runs_on": {"gpu": {"name": "NVIDIA L4", "capability": "sm89", "driver": "580"}},
        "precision": "fp16",
    }
    report = {"backend": backend, "version": "10.13.3.9", "parts": parts, "key": manifest.fingerprint(parts)}
    report["inputs"], report["outputs"] = inputs, [{"name": "out_sample", "shape": fixed["sample"], "dtype": "float16"}]
    (folder / "model.engine").write_bytes(b"an engine")
    (folder / "engine.json").write_text(json.dumps(report))
    manifest.write_manifest(folder, "engine", {}, runs_on(report))


SHAPES = {"sample": [2, 4, 8, 8], "timestep": [2], "encoder_hidden_states": [2, 40, 32]}


@pytest.fixture
def with_engine(sources, tmp_path):
    def make(shapes: dict[str, Any] | None = None, **options: Any) -> Path:
        folder = shutil.copytree(sources["open"], tmp_path / "source")
        write_engine(folder / "unet", shapes or {"fixed": SHAPES}, **options)
        return folder

    return make


def profile(*batches: int) -> dict[str, Any]:
    ends = zip(("min", "opt", "max"), batches, strict=True)
    sizes = {end: {name: [batch, *shape[1:]] for name, shape in SHAPES.items()} for end, batch in ends}
    return {"profiles": [{name: {end: sizes[end][name] for end in sizes} for name in SHAPES}]}


def test_an_engine_is_served_by_tensorrt_and_the_rest_as_onnx(with_engine, tmp_path):
    write_repository(with_engine(), tmp_path / "out", TritonSettings(backend="tensorrt"))
    models = tmp_path / "out" / "models"
    unet = read_config(models / "unet")
    assert (unet.platform, unet.max_batch_size, unet.HasField("dynamic_batching")) == ("tensorrt_plan", 0, False)
    assert (models / "unet" / "1" / "model.plan").read_bytes() == b"an engine"
    assert not (models / "unet" / "1" / "model.onnx").exists()
    assert {i.name: (list(i.dims), list(i.reshape.shape)) for i in unet.input} == {
        "sample": ([2, 4, 8, 8], []),
        "timestep": ([2, 1], [2]),
        "encoder_hidden_states": ([2, 40, 32], []),
    }
    assert read_config(models / "vae_decoder").platform == "onnxruntime_onnx"
    assert "TensorRT 10.13.3.9, NVIDIA L4" in (tmp_path / "out" / "compose.yaml").read_text()


def test_an_engine_with_a_profile_is_batched_as_far_as_it_goes(with_engine, tmp_path):
    write_repository(with_engine(profile(1, 2, 4)), tmp_path / "out", TritonSettings(backend="tensorrt"))
    unet = read_config(tmp_path / "out" / "models" / "unet")
    assert unet.max_batch_size == 4 and unet.HasField("dynamic_batching")
    assert [list(i.dims) for i in unet.input] == [[4, 8, 8], [1], [40, 32]]


@pytest.mark.parametrize(
    ("shapes", "options", "told"),
    [
        ({"fixed": SHAPES}, {"backend": "tensorrt-rtx"}, "Triton runs those of TensorRT alone"),
        (
            {"fixed": {**SHAPES, "timestep": []}},
            {},
            "takes timestep as a scalar.*slimdiff engine REPOSITORY/models/unet/1",
        ),
        (profile(2, 2, 4), {}, "takes no batch of 1"),
    ],
)
def test_engines_that_cannot_be_served_are_refused(with_engine, tmp_path, shapes, options, told):
    with pytest.raises(InputError, match=told):
        write_repository(with_engine(shapes, **options), tmp_path / "out", TritonSettings(backend="tensorrt"))


def test_without_an_engine_there_is_nothing_for_tensorrt(sources, tmp_path):
    with pytest.raises(InputError, match="there is no engine of the UNet"):
        write_repository(sources["fixed"], tmp_path, TritonSettings(backend="tensorrt"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "is a StableDiffusionInpaintPipeline; served are"),
        ({"scheduler": ["os", "system"]}, "asks for the scheduler .*taken is one of diffusers"),
        ({"tokenizer": "x"}, "asks for the tokenizer x"),
    ],
)
def test_an_index_that_names_something_else_is_refused(sources, tmp_path, changes, told):
    folder = shutil.copytree(sources["open"], tmp_path / "source")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    with pytest.raises(InputError, match=told):
        write_repository(folder, tmp_path / "out")


def test_a_repository_is_not_written_over_another(repositories, sources):
    with pytest.raises(InputError, match="models is there already"):
        write_repository(sources["fixed"], repositories["fixed"], CPU)


def test_open_sizes_are_refused(sources, tmp_path):
    folder = shutil.copytree(sources["open"], tmp_path / "source")
    model = onnx.load(folder / "vae_decoder" / "model.onnx", load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    (folder / "vae_decoder" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"leaves more open than the batch \(latent_sample is \[-1, 4, -1, 8\]\)"):
        write_repository(folder, tmp_path / "out")


def test_damaged_sources_are_refused(sources, tmp_path):
    with pytest.raises(InputError, match="has no model_index.json"):
        write_repository(tmp_path, tmp_path / "out")
    folder = shutil.copytree(sources["fixed"], tmp_path / "source")
    (folder / "unet" / "model.onnx.data").write_bytes(b"")
    with pytest.raises(InputError, match="is not the file that the manifest describes"):
        write_repository(folder, tmp_path / "out")
    (folder / manifest.MANIFEST).unlink()
    with pytest.raises(InputError, match="model.onnx.data has 0 bytes"):
        write_repository(folder, tmp_path / "out")
    shutil.rmtree(folder / "vae_decoder")
    shutil.copytree(sources["open"] / "unet", folder / "unet", dirs_exist_ok=True)
    with pytest.raises(InputError, match="has no vae_decoder/model.onnx"):
        write_repository(folder, tmp_path / "out")


def test_the_pipeline_in_the_repository_imports_nothing_else(repositories, tmp_path):
    folder = shutil.copytree(repositories["fixed"] / "models" / "text_to_image" / "1" / "pipeline", tmp_path / "x")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["os", "system"]}))
    with pytest.raises(ValueError, match="the scheduler is of os; taken is one of diffusers"):
        TextToImage(folder, lambda *_: {})
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "OnnxStableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="is no pipeline that is served"):
        TextToImage(folder, lambda *_: {})


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_compose_file_mounts_the_models_into_the_image_asked_for(sources, tmp_path, device):
    settings = TritonSettings(device=device, image="registry.example/tritonserver:1.2")
    write_repository(sources["fixed"], tmp_path, settings)
    service = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]["triton"]
    assert service["volumes"] == ["./models:/models:ro"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert ("deploy" in service) == (device == "gpu")
    docker = service["build"]["dockerfile_inline"].splitlines()
    assert docker[0] == "FROM registry.example/tritonserver:1.2"
    assert f"torch=={torch.__version__.partition('+')[0]}" in docker[2]
    with pytest.raises(ValidationError):
        TritonSettings(image="tritonserver\nRUN curl")


def test_a_bundle_for_a_server_has_a_repository_on_request(exported, tmp_path, capsys):
    """As docs/serve-with-triton.md says."""
    argv = ["bundle", str(exported), "--target", "server", "--triton", "--out", str(tmp_path / "server")]
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["triton"] == "triton"
    models = tmp_path / "server" / "triton" / "models"
    assert {f.name for f in models.iterdir()} == {"text_encoder", "unet", "vae_decoder", "text_to_image"}
    assert read_config(models / "unet").name == "unet"
    assert (tmp_path / "server" / "triton" / "compose.yaml").is_file()
    image = deploy.load(tmp_path / "server")("a circle", num_inference_steps=1, output_type="np").images
    assert np.isfinite(image).all()
    assert main([*argv[:2], "--target", "edge", "--triton", "--out", str(tmp_path / "edge")]) == 2
    assert "--triton is for servers" in capsys.readouterr().err
