"""Pipelines that ControlNets and T2I-Adapters steer, exported whole: torch's images, in torch's classes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, MultiAdapter, StableDiffusionAdapterPipeline, T2IAdapter
from safetensors.torch import load_file, save_file

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

from families.steering import make_adapter, make_controlnet, picture, save_ip_adapter  # noqa: E402

from exporters.engine.check import choose_profile  # noqa: E402
from exporters.engine.pipeline import request_pipeline  # noqa: E402
from exporters.graphs.pipeline import example_call, export_pipeline  # noqa: E402
from exporters.runtimes.pipeline import load_pipeline  # noqa: E402
from exporters.runtimes.steering import Adapter, ControlNet  # noqa: E402
from exporters.settings import EngineSettings, ExportSettings  # noqa: E402
from exporters.validation.graph import check_parity  # noqa: E402
from slimdiff.denoising.trajectory import record_calls, sample_images  # noqa: E402
from slimdiff.errors import InputError  # noqa: E402
from slimdiff.groups import find_sites  # noqa: E402
from slimdiff.loading.steering import steer  # noqa: E402
from slimdiff.settings import Sampling, ScaledFile, SteeringSettings  # noqa: E402
from slimdiff.slimming.skeleton import skeleton  # noqa: E402

SIZE = {"height": 16, "width": 16}
UNCHECKED = {"requires_safety_checker": False}
OTHERS = ("text_encoder", "vae_decoder", "vae_encoder")
"""Graphs that are those of the pipeline that nothing steers."""


def controlled_by(pipeline: DiffusionPipeline, nets: list[ControlNetModel], folder: Path) -> DiffusionPipeline:
    for number, net in enumerate(nets):
        net.save_pretrained(folder / str(number))
    return steer(pipeline, SteeringSettings(controlnet=tuple(str(folder / str(n)) for n in range(len(nets)))))


def adapted_by(pipeline: DiffusionPipeline, adapter: T2IAdapter, folder: Path) -> DiffusionPipeline:
    adapter.save_pretrained(folder)
    return steer(pipeline, SteeringSettings(adapter=str(folder)))


def exported_beside(others: Path, pipeline: DiffusionPipeline, folder: Path, **settings: Any) -> Path:
    """It, in a folder with the graphs of the pipeline that nothing steers."""
    export_pipeline(pipeline, folder, ExportSettings(**settings), without=OTHERS)
    for name in OTHERS:
        shutil.copytree(others / name, folder / name)
    return folder


def images(pipeline: DiffusionPipeline, control: Any = None, size: int = 16, **arguments: Any) -> np.ndarray:
    """Two steps with guidance, on a picture that steers."""
    sampling = Sampling(steps=2, guidance=3.0, batch=1, arguments=arguments, height=size, width=16)
    inputs = {"prompt": "abc", "image": control or picture()}
    return np.asarray(sample_images(pipeline, [inputs], sampling)[0], dtype=int)


def assert_same(exported: DiffusionPipeline, torchs: DiffusionPipeline, *given: Any, **arguments: Any) -> np.ndarray:
    found, expected = images(exported, *given, **arguments), images(torchs, *given, **arguments)
    assert np.ptp(expected) > 20 and abs(found - expected).max() <= 1
    return expected


@pytest.fixture(scope="module")
def small(pipeline, tiny) -> DiffusionPipeline:
    """With one transformer block, which is soon exported."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return type(pipeline)(**{**pipeline.components, "unet": tiny.unet(**blocks)}, **UNCHECKED)


