"""Whole tiny pipelines of transformers that `every_pipeline` has no components for: text encoder, tokenizer and all."""

from __future__ import annotations

import diffusers
import torch
import transformers
from every_pipeline.components import t5_tokenizer

from families.family import quiet, tiny_vae
from families.newer_transformers import auraflow


def aura_flow_pipeline() -> diffusers.AuraFlowPipeline:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes, vocab_size=len(t5_tokenizer())))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(diffusers.AuraFlowPipeline(t5_tokenizer(), encoder.eval(), tiny_vae(), auraflow(), scheduler))
