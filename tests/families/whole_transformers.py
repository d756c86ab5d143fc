"""Whole tiny pipelines of transformers that `every_pipeline` has no components for: text encoder, tokenizer and all."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from every_pipeline.components import make_component, t5_tokenizer
from every_pipeline.members import make_member

from families.family import quiet, tiny_vae
from families.newer_transformers import auraflow, sana

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


def chroma_pipeline() -> diffusers.ChromaPipeline:
    """Flux's blocks with a mask over prompt and image, called twice for guidance."""
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=64,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ).eval()
    parts = {"tokenizer": t5_tokenizer(), "vae": make_component("AutoencoderKL"), "transformer": transformer}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(diffusers.ChromaPipeline(scheduler, text_encoder=make_component("T5EncoderModel"), **parts))


def changed_member(name: str, **config: Any) -> Any:
    """A pipeline whose transformer has another configuration."""
    pipeline = make_member(name)
    torch.manual_seed(0)
    transformer = pipeline.transformer
    pipeline.register_modules(transformer=type(transformer).from_config({**transformer.config, **config}).eval())
    return pipeline


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
