"""Tiny ControlNets and T2I-Adapters that do something: a new one's last convolutions are zero, and all would agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


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


def save_ip_adapter(unet: Any, folder: Path, plus: bool = False) -> Path:
    """An IP-Adapter's file, with a tiny image encoder beside it; `plus`: one that takes hidden states."""
    torch.manual_seed(0)
    text = unet.config.cross_attention_dim
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**vision.to_dict(), "projection_dim": 20}))
    encoder.save_pretrained(folder / "image_encoder")
    shapes = {"proj.weight": (4 * text, 20), "proj.bias": (4 * text,), "norm.weight": (text,), "norm.bias": (text,)}
    if plus:
        shapes = {"latents": (1, 4, 64), "proj_in.weight": (64, 24), "proj_out.weight": (text, 64)}
        inside = {"0.to_q": (64, 64), "0.to_kv": (128, 64), "0.to_out": (64, 64), "1.1": (256, 64), "1.3": (64, 256)}
        shapes |= {f"layers.{i}.{name}.weight": shape for i in range(4) for name, shape in inside.items()}
        named = {"proj_in": 64, "proj_out": text, "norm_out": text}
        shapes |= {f"{name}.bias": (size,) for name, size in named.items()} | {"norm_out.weight": (text,)}
        norms = [f"layers.{i}.{norm}" for i in range(4) for norm in ("0.norm1", "0.norm2", "1.0")]
        shapes |= {f"{norm}.{part}": (64,) for norm in norms for part in ("weight", "bias")}
    weights = {f"image_proj.{name}": torch.randn(shape) for name, shape in shapes.items()}
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, layer in enumerate(layers):
        for kind in ("k", "v"):
            shape = getattr(unet.get_submodule(layer.removesuffix(".processor")), f"to_{kind}").weight.shape
            weights[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = torch.randn(shape)
    save_file(weights, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"
