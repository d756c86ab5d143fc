"""Tiny ControlNets and T2I-Adapters that do something: a new one's last convolutions are zero, and all would agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image


def make_controlnet(unet: Any, seed: int = 0, **config: Any) -> ControlNetModel:
    """For a UNet, and a VAE of two pixels a latent."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32), load_weights_from_unet=False)
    if config:
        net = ControlNetModel.from_config(net.config, **config)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return net.eval()


def make_adapter(channels: tuple[int, ...], seed: int = 0, **config: Any) -> T2IAdapter:
    """For a UNet of these blocks, and a VAE of two pixels a latent."""
    torch.manual_seed(seed)
    given = {"downscale_factor": 2, "num_res_blocks": 1, "channels": channels}
    return T2IAdapter(**{**given, **config}).eval()


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
