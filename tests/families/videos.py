"""UNets that make videos."""

from __future__ import annotations

from conftest import tiny_pipeline
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from families.family import PICTURES, SAMPLING, TEXT, TWO_LEVELS, Family, attention_and, quiet


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


VIDEO = SAMPLING.model_copy(update={"arguments": {"num_frames": 3}, "height": 16, "width": 16})

VIDEOS: dict[str, Family] = {
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
}
