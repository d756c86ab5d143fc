"""Prompts that are longer than CLIP takes: encoded in chunks, whose embeddings stand one behind the other.

diffusers cuts such prompts. Web UIs encode 75 tokens at a time, each with a begin and an end, and cross attention takes
any number of tokens. So it is done here, for pipelines whose text encoders are CLIP's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


def encode_long_prompts(pipeline: Any, inputs: Mapping[str, Any], takes: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call with embeddings in the place of prompts, if one of these is too long; else as they are.

    Args:
        inputs: arguments of the pipeline's call, `prompt` and `negative_prompt` as lists of texts.
        takes: the parameters of the call.

    Returns:
        for Stable Diffusion `prompt_embeds [B, 77 n, D]` and `negative_prompt_embeds` of the same shape, for SDXL
        `pooled_prompt_embeds [B, E]` and their negative ones too, which are of the first chunk.
    """
    parts = [(getattr(pipeline, t, None), getattr(pipeline, e, None)) for t, e in _ENCODERS]
    parts = [(tokenizer, encoder) for tokenizer, encoder in parts if tokenizer is not None and encoder is not None]
    prompts, given = inputs.get("prompt"), dict(inputs)
    of_clip = bool(parts) and all(map(_is_clip, parts)) and getattr(pipeline, "unet", None) is not None
    if "prompt_embeds" not in takes or not isinstance(prompts, list) or not of_clip:
        return given
    negative = inputs.get("negative_prompt") or [""] * len(prompts)
    longest = max(_chunks(tokenizer, text) for tokenizer, _ in parts for text in [*prompts, *negative])
    if longest == 1 or inputs.get("prompt_2") or inputs.get("clip_skip"):
        return given
    pooled = "pooled_prompt_embeds" in takes
    for name, texts in (("prompt", prompts), ("negative_prompt", negative)):
        said, summaries = zip(*(_encode(*part, texts, longest, pooled) for part in parts), strict=True)
        embeds, summary = torch.cat(said, -1), summaries[-1]
        unsaid = name == "negative_prompt" and not inputs.get(name)
        if pooled and unsaid and pipeline.config.get("force_zeros_for_empty_prompt"):
            embeds, summary = torch.zeros_like(embeds), torch.zeros_like(summary)
        summarised = "negative_pooled_prompt_embeds" if name == "negative_prompt" else "pooled_prompt_embeds"
        given |= {key: v for key, v in ((f"{name}_embeds", embeds), (summarised, summary)) if key in takes}
        given.pop(name, None)
    return given


def _is_clip(part: tuple[Any, Any]) -> bool:
    return type(part[0]).__name__.startswith("CLIPTokenizer") and part[0].model_max_length < 1000


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _chunks(tokenizer: Any, text: str) -> int:
    return max(1, -(-len(_ids(tokenizer, text)) // (tokenizer.model_max_length - 2)))


@torch.no_grad()
def _encode(tokenizer: Any, encoder: Any, texts: Sequence[str], chunks: int, pooled: bool) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, L n, D]` of texts in that many chunks, and what the encoder gives first of the first chunk."""
    length = tokenizer.model_max_length
    rows = []
    for text in texts:
        ids = _ids(tokenizer, text)
        for start in range(0, chunks * (length - 2), length - 2):
            part = [tokenizer.bos_token_id, *ids[start : start + length - 2], tokenizer.eos_token_id]
            rows.append(part + [tokenizer.pad_token_id] * (length - len(part)))
    found = encoder(torch.tensor(rows).to(encoder.device), output_hidden_states=True)
    states = found.hidden_states[-2] if pooled else found[0]
    return states.reshape(len(texts), chunks * length, -1), found[0].reshape(len(texts), chunks, *found[0].shape[1:])[
        :, 0
    ]