@pytest.fixture(scope="module")
def controlled(small, tmp_path_factory) -> DiffusionPipeline:
    """A slim UNet with a ControlNet of the dense one."""
    unet = skeleton(small.unet, {site.path: site.dense_rank // 2 for site in find_sites(small.unet)[0]})
    slim = type(small)(**{**small.components, "unet": unet}, **UNCHECKED)
    return controlled_by(slim, [make_controlnet(small.unet)], tmp_path_factory.mktemp("nets"))


@pytest.fixture(scope="module")
def folder(controlled, onnx_folder, tmp_path_factory) -> Path:
    return exported_beside(onnx_folder, controlled, tmp_path_factory.mktemp("onnx"))


def test_a_slim_unet_with_a_controlnet_makes_torchs_image_in_every_way_that_pipelines_use_it(controlled, folder):
    exported = load_pipeline(folder, threads=1)
    assert type(exported) is type(controlled) and isinstance(exported.controlnet, ControlNetModel)
    plain = assert_same(exported, controlled)
    assert abs(images(controlled, picture(1)) - plain).max() > 1
    ways = [{"controlnet_conditioning_scale": 0.3}, {"control_guidance_start": 0.5}, {"guess_mode": True}]
    for arguments in ways:
        assert abs(assert_same(exported, controlled, **arguments) - plain).max() > 1, arguments


def test_recorded_calls_of_a_controlnet_pipeline_are_the_same_in_its_graph(controlled, folder):
    sampling = Sampling(steps=2, guidance=3.0, batch=1, **SIZE)
    calls = record_calls(controlled, [{"prompt": "abc", "image": picture()}], sampling)
    assert "down_block_additional_residuals" in calls[0].arguments
    unet = load_pipeline(folder, threads=1).unet
    assert check_parity(controlled.unet, unet, calls)["passed"]
    plain = {name: value for name, value in calls[0].arguments.items() if "residual" not in name}
    with pytest.raises(InputError, match="a ControlNet steers .*down_block_additional_residuals_0.*--controlnet"):
        unet(**plain)


def test_an_engine_of_a_controlnet_takes_one_sample_as_well_as_all(rtx, folder):
    settings = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
    requests = request_pipeline(folder, settings, gpu=lambda: None)
    assert [name for name in requests if name not in OTHERS] == ["unet", "controlnet"]
    (profile,) = requests["controlnet"].parts["shapes"]["profiles"]
    assert [profile["controlnet_cond"][end] for end in ("min", "max")] == [[1, 3, 16, 16], [2, 3, 16, 16]]
    for batch in (1, 2):
        shapes = {"sample": (batch, 4, 8, 8), "controlnet_cond": (batch, 3, 16, 16), "timestep": ()}
        shapes |= {"encoder_hidden_states": (batch, 7, 32), "conditioning_scale": ()}
        choose_profile({"parts": requests["controlnet"].parts}, shapes)


def test_a_controlnet_of_another_unet_is_refused(pipeline, xl_pipeline, tmp_path):
    nets = {
        "cross_attention_dim is 64, and this model's is 32": make_controlnet(pipeline.unet, cross_attention_dim=64),
        r"block_out_channels is 32, and this model's is \[32, 64\]": make_controlnet(
            pipeline.unet, block_out_channels=(32, 32)
        ),
        "layers_per_block is 2, and this model's is 1": make_controlnet(pipeline.unet, layers_per_block=2),
        "addition_embed_type is text_time, and this model's is None": make_controlnet(xl_pipeline.unet),
        "in_channels is 9, and this model's is 4": make_controlnet(pipeline.unet, in_channels=9),
        "takes 4 pixels a latent, and this model's VAE has 2": make_controlnet(
            pipeline.unet, conditioning_embedding_out_channels=(16, 16, 32)
        ),
    }
    for number, (said, net) in enumerate(nets.items()):
        with pytest.raises(InputError, match=rf"the ControlNet in \S*/0 .*{said}"):
            controlled_by(pipeline, [net], tmp_path / str(number))
    mixed = type(controlled_by(pipeline, [make_controlnet(pipeline.unet)], tmp_path / "own"))(
        **pipeline.components, controlnet=net, requires_safety_checker=False
    )
    with pytest.raises(InputError, match="StableDiffusionControlNetPipeline takes 4 pixels a latent"):
        export_pipeline(mixed, tmp_path / "onnx")


def test_a_t2i_adapter_of_another_unet_or_size_is_refused(pipeline, tmp_path):
    adapters = {
        "width": make_adapter((32, 32)),
        "depth": make_adapter((32, 64, 64)),
        "downscale": make_adapter((32, 64), downscale_factor=4),
    }
    for name, adapter in adapters.items():
        with pytest.raises(InputError, match=rf"the adapter in \S*{name} gives features .*UNet's blocks are \[\(32"):
            adapted_by(pipeline, adapter, tmp_path / name)


def test_what_is_no_controlnet_and_what_cannot_have_one_is_refused(pipeline, controlled, folder, tmp_path):
    def steering(**said: Any) -> SteeringSettings:
        return SteeringSettings(**said)

    with pytest.raises(InputError, match="none is no ControlNetModel: there is no .*config.json"):
        steer(pipeline, steering(controlnet=(str(tmp_path / "none"),)))
    make_controlnet(pipeline.unet).save_pretrained(tmp_path / "net")
    with pytest.raises(InputError, match="net holds a ControlNetModel, and a T2IAdapter is asked for"):
        steer(pipeline, steering(adapter=str(tmp_path / "net")))
    with pytest.raises(InputError, match="StableDiffusionControlNetPipeline is steered already"):
        steer(controlled, steering(controlnet=(str(tmp_path / "net"),)))
    (tmp_path / "net" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="net holds no weights"):
        steer(pipeline, steering(controlnet=(str(tmp_path / "net"),)))
    adapters = StableDiffusionAdapterPipeline(
        **{name: part for name, part in pipeline.components.items() if name != "image_encoder"},
        adapter=MultiAdapter([make_adapter((32, 64)), make_adapter((32, 64))]),
        **UNCHECKED,
    )
    with pytest.raises(InputError, match="holds a MultiAdapter: only ControlNetModel and T2IAdapter are taken"):
        export_pipeline(adapters, tmp_path / "onnx")
    waiting = copy.copy(pipeline)
    waiting.register_modules(image_encoder=torch.nn.Identity())
    with pytest.raises(InputError, match="an image_encoder and no IP-Adapter.*--ip-adapter FILE"):
        export_pipeline(waiting, tmp_path / "onnx")
    with pytest.raises(ValueError, match="no pipeline that ControlNets and a T2I-Adapter steer together"):
        steering(controlnet=("one",), adapter="other")
    with pytest.raises(InputError, match="is no ControlNet: its inputs are sample"):
        ControlNet.open(folder / "unet")
    with pytest.raises(InputError, match="is no T2I-Adapter: its inputs are sample"):
        Adapter.open(folder / "unet")


def test_a_slim_unet_with_a_t2i_adapter_makes_torchs_image(slim_pipeline, onnx_folder, tmp_path):
    """One that takes grey pictures, as those for sketches do."""
    adapted = adapted_by(slim_pipeline, make_adapter((32, 64), in_channels=1), tmp_path / "adapter")
    exported = load_pipeline(exported_beside(onnx_folder, adapted, tmp_path / "onnx"), threads=1)
    assert type(exported) is type(adapted)
    grey = [picture(seed).convert("L") for seed in (0, 1)]
    plain = assert_same(exported, adapted, grey[0])
    others = [
        assert_same(exported, adapted, grey[1]),
        assert_same(exported, adapted, grey[0], adapter_conditioning_scale=0.2),
    ]
    assert all(abs(other - plain).max() > 1 for other in others)


@pytest.mark.parametrize("plus", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_ip_adapter_takes_a_picture_as_a_prompt_in_graphs_as_in_torch(plus, small, onnx_folder, tmp_path):
    """By CLIP's embedding or, `plus`, by hidden states; and at the scale that was exported."""
    shown, size = {"prompt": "abc"}, {**SIZE, "steps": 2, "guidance": 3.0, "batch": 2}
    file = save_ip_adapter(small.unet, tmp_path, plus)
    found = {}
    for scale in (1.0, 0.3):
        fresh = type(small)(**{**small.components, "unet": copy.deepcopy(small.unet)}, **UNCHECKED)
        adapted = steer(fresh, SteeringSettings(ip_adapter=ScaledFile(file=str(file), scale=scale)))
        rows = [{**shown, "ip_adapter_image": picture()}] * 2
        found[scale] = np.asarray(sample_images(adapted, rows, Sampling(**size)), dtype=int)
    assert abs(found[1.0] - found[0.3]).max() > 1
    exported_beside(onnx_folder, adapted, tmp_path / "onnx", dynamic_batch=True)
    exported = load_pipeline(tmp_path / "onnx", threads=1)
    assert abs(np.asarray(sample_images(exported, rows, Sampling(**size)), dtype=int) - found[0.3]).max() <= 1
    rows[1] = {**shown, "ip_adapter_image": picture(1)}
    with pytest.raises(InputError, match="an IP-Adapter takes the same pictures for all images of a batch"):
        sample_images(exported, rows, Sampling(**size))


def test_an_ip_adapter_of_another_model_or_kind_is_refused(pipeline, slim_pipeline, tmp_path):
    file = save_ip_adapter(pipeline.unet, tmp_path)
    weights = load_file(file)

    def refused(said: str, into: Any = pipeline, **changed: Any) -> None:
        save_file({**weights, **changed}, file)
        fresh = type(into)(**{**into.components, "unet": copy.deepcopy(into.unet)}, **UNCHECKED)
        with pytest.raises(InputError, match=said):
            steer(fresh, SteeringSettings(ip_adapter=ScaledFile(file=str(file))))

    first = "ip_adapter.1.to_k_ip.weight"
    refused(rf"of another UNet: its {first} is \(8, 8\), and for this model it is", **{first: torch.ones(8, 8)})
    refused("of another UNet: its ip_adapter.99.to_v_ip.weight is", **{"ip_adapter.99.to_v_ip.weight": torch.ones(1)})
    refused("takes 8 numbers of an image encoder, .* gives 20", **{"image_proj.proj.weight": torch.ones(128, 8)})
    refused("no whole IP-Adapter: .*norm", **{"image_proj.norm.weight": torch.ones(7)})
    refused("is a FaceID adapter", **{"image_proj.perceiver_resampler.proj_in.weight": torch.ones(1)})
    refused("the model is slim, and .*add the IP-Adapter to the dense model", slim_pipeline)
    (tmp_path / "image_encoder" / "config.json").unlink()
    refused("needs an image encoder, and there is no .*image_encoder/config.json")
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(InputError, match="is no IP-Adapter: it has no tensors image_proj"):
        steer(pipeline, SteeringSettings(ip_adapter=ScaledFile(file=str(file))))
    with pytest.raises(InputError, match="is a pickle"):
        (tmp_path / "ip.bin").write_bytes(b"x")
        steer(pipeline, SteeringSettings(ip_adapter=ScaledFile(file=str(tmp_path / "ip.bin"))))


@pytest.mark.slow
def test_an_sdxl_adapter_may_stop_halfway_and_sizes_may_be_open(xl_pipeline, onnx_xl_folder, tmp_path):
    adapted = adapted_by(xl_pipeline, make_adapter((32, 64)), tmp_path / "adapter")
    settings = ExportSettings(dynamic_batch=True, dynamic_size=True)
    export_pipeline(adapted, tmp_path / "onnx", settings, call=example_call(adapted, **SIZE))
    exported = load_pipeline(tmp_path / "onnx", threads=1)
    for size in (16, 24):
        control = picture(size=size).crop((0, 0, 16, size))
        whole = assert_same(exported, adapted, control, size)
        half = assert_same(exported, adapted, control, size, adapter_conditioning_factor=0.5)
        assert abs(half - whole).max() > 1


@pytest.mark.slow
def test_several_controlnets_steer_a_model_of_open_batch_and_size(slim_pipeline, tmp_path):
    nets = [make_controlnet(slim_pipeline.unet, seed) for seed in (0, 1)]
    several = controlled_by(slim_pipeline, nets, tmp_path)
    settings = ExportSettings(dynamic_batch=True, dynamic_size=True)
    export_pipeline(several, tmp_path / "onnx", settings, call=example_call(several, **SIZE))
    assert (tmp_path / "onnx" / "controlnet_1" / "model.onnx").is_file()
    exported = load_pipeline(tmp_path / "onnx", threads=1)
    for size in (16, 24):
        assert_same(exported, several, [picture(), picture(1)], size)


@pytest.mark.slow
def test_sdxl_with_a_controlnet_makes_torchs_image(xl_pipeline, onnx_xl_folder, tmp_path):
    controlled = controlled_by(xl_pipeline, [make_controlnet(xl_pipeline.unet)], tmp_path / "nets")
    folder = exported_beside(onnx_xl_folder, controlled, tmp_path / "onnx")
    shutil.copytree(onnx_xl_folder / "text_encoder_2", folder / "text_encoder_2", dirs_exist_ok=True)
    assert_same(load_pipeline(folder, threads=1), controlled)


@pytest.mark.slow
def test_a_unet_in_parts_is_steered_as_the_whole_one(small, onnx_folder, tmp_path):
    """The picture that is a prompt goes to the prompt's part, a ControlNet's residuals to the step."""
    fresh = type(small)(**{**small.components, "unet": copy.deepcopy(small.unet)}, **UNCHECKED)
    make_controlnet(small.unet).save_pretrained(tmp_path / "net")
    file = ScaledFile(file=str(save_ip_adapter(small.unet, tmp_path / "ip")), scale=0.7)
    steered = steer(fresh, SteeringSettings(controlnet=(str(tmp_path / "net"),), ip_adapter=file))
    folder = exported_beside(onnx_folder, steered, tmp_path / "onnx", split=True, dynamic_batch=True)
    exported = load_pipeline(folder, threads=1)
    prompt, step = (exported.unet.session.parts[part] for part in ("prompt", "step"))
    assert "image_embeds_0" in prompt.inputs and "image_embeds_0" not in step.inputs
    assert "down_block_additional_residuals_0" in step.inputs
    sampling = Sampling(steps=2, guidance=3.0, batch=1, **SIZE)
    for seed in (0, 2):
        rows = [{"prompt": "abc", "image": picture(), "ip_adapter_image": picture(seed)}]
        found, right = (np.asarray(sample_images(p, rows, sampling)[0], dtype=int) for p in (exported, steered))
        assert abs(found - right).max() <= 1 and np.ptp(right) > 20
