"""Transformers of 2024 to 2026: joint attention, rotary positions, gated perceptrons, blocks of a single stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from families.family import Family, noise
from slimdiff.denoising.trajectory import Call

ALONE = "values alone are slimmed: "
NORMED = "queries and keys are normalised (qk-norm)"
ROTARY = "rotary positions turn queries and keys"
ADDED = "added key and value projections"


def lumina2() -> nn.Module:
    """Two heads of values for four of queries."""
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=16,
    ).eval()


def sana() -> nn.Module:
    """Linear attention, and perceptrons of 1x1 and depthwise convolutions."""
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
    ).eval()


def auraflow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    ).eval()


def qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    ).eval()


def cogview4() -> nn.Module:
    return diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    ).eval()


def flux2() -> nn.Module:
    """Queries, keys, values and both halves of a gated perceptron out of one linear."""
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


def calls_of(arguments: Callable[[int], dict[str, Any]], times: tuple[float, float] = (900.0, 300.0)) -> list[Call]:
    return [Call(step, t, arguments(step) | {"timestep": torch.tensor([t, t])}) for step, t in enumerate(times)]


def _of_latents(width: int, **more: Any) -> list[Call]:
    return calls_of(
        lambda step: {
            "hidden_states": noise(2, 4, 8, 8, seed=step),
            "encoder_hidden_states": noise(2, 5, width, seed=7),
            **more,
        }
    )


def lumina2_calls() -> list[Call]:
    mask = torch.ones(2, 5, dtype=torch.bool)
    return [
        Call(c.step, c.timestep / 1000, c.arguments | {"timestep": c.arguments["timestep"] / 1000})
        for c in _of_latents(16, encoder_attention_mask=mask)
    ]


def qwen_image_calls() -> list[Call]:
    return calls_of(
        lambda step: {
            "hidden_states": noise(2, 16, 4, seed=step),
            "encoder_hidden_states": noise(2, 5, 24, seed=7),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
        (0.9, 0.3),
    )


def z_image_calls() -> list[Call]:
    """Images and texts are lists there."""
    texts = list(noise(2, 5, 24, seed=7))
    return [
        Call(step, t, {"x": list(noise(2, 4, 1, 8, 8, seed=step)), "t": torch.tensor([t, t]), "cap_feats": texts})
        for step, t in enumerate((0.1, 0.7))
    ]


def cogview4_calls() -> list[Call]:
    pair = torch.tensor([[64.0, 64.0]] * 2)
    return _of_latents(24, original_size=pair, target_size=pair, crop_coords=torch.zeros(2, 2))


def flux2_calls() -> list[Call]:
    return calls_of(
        lambda step: {
            "hidden_states": noise(2, 16, 4, seed=step),
            "encoder_hidden_states": noise(2, 5, 24, seed=7),
            "guidance": torch.tensor([3.0, 3.0]),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)),
            "txt_ids": torch.zeros(5, 4),
        },
        (0.9, 0.3),
    )


def _only(kind: str) -> str:
    return f"{kind} is an attention class of its own; "


NEWER: dict[str, Family] = {
    "lumina2": Family(
        lumina2,
        [],
        {"feed_forward": 3, "values": 3},
        {f"{ALONE}{NORMED}; {ROTARY}; fewer key and value heads than query heads": 3},
        calls=lumina2_calls,
    ),
    "sana": Family(
        sana,
        [],
        {"feed_forward": 2, "values": 4},
        {
            f"{ALONE}its processor {name} may do more than softmax attention": 2
            for name in ("SanaLinearAttnProcessor2_0", "SanaAttnProcessor2_0")
        },
        calls=lambda: _of_latents(24),
    ),
    "auraflow": Family(
        auraflow,
        [],
        {"feed_forward": 3, "values": 2},
        {f"{ALONE}{ADDED}; {NORMED}": 1, f"{ALONE}{NORMED}": 1},
        calls=lambda: _of_latents(24),
    ),
    "qwen-image": Family(
        qwen_image,
        [],
        {"feed_forward": 4, "values": 2},
        {f"{ALONE}{ADDED}; {NORMED}; {ROTARY}": 2},
        calls=qwen_image_calls,
    ),
    "z-image": Family(
        z_image,
        [],
        {"feed_forward": 3, "values": 3},
        {f"{ALONE}{NORMED}; {ROTARY}": 3},
        calls=z_image_calls,
    ),
    "cogview4": Family(
        cogview4, [], {"feed_forward": 2, "values": 2}, {f"{ALONE}{NORMED}; {ROTARY}": 2}, calls=cogview4_calls
    ),
    "flux2": Family(
        flux2,
        [],
        {"feed_forward": 3, "values": 1},
        {
            f"{ALONE}{_only('Flux2Attention')}{ADDED}; {NORMED}; {ROTARY}": 1,
            f"{_only('Flux2ParallelSelfAttention')}{NORMED}; {ROTARY}": 1,
        },
        calls=flux2_calls,
    ),
}
