"""Whole tiny pipelines of transformers that `every_pipeline` has no components for: text encoder, tokenizer and all."""

from __future__ import annotations

import diffusers
import torch
import transformers
from every_pipeline.components import t5_tokenizer

from families.family import quiet, tiny_vae
from families.newer_transformers import auraflow, lumina2, sana

_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}


def _gemma(width: int) -> transformers.Gemma2Model:
    sizes = {"hidden_size": width, "intermediate_size": 32, **_LAYERS}
    config = transformers.Gemma2Config(**sizes, vocab_size=len(t5_tokenizer()), pad_token_id=0)
    return transformers.Gemma2Model(config).eval()


def aura_flow_pipeline() -> diffusers.AuraFlowPipeline:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes, vocab_size=len(t5_tokenizer())))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(diffusers.AuraFlowPipeline(t5_tokenizer(), encoder.eval(), tiny_vae(), auraflow(), scheduler))


def lumina2_pipeline() -> diffusers.Lumina2Pipeline:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(**levels, block_out_channels=(8,) * 4, norm_num_groups=4, shift_factor=0.1).eval()
    return quiet(diffusers.Lumina2Pipeline(lumina2(), scheduler, vae, _gemma(16), t5_tokenizer()))


def sana_pipeline() -> diffusers.SanaPipeline:
    """With an autoencoder of its own kind, two pixels a latent along a side; the pipeline takes multiples of 32."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return quiet(diffusers.SanaPipeline(t5_tokenizer(), _gemma(24), vae, sana(), scheduler))
