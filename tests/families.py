"""Tiny random members of every family of denoisers, in their real pipelines where those can be small."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import PROMPTS, tiny_pipeline, tiny_unet
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from slimdiff import Sampling
from slimdiff.denoising.trajectory import Call

SAMPLING = Sampling(steps=2, batch=2, guidance=3.0, seed=1)
# The least of a text-to-image UNet that has every kind of block: three transformer blocks.
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "attention_head_dim": (2, 2),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@dataclass
class Family:
    """How to make one, what to calibrate it with, and what must be found in it.

    Attributes:
        make: gives a pipeline, or a bare denoiser whose `calls` are made by hand.
        inputs: two images' inputs.
        sites: how many per group.
        left_dense: reasons, and how many modules stay dense for each.
    """

    make: Callable[[], DiffusionPipeline | nn.Module]
    inputs: Sequence[str | Mapping[str, Any]]
    sites: dict[str, int]
    left_dense: dict[str, int] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: SAMPLING)
    calls: Callable[[], list[Call]] | None = None


def attention_and(feed_forward: int, attention: int | None = None, resnet: int = 0) -> dict[str, int]:
    """Counts of sites for so many feed-forwards, attention layers (two a feed-forward, if not given) and resnets."""
    attention = 2 * feed_forward if attention is None else attention
    counts = {"query_key": attention, "value_output": attention, "feed_forward": feed_forward, "resnet": resnet}
    return {group: count for group, count in counts.items() if count}


def picture(seed: int, size: int = 16) -> Image.Image:
    pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def xl() -> StableDiffusionXLPipeline:
    """As SDXL: no transformer at the first level, then deeper ones, linear projections, sizes and a pooled text."""
    base = tiny_pipeline()
    config = CLIPTextConfig(**{**base.text_encoder.config.to_dict(), "projection_dim": 16})
    unet = tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=base.vae,
            text_encoder=base.text_encoder,
            text_encoder_2=CLIPTextModelWithProjection(config).eval(),
            tokenizer=base.tokenizer,
            tokenizer_2=base.tokenizer,
            unet=unet,
            scheduler=base.scheduler,
            add_watermarker=False,
        )
    )


def inpainting() -> StableDiffusionInpaintPipeline:
    parts = tiny_pipeline(in_channels=9, **TWO_LEVELS).components
    return quiet(StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))


def instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    parts = tiny_pipeline(in_channels=8, **TWO_LEVELS).components
    return quiet(StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))


def unconditional() -> DDIMPipeline:
    """`UNet2DModel`: attention over pixels with its own group norm and residual, biases everywhere."""
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )
    return quiet(DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False)))


def animate() -> AnimateDiffPipeline:
    base = tiny_pipeline(**TWO_LEVELS)
    adapter = MotionAdapter(
        block_out_channels=(32, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
    )
    # A new motion module's output projection is zero: nothing in it would matter.
    for name, parameter in adapter.named_parameters():
        if "proj_out.weight" in name:
            nn.init.normal_(parameter, std=0.1)
    parts = {k: getattr(base, k) for k in ("vae", "text_encoder", "tokenizer", "unet")}
    return quiet(AnimateDiffPipeline(**parts, motion_adapter=adapter.eval(), scheduler=base.scheduler))


def text_to_video() -> TextToVideoSDPipeline:
    base = tiny_pipeline()
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=16,
        norm_num_groups=8,
    )
    parts = {k: getattr(base, k) for k in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return quiet(TextToVideoSDPipeline(**parts, unet=unet.eval()))


def image_to_video() -> StableVideoDiffusionPipeline:
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        num_frames=3,
    )
    # Its scheduler gives the logarithm of a noise level for a time.
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_max=700.0,
        sigma_min=0.002,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, sample_size=16
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,  # the pipeline resizes to this, whatever the encoder says
        intermediate_size=32,
        patch_size=112,
    )
    return quiet(
        StableVideoDiffusionPipeline(
            vae=vae.eval(),
            image_encoder=CLIPVisionModelWithProjection(vision).eval(),
            unet=unet.eval(),
            scheduler=scheduler,
            feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
        )
    )


def dit() -> DiTPipeline:
    """Attention with biases, GELU feed-forwards, classes by adaptive norms."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, norm_num_groups=8, out_channels=8
    )
    return quiet(DiTPipeline(transformer.eval(), tiny_vae(), DDIMScheduler()))


