"""Transformers that make videos: bare denoisers, calls made by hand."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from families.family import Family, noise
from families.newer_transformers import ALONE, NORMED, ROTARY, calls_of


def wan() -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()


def ltx() -> torch.nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=24,
    ).eval()


def cogvideox() -> torch.nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
    ).eval()


def _of_videos(**more: Any) -> Any:
    def made(step: int) -> dict[str, Any]:
        return {"hidden_states": noise(2, 4, 2, 8, 8, seed=step), "encoder_hidden_states": noise(2, 5, 24, seed=7)}

    return lambda: calls_of(lambda step: made(step) | more)


def _ltx_calls() -> Any:
    more = {"encoder_attention_mask": torch.ones(2, 5), "num_frames": 2, "height": 4, "width": 4}
    return calls_of(
        lambda step: {
            "hidden_states": noise(2, 32, 4, seed=step),
            "encoder_hidden_states": noise(2, 5, 24, seed=7),
            **more,
        }
    )


def _cogvideox_calls() -> Any:
    return calls_of(
        lambda step: {
            "hidden_states": noise(2, 2, 4, 8, 8, seed=step),
            "encoder_hidden_states": noise(2, 5, 24, seed=7),
        }
    )


VIDEO_TRANSFORMERS: dict[str, Family] = {
    "wan": Family(
        wan,
        [],
        {"feed_forward": 1, "values": 2},
        {f"{ALONE}WanAttention is an attention class of its own; {NORMED}; {ROTARY}": 2},
        calls=_of_videos(),
    ),
    "ltx": Family(
        ltx,
        [],
        {"feed_forward": 1, "values": 2},
        {f"{ALONE}LTXAttention is an attention class of its own; {NORMED}; {ROTARY}": 2},
        calls=_ltx_calls,
    ),
    "cogvideox": Family(
        cogvideox, [], {"feed_forward": 1, "values": 1}, {f"{ALONE}{NORMED}; {ROTARY}": 1}, calls=_cogvideox_calls
    ),
}
