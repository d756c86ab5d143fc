"""Pipelines of other tasks than text to image, each with components that no other has."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any

import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer, DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from families.family import TWO_LEVELS, quiet
from families.images import xl

PIXELS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}


def ddpm() -> DDPMPipeline:
    torch.manual_seed(0)
    return quiet(DDPMPipeline(UNet2DModel(**PIXELS).eval(), DDPMScheduler()))


def consistency() -> ConsistencyModelPipeline:
    """Class-conditional, of pixels, with times that are fractions."""
    torch.manual_seed(0)
    return quiet(
        ConsistencyModelPipeline(UNet2DModel(**PIXELS, num_class_embeds=5).eval(), CMStochasticIterativeScheduler())
    )


def refiner() -> StableDiffusionXLImg2ImgPipeline:
    """SDXL's: one text encoder, and a score among the sizes."""
    parts = xl().components | {"text_encoder": None, "tokenizer": None}
    parts["unet"] = tiny_unet(
        **TWO_LEVELS,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 16,
    )
    return quiet(StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False))


def upscaler() -> StableDiffusionUpscalePipeline:
    """Denoises latents beside the small image itself, told how noisy that was made."""
    parts = tiny_pipeline(in_channels=7, num_class_embeds=1000, **TWO_LEVELS).components
    kept = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts["vae"].register_to_config(scaling_factor=0.08333)
    return quiet(StableDiffusionUpscalePipeline(**{n: parts[n] for n in kept}, low_res_scheduler=DDPMScheduler()))


def latent_upscaler() -> StableDiffusionLatentUpscalePipeline:
    """Its UNet gets the text's last hidden state, and the pooled text as an embedding beside the time."""
    parts = tiny_pipeline(
        in_channels=8, out_channels=5, time_cond_proj_dim=128 + 32, sample_size=16, **TWO_LEVELS
    ).components
    encoder = parts["text_encoder"]
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    torch.nn.init.normal_(norm.weight, mean=2)  # so that before and after it are told apart
    kept = ("vae", "text_encoder", "tokenizer", "unet")
    return quiet(
        StableDiffusionLatentUpscalePipeline(**{n: parts[n] for n in kept}, scheduler=EulerDiscreteScheduler())
    )


def depth_to_image() -> StableDiffusionDepth2ImgPipeline:
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        is_hybrid=False,
    )
    parts = tiny_pipeline(in_channels=5, **TWO_LEVELS).components
    kept = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    processor = DPTImageProcessor(size={"height": 32, "width": 32})
    estimator = DPTForDepthEstimation(config).eval()
    return quiet(
        StableDiffusionDepth2ImgPipeline(
            **{n: parts[n] for n in kept}, depth_estimator=estimator, feature_extractor=processor
        )
    )


def _vq(levels: int) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        num_vq_embeddings=32,
        latent_channels=3,
    ).eval()


def ldm_upscaler() -> LDMSuperResolutionPipeline:
    parts = tiny_pipeline().components
    torch.manual_seed(0)
    unet = UNet2DModel(**PIXELS | {"sample_size": 32}, in_channels=6, out_channels=3).eval()
    return quiet(LDMSuperResolutionPipeline(_vq(3), unet, parts["scheduler"]))


def ldm() -> LDMTextToImagePipeline:
    """Latent diffusion as it was first: a BERT of its own, and latents an eighth of the image's side."""
    parts = tiny_pipeline(in_channels=3, out_channels=3, **TWO_LEVELS).components
    torch.manual_seed(0)
    config = LDMBertConfig(
        vocab_size=32, encoder_layers=2, encoder_ffn_dim=32, encoder_attention_heads=2, head_dim=16, d_model=32
    )
    with TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_lowercase]))
        tokenizer = BertTokenizer(str(vocabulary), model_max_length=77)
    return quiet(
        LDMTextToImagePipeline(_vq(4), LDMBertModel(config).eval(), tokenizer, parts["unet"], parts["scheduler"])
    )
