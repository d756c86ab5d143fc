"""Tiny real models, exported once for the whole run."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from slimdiff.denoising.trajectory import Call
from slimdiff.groups import GROUPS, find_sites
from slimdiff.slimming.skeleton import skeleton

TIMESTEPS = (981, 501, 21)


@dataclass
class SitePlan:
    group: str
    path: str
    heads: int
    rank: int
    layers: dict = field(default_factory=dict)


@dataclass
class Plan:
    """What the exporters read of slimdiff.Plan."""

    sites: dict[str, SitePlan] = field(default_factory=dict)


def make_unet(heads: int = 2, **changes) -> UNet2DConditionModel:
    """36 to 64 thousand weights per block, two heads of 16 and 32 dims by default."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(config | changes)).eval()


def make_calls(batch: int = 2, length: int = 7) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    return [
        Call(
            step,
            t,
            {
                "sample": torch.randn(batch, 4, 8, 8, generator=generator),
                "timestep": torch.tensor(t),
                "encoder_hidden_states": torch.randn(batch, length, 32, generator=generator),
            },
        )
        for step, t in enumerate(TIMESTEPS)
    ]


def narrow(unet: nn.Module, head_dim: int = 16, channels: int = 40) -> Plan:
    """Cut a UNet's attention to `head_dim` per head, feed-forwards to `channels`, resnets to 16; gives the plan."""
    plan = Plan()
    for path, module in unet.named_modules():
        if isinstance(module, Attention):
            inner = module.heads * head_dim
            for name in ("to_q", "to_k", "to_v"):
                setattr(module, name, _linear(getattr(module, name), rows=inner))
            module.to_out[0] = _linear(module.to_out[0], columns=inner)
            module.scale = head_dim**-0.5
            for group in ("query_key", "value_output"):
                plan.sites[f"{path}.{group}"] = SitePlan(group, path, module.heads, head_dim)
        elif isinstance(module, FeedForward):
            module.net[0].proj = _linear(module.net[0].proj, rows=2 * channels)
            module.net[2] = _linear(module.net[2], columns=channels)
            plan.sites[f"{path}.feed_forward"] = SitePlan("feed_forward", path, 1, channels)
        elif isinstance(module, ResnetBlock2D):
            group = GROUPS["resnet"]
            site = group.site(path, module)
            weights = {**module.state_dict(), **group.cut(module, site, torch.arange(16))}
            group.resize(module, site, 16)
            module.load_state_dict(weights)
            plan.sites[f"{path}.resnet"] = SitePlan("resnet", path, 1, 16)
    return plan


def _linear(dense: nn.Linear, rows: int | None = None, columns: int | None = None) -> nn.Linear:
    weight = dense.weight.data[:rows, :columns].clone()
    slim = nn.Linear(weight.shape[1], weight.shape[0], bias=dense.bias is not None)
    slim.weight.data = weight
    if dense.bias is not None:
        slim.bias.data = dense.bias.data[:rows].clone()
    return slim


