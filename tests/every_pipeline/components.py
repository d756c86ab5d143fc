"""Tiny random components, by the class that a pipeline's constructor asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from conftest import TOKENIZER, tiny_unet
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from families.family import TWO_LEVELS, tiny_vae
from torch import nn

WIDTH = 32  # of every text and image embedding
LENGTH = 77  # of CLIP's prompts

_TEXT = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TEXT, "image_size": 224, "patch_size": 56}  # Stable Video Diffusion makes it 224 pixels itself
_PIECES = [*"abcdefghijklmnopqrstuvwxyz ,.", "▁"]
_TWO_BLOCKS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
_LEVELS = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}


def clip_tokenizer() -> transformers.CLIPTokenizer:
    return transformers.CLIPTokenizer.from_pretrained(TOKENIZER)


def _clip_config() -> transformers.CLIPTextConfig:
    tokenizer = clip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return transformers.CLIPTextConfig(
        **_TEXT, **special, vocab_size=len(tokenizer), max_position_embeddings=LENGTH, projection_dim=WIDTH
    )


def _vision_config() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**_VISION, projection_dim=WIDTH)


def _t5(width: int = WIDTH) -> Any:
    sizes = {"d_model": width, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, vocab_size=len(t5_tokenizer())))


def t5_tokenizer() -> transformers.T5Tokenizer:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in _PIECES)]
    return transformers.T5Tokenizer(vocab=vocabulary, model_max_length=LENGTH)


def _bert() -> transformers.BertModel:
    return transformers.BertModel(transformers.BertConfig(**_TEXT, vocab_size=40, max_position_embeddings=LENGTH))


def bert_tokenizer() -> transformers.BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_PIECES]
    return transformers.BertTokenizer(
        vocab={word: number for number, word in enumerate(words)}, model_max_length=LENGTH
    )


def _safety_checker() -> StableDiffusionSafetyChecker:
    config = transformers.CLIPConfig(
        text_config=_clip_config().to_dict(), vision_config=_vision_config().to_dict(), projection_dim=WIDTH
    )
    return StableDiffusionSafetyChecker(config)


def _image_processor() -> Any:
    return transformers.CLIPImageProcessor()


def _unet(**changes: Any) -> nn.Module:
    return tiny_unet(**{**TWO_LEVELS, **changes})


def _unet_2d() -> nn.Module:
    return diffusers.UNet2DModel(
        **_LEVELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


def _unet_3d() -> nn.Module:
    return diffusers.UNet3DConditionModel(
        **_LEVELS,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
    )


def _unet_in_time() -> nn.Module:
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )


def _motion_adapter() -> nn.Module:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
    )
    return _stirred(adapter, "proj_out.weight")


def _controlnet(**unet: Any) -> nn.Module:
    controlnet = diffusers.ControlNetModel.from_unet(_unet(**unet), conditioning_embedding_out_channels=(16, 32))
    return _stirred(controlnet, "controlnet_")


def _adapter() -> nn.Module:
    return diffusers.T2IAdapter(in_channels=3, channels=[32, 32], num_res_blocks=1, downscale_factor=2)


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(**_TWO_BLOCKS, sample_size=8, norm_num_groups=8, out_channels=8)


def _pixart() -> nn.Module:
    sizes = {"cross_attention_dim": 32, "caption_channels": WIDTH, "norm_num_groups": 8}
    return diffusers.PixArtTransformer2DModel(**_TWO_BLOCKS, **sizes, sample_size=8)


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        **_TWO_BLOCKS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=WIDTH * 2,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH * 2,
        pos_embed_max_size=8,
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )


def _hunyuan() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        **_TWO_BLOCKS,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        mlp_ratio=2.0,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        text_len=LENGTH,
        text_len_t5=256,
    )


def _video_vae() -> nn.Module:
    levels = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2}
    return diffusers.AutoencoderKLTemporalDecoder(**levels, sample_size=16)


def _vae() -> nn.Module:
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)  # Stable Diffusion 3 and Flux subtract it
    return vae


def _vq() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.VQModel(**blocks, block_out_channels=(32, 32), latent_channels=4, norm_num_groups=8)


def _stirred(module: nn.Module, part: str) -> nn.Module:
    """New adapters give zero: nothing of them would reach the denoiser."""
    for name, parameter in module.named_parameters():
        if part in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.1)
    return module


COMPONENTS: dict[str, Callable[..., Any]] = {
    "AutoencoderKL": _vae,
    "AutoencoderKLTemporalDecoder": _video_vae,
    "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "BertModel": _bert,
    "BertTokenizer": bert_tokenizer,
    "CLIPImageProcessor": _image_processor,
    "CLIPImageProcessorPil": _image_processor,
    "CLIPTextModel": lambda: transformers.CLIPTextModel(_clip_config()),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextModelWithProjection(_clip_config()),
    "CLIPTokenizer": clip_tokenizer,
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(_vision_config()),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionModelWithProjection(_vision_config()),
    "ControlNetModel": _controlnet,
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "HunyuanDiT2DModel": _hunyuan,
    "MotionAdapter": _motion_adapter,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "StableDiffusionSafetyChecker": _safety_checker,
    "T2IAdapter": _adapter,
    "T5EncoderModel": _t5,
    "T5Tokenizer": t5_tokenizer,
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unet_2d,
    "UNet3DConditionModel": _unet_3d,
    "UNetSpatioTemporalConditionModel": _unet_in_time,
    "VQModel": _vq,
}
"""A class's name -> makes a tiny member. Schedulers are no part of it: their defaults are small."""


def make_component(kind: str, **changes: Any) -> Any:
    """A tiny member of a class, always with the same weights, in evaluation mode.

    Raises:
        KeyError: for a class that is not among `COMPONENTS`.
    """
    torch.manual_seed(len(kind))
    made = COMPONENTS[kind](**changes)
    return made.eval() if isinstance(made, nn.Module) else made
