"""Tiny Stable Diffusion pipelines of every kind, and their weights in the original (LDM's and SGM's) layout."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from slimdiff.loading.single_file_weights import make_tokenizer

_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.", "attn."),
)


def _unet(channels: int, **more: Any) -> Any:
    config = {
        "sample_size": 64,
        "in_channels": channels,
        "block_out_channels": (64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DConditionModel(**{**config, **more}).eval()


def _vae(pixels: int, scaling: float) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=pixels,
        scaling_factor=scaling,
    ).eval()


@cache
def _text_encoder(kind: Any, hidden_act: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=64,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return kind(config).eval()


def make_pipeline(kind: str) -> Any:
    """`sd1`, `sd2`, `sd2-v`, `sdxl`, `refiner`, `inpaint` or `pix2pix`, with the settings of the published ones."""
    torch.manual_seed(0)
    alone = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    ddim = {"clip_sample": False, "set_alpha_to_one": False}
    linear = {"use_linear_projection": True, "attention_head_dim": (1, 1)}
    clip = {
        "text_encoder": _text_encoder(CLIPTextModel, "quick_gelu"),
        "tokenizer": make_tokenizer("<|endoftext|>", 77),
    }
    open_clip = _text_encoder(CLIPTextModelWithProjection, "gelu")
    if kind in ("sdxl", "refiner"):
        ids = 6 if kind == "sdxl" else 5
        parts = clip if kind == "sdxl" else {"text_encoder": None, "tokenizer": None}
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 32}
        wide = {"cross_attention_dim": 128 if kind == "sdxl" else 64, "transformer_layers_per_block": (1, 2)}
        wide |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 128}
        wide |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        unet = _unet(4, **linear, **added, **wide, projection_class_embeddings_input_dim=64 + 32 * ids)
        more = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False} if kind == "refiner" else {}
        of = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionXLImg2ImgPipeline
        scheduler = diffusers.EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading")
        parts |= {"text_encoder_2": open_clip, "tokenizer_2": make_tokenizer("!", 77)}
        return of(vae=_vae(1024, 0.13025), unet=unet, scheduler=scheduler, **parts, **more)
    if kind.startswith("sd2"):
        of_v = kind == "sd2-v"
        prediction = "v_prediction" if of_v else "epsilon"
        size = {"sample_size": 96, "upcast_attention": True} if of_v else {}
        scheduler = diffusers.DDIMScheduler(**_SCHEDULE, **ddim, prediction_type=prediction)
        clip = {"text_encoder": _text_encoder(CLIPTextModel, "gelu"), "tokenizer": make_tokenizer("!", 77)}
        vae = _vae(768 if of_v else 512, 0.18215)
        return diffusers.StableDiffusionPipeline(
            unet=_unet(4, **linear, **size), vae=vae, scheduler=scheduler, **clip, **alone
        )
    of, channels = {
        "sd1": (diffusers.StableDiffusionPipeline, 4),
        "inpaint": (diffusers.StableDiffusionInpaintPipeline, 9),
        "pix2pix": (diffusers.StableDiffusionInstructPix2PixPipeline, 8),
    }[kind]
    scheduler = diffusers.PNDMScheduler(**_SCHEDULE, skip_prk_steps=True)
    if kind == "pix2pix":
        scheduler = diffusers.EulerAncestralDiscreteScheduler(**_SCHEDULE)
    return of(unet=_unet(channels), vae=_vae(512, 0.18215), scheduler=scheduler, **clip, **alone)


def original_tensors(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a pipeline by the names, and in the shapes, of the original layout."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in _original_unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _original_vae(pipeline.vae).items()}
    second = getattr(pipeline, "text_encoder_2", None)
    first = pipeline.text_encoder
    if second is not None:
        place = "conditioner.embedders.1.model." if first is not None else "conditioner.embedders.0.model."
        tensors |= {place + k: v for k, v in _original_open_clip(second).items()}
    if first is not None and first.config.hidden_act == "gelu":
        whole = _original_open_clip(first)
        last = {k.replace("resblocks.1.", "resblocks.2."): v for k, v in whole.items() if "resblocks.1." in k}
        tensors |= {f"cond_stage_model.model.{k}": v for k, v in (whole | last).items()}
    elif first is not None:
        place = "conditioner.embedders.0.transformer." if second is not None else "cond_stage_model.transformer."
        plain = {k.removeprefix("text_model."): v for k, v in first.state_dict().items()}
        tensors |= {f"{place}text_model.{k}": v for k, v in plain.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _original_unet(unet: Any) -> dict[str, Tensor]:
    per, levels = unet.config.layers_per_block, len(unet.config.block_out_channels)
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    fixed |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    fixed |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    fixed |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    fixed |= {"mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        down, up = 1 + level * (per + 1), level * (per + 1)
        fixed[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{down + per}.0.op"
        for block in range(per + 1):
            fixed[f"down_blocks.{level}.resnets.{block}"] = f"input_blocks.{down + block}.0"
            fixed[f"down_blocks.{level}.attentions.{block}"] = f"input_blocks.{down + block}.1"
            fixed[f"up_blocks.{level}.resnets.{block}"] = f"output_blocks.{up + block}.0"
            fixed[f"up_blocks.{level}.attentions.{block}"] = f"output_blocks.{up + block}.1"
        after = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
        fixed[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{up + per}.{after}.conv"
    found = {}
    for name, tensor in unet.state_dict().items():
        start = next(old for old in fixed if name.startswith(old + "."))
        rest = name.removeprefix(start)
        if ".resnets." in start:
            rest = re.sub(r"^\.(\w+)", lambda m: f".{_RESNET[m[1]]}", rest)
        found[fixed[start] + rest] = tensor
    return found


def _original_vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    found = {}
    for name, tensor in vae.state_dict().items():
        new = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("group_norm", "norm").replace("to_out.0", "proj_out")
        new = re.sub(r"to_([qkv])", r"\1", new)
        convolved = ".attn_1." in new and tensor.ndim == 2
        found[new] = tensor[:, :, None, None] if convolved else tensor
    return found


def _original_open_clip(encoder: Any) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    found = {}
    for name in [n for n in state if n.endswith(("q_proj.weight", "q_proj.bias"))]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    if (projection := state.pop("text_projection.weight", None)) is not None:
        found["text_projection"] = projection.T
    found |= state
    for old, new in _OPEN_CLIP:
        found = {name.replace(old, new): tensor for name, tensor in found.items()}
    return found