def halves(unet: nn.Module) -> dict[str, int]:
    """Half the dense rank of every site."""
    return {site.path: site.dense_rank // 2 for site in find_sites(unet)[0]}


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Makers of tiny models: `unet(heads, **config)`, `calls(batch, length)`, `narrow(unet, head_dim, channels)`."""
    return SimpleNamespace(unet=make_unet, calls=make_calls, narrow=narrow)


@pytest.fixture(scope="session")
def calls() -> list[Call]:
    return make_calls()


@pytest.fixture(scope="session")
def dense() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture(scope="session")
def slim_and_plan() -> tuple[UNet2DConditionModel, Plan]:
    """One head of 32 or 64 dims cut to 16 or less than half, feed-forwards to 40 channels."""
    unet = make_unet(heads=1)
    return unet, narrow(unet)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, dense, slim_and_plan, calls) -> dict[str, Path]:
    """`model.onnx` of the dense UNet in fp32, fp16 and with an open batch, and of the slim one in fp32 and fp16."""
    pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    from exporters.graphs.export import export_unet
    from exporters.settings import ExportSettings

    folder = tmp_path_factory.mktemp("onnx")
    wanted = {
        "dense": (dense, ExportSettings()),
        "dense-fp16": (dense, ExportSettings(precision="fp16")),
        "dense-open": (dense, ExportSettings(dynamic_batch=True)),
        "slim": (slim_and_plan[0], ExportSettings()),
        "slim-fp16": (slim_and_plan[0], ExportSettings(precision="fp16")),
    }
    return {name: export_unet(unet, folder / name, calls[0], settings) for name, (unet, settings) in wanted.items()}


@pytest.fixture(scope="session")
def rtx() -> None:
    for module in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: engines need the extra tensorrt-rtx")


@pytest.fixture(scope="session")
def slim_engine(rtx, tmp_path_factory, exported, slim_and_plan) -> tuple[Path, dict]:
    """Folder and report of the slim UNet's engine in fp16, for sm89."""
    from exporters.engine.build import build_engine
    from exporters.settings import EngineSettings

    folder = tmp_path_factory.mktemp("engine")
    settings = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
    return folder, build_engine(exported["slim-fp16"], folder, settings, plan=slim_and_plan[1])


@pytest.fixture(scope="session")
def sharp() -> UNet2DConditionModel:
    """A UNet whose attention looks at something: untrained, it looks everywhere alike and its scale hardly matters."""
    unet = make_unet()
    for layer in ("attn1", "attn2"):
        for name in ("to_q", "to_k"):
            unet.get_submodule(f"mid_block.attentions.0.transformer_blocks.0.{layer}.{name}").weight.data *= 4
    return unet


@pytest.fixture(scope="session")
def sharp_graphs(tmp_path_factory, sharp, calls) -> dict[str, Path]:
    """`model.onnx` of it, by precision."""
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
    from exporters.graphs.export import export_unet
    from exporters.settings import ExportSettings

    folder = tmp_path_factory.mktemp("sharp")
    return {p: export_unet(sharp, folder / p, calls[0], ExportSettings(precision=p)) for p in ("fp32", "fp16")}


@pytest.fixture(scope="session")
def pipeline(dense, tmp_path_factory) -> StableDiffusionPipeline:
    """Stable Diffusion, every part tiny and untrained, with a tokenizer of single letters."""
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        tokenizer=_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        unet=copy.deepcopy(dense),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def xl_pipeline(tmp_path_factory) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL, likewise: two text encoders of 16 dims each, so that the UNet gets 32."""
    unet = make_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
    )
    tokenizer = _tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(16)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory, pipeline) -> Path:
    """The whole `pipeline` in optimum's layout, open in the batch."""
    return _exported(pipeline, tmp_path_factory.mktemp("onnx-pipeline"))


@pytest.fixture(scope="session")
def onnx_xl_folder(tmp_path_factory, xl_pipeline) -> Path:
    """The whole `xl_pipeline`, likewise."""
    return _exported(xl_pipeline, tmp_path_factory.mktemp("onnx-xl-pipeline"))


@pytest.fixture(scope="session")
def slim_pipeline(pipeline) -> StableDiffusionPipeline:
    """The same with half of every dense dimension."""
    parts = {**pipeline.components, "unet": skeleton(pipeline.unet, halves(pipeline.unet))}
    return type(pipeline)(**parts, requires_safety_checker=False)


@pytest.fixture(scope="session")
def open_folder(tmp_path_factory, slim_pipeline) -> Path:
    """It, open in batch, height and width."""
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    from exporters.graphs.pipeline import example_call, export_pipeline
    from exporters.settings import ExportSettings

    folder = tmp_path_factory.mktemp("open")
    call = example_call(slim_pipeline, height=16, width=16)
    export_pipeline(slim_pipeline, folder, ExportSettings(dynamic_batch=True, dynamic_size=True), call=call)
    return folder


def _exported(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    from exporters.graphs.pipeline import export_pipeline
    from exporters.settings import ExportSettings

    export_pipeline(pipeline, folder, ExportSettings(dynamic_batch=True))
    return folder


def _text_config(width: int = 32) -> CLIPTextConfig:
    torch.manual_seed(0)
    return CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


def _tokenizer(folder: Path) -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7)


@pytest.fixture(scope="session")
def int8_graph(tmp_path_factory, dense, calls) -> Path:
    """The dense UNet's graph in int8, as many layers of it as cost little."""
    pytest.importorskip("nncf", reason="int8 needs the extra int8")
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    from exporters.graphs.export import export_unet
    from exporters.settings import ExportSettings

    settings = ExportSettings(precision="int8", int8_error=3e-4)
    return export_unet(dense, tmp_path_factory.mktemp("int8"), calls[0], settings, calibration=calls)
