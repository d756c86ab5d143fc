"""UNets that make images."""

from __future__ import annotations

from conftest import tiny_pipeline, tiny_unet
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
)

from families.family import PICTURES, SAMPLING, TEXT, TWO_LEVELS, Family, attention_and, quiet


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


IMAGES: dict[str, Family] = {
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
}
