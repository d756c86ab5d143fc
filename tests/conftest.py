"""Real pipelines of tiny configuration, shared by the tests."""

from __future__ import annotations

import copy
import os
from pathlib import Path

# Each test process has a core of its own, or its threads wait for the others'. Before torch counts cores.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from slimdiff import Budget, CalibrationSettings, Compression, PlanSettings, Sampling, compress, show_progress
from slimdiff.schedule import make_schedule

show_progress(False)

PROMPTS = [
    "a large red circle top left, on a gray background",
    "a small blue star bottom right, on a navy background",
    "a small green ring top right, a large white cross bottom left, on a black background",
    "a large yellow triangle bottom left, on a brown background",
]
SAMPLING = Sampling(steps=4, batch=2, guidance=3.0, seed=1)
BOTH = make_schedule(3, 6, guidance_interval=(0.0, 0.5), deep_every=2)
"""A schedule of the tiny pipeline: guidance in the first half, the whole network in every second step."""
TOKENIZER = Path(__file__).parent.parent / "slimdiff" / "embedded" / "model" / "tokenizer"


def tiny_unet(**changes) -> UNet2DConditionModel:
    """Three levels, two of them with transformer blocks, two heads of 32 dimensions where there are any."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes}).eval()


def tiny_pipeline(**changes) -> StableDiffusionPipeline:
    """A random Stable Diffusion of the smallest size, with the embedded model's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(1)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=tiny_unet(**changes),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="session")
def calibration() -> CalibrationSettings:
    return CalibrationSettings(samples=4, sampling=SAMPLING)


@pytest.fixture(scope="session")
def compression(pipeline, calibration) -> Compression:
    """The tiny pipeline with a tenth of its denoiser gone, by the default allocation."""
    return compress(pipeline, PROMPTS, Budget("10%"), calibration=calibration, planning=PlanSettings(align=4))


@pytest.fixture(scope="session")
def slim_directory(compression, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slim")
    compression.pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def fresh_pipeline(pipeline) -> StableDiffusionPipeline:
    """A copy that a test may change."""
    return copy.deepcopy(pipeline)