def pixart() -> PixArtAlphaPipeline:
    """With embeddings in the place of T5, which has no small version."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=24,
        norm_num_groups=8,
    )
    # A new adaptive norm's table is small noise, the output's is too: as it is.
    return quiet(PixArtAlphaPipeline(None, None, tiny_vae(), transformer.eval(), DDIMScheduler()))


def text_embeddings(seed: int) -> dict[str, torch.Tensor]:
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    return {
        "prompt_embeds": noise(7, 24, seed=seed),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(7, 24, seed=99),
        "negative_prompt_attention_mask": mask,
    }


def hunyuan() -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=32,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
    ).eval()


def hunyuan_calls() -> list[Call]:
    rotary = get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return [
        Call(
            step,
            t,
            {
                "hidden_states": noise(2, 4, 8, 8, seed=step),
                "timestep": torch.tensor([t, t]).float(),  # as its pipeline does: in the dtype of the latents
                "encoder_hidden_states": noise(2, 5, 32, seed=7),
                "text_embedding_mask": torch.ones(2, 5),
                "encoder_hidden_states_t5": noise(2, 6, 24, seed=8),
                "text_embedding_mask_t5": torch.ones(2, 6),
                "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]] * 2),
                "style": torch.zeros(2, dtype=torch.long),
                "image_rotary_emb": rotary,
            },
        )
        for step, t in enumerate((900, 300))
    ]


def sd3() -> SD3Transformer2DModel:
    """Joint attention over image and text; the second block has an image-only attention beside it."""
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def sd3_calls() -> list[Call]:
    return [
        Call(
            step,
            t,
            {
                "hidden_states": noise(2, 4, 8, 8, seed=step),
                "timestep": torch.tensor([t, t]),
                "encoder_hidden_states": noise(2, 5, 24, seed=7),
                "pooled_projections": noise(2, 16, seed=8),
            },
        )
        for step, t in enumerate((900.5, 300.25))
    ]


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def flux_calls() -> list[Call]:
    return [
        Call(
            step,
            t,
            {
                "hidden_states": noise(2, 16, 4, seed=step),
                "timestep": torch.tensor([t, t]),
                "encoder_hidden_states": noise(2, 5, 24, seed=7),
                "pooled_projections": noise(2, 16, seed=8),
                "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
                "txt_ids": torch.zeros(5, 3),
            },
        )
        for step, t in enumerate((0.9, 0.3))
    ]


PICTURES = [picture(0), picture(1)]
TEXT = PROMPTS[:2]
VIDEO = SAMPLING.model_copy(update={"arguments": {"num_frames": 3}, "height": 16, "width": 16})

FAMILIES: dict[str, Family] = {
    "sd1": Family(tiny_pipeline, TEXT, attention_and(7, resnet=11)),
    "sd2": Family(
        lambda: tiny_pipeline(use_linear_projection=True, attention_head_dim=(1, 2, 4), upcast_attention=True),
        TEXT,
        attention_and(7, resnet=11),
    ),
    # Twice the steps: its smallest level has four tokens, and fewer than a layer's dimensions would leave the least
    # squares without a solution of its own.
    "sdxl": Family(
        xl, TEXT, attention_and(2 + 3 + 3 + 2 * 3 + 2 * 2, resnet=11), sampling=SAMPLING.model_copy(update={"steps": 4})
    ),
    "cut-down": Family(
        lambda: tiny_pipeline(
            **TWO_LEVELS,
            mid_block_type=None,
            transformer_layers_per_block=[2, 1],
            reverse_transformer_layers_per_block=[1, [1, 3]],
        ),
        TEXT,
        attention_and(2 + 1 + 3, resnet=6),
    ),
    "inpainting": Family(
        inpainting,
        [{"prompt": p, "image": i, "mask_image": i.convert("L")} for p, i in zip(TEXT, PICTURES, strict=True)],
        attention_and(4, resnet=8),
        sampling=SAMPLING.model_copy(update={"arguments": {"strength": 1.0}, "height": 16, "width": 16}),
    ),
    "instruct-pix2pix": Family(
        instruct_pix2pix,
        [{"prompt": p, "image": i} for p, i in zip(TEXT, PICTURES, strict=True)],
        attention_and(4, resnet=8),
    ),
    "unconditional": Family(unconditional, [{}, {}], {"query_key": 4, "value_output": 4, "resnet": 8}),
    "motion": Family(animate, TEXT, attention_and(4 + 7, resnet=8), sampling=VIDEO),
    "text-to-video": Family(text_to_video, TEXT, attention_and(9, resnet=8), sampling=VIDEO),
    "image-to-video": Family(
        image_to_video,
        [{"image": i} for i in PICTURES],
        attention_and(3 * 4, 4 * 4, resnet=5),
        {
            "TemporalResnetBlock is a resnet class of its own": 8,
            "the inner norm has one channel per group: none can go": 3,
        },
        sampling=VIDEO.model_copy(update={"arguments": {"num_frames": 3, "max_guidance_scale": 2.0}}),
    ),
    "dit": Family(dit, [{"class_labels": 3}, {"class_labels": 5}], attention_and(2, 2)),
    "pixart": Family(
        pixart,
        [text_embeddings(0), text_embeddings(1)],
        attention_and(2),
        sampling=SAMPLING.model_copy(
            update={"arguments": {"negative_prompt": None, "use_resolution_binning": False}, "height": 16, "width": 16}
        ),
    ),
    "hunyuan": Family(
        hunyuan,
        [],
        {"feed_forward": 2},
        {"queries and keys are normalised (qk-norm); rotary positions turn queries and keys": 4},
        calls=hunyuan_calls,
    ),
    "sd3": Family(
        sd3,
        [],
        {"feed_forward": 3},
        {
            "added key and value projections; queries and keys are normalised (qk-norm)": 2,
            "queries and keys are normalised (qk-norm)": 1,
        },
        calls=sd3_calls,
    ),
    "flux": Family(
        flux,
        [],
        {"feed_forward": 2},
        {
            f"FluxAttention is an attention class of its own; {added}queries and keys are normalised (qk-norm); "
            "rotary positions turn queries and keys": 1
            for added in ("added key and value projections; ", "")
        },
        calls=flux_calls,
    ),
}
