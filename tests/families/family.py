"""What a family is, and what their members are made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import PROMPTS
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
)
from PIL import Image
from torch import nn

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
    """Counts of sites by group; attention layers are two a feed-forward if not given."""
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


PICTURES = [picture(0), picture(1)]
TEXT = PROMPTS[:2]
