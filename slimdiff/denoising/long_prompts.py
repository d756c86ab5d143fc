"""Prompts that are longer than CLIP takes: encoded in chunks, whose embeddings stand one behind the other.

diffusers cuts such prompts. Web UIs encode 75 tokens at a time, each with a begin and an end, and cross attention takes
any number of tokens. So it is done here, for pipelines whose text encoders are CLIP's. What is cut all the same is
said.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimdiff.prompts import Inputs
from slimdiff.settings import Sampling

log = logging.getLogger("slimdiff")
_ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_PIXEL_T5 = 77
"""Tokens that DeepFloyd's pipelines, whose UNet is T5's, cut prompts to, whatever the tokenizer says."""
_NO_LIMIT = 100_000
"""Tokenizers without one say some such number."""


def encode_long_prompts(pipeline: Any, inputs: Mapping[str, Any], takes: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call with embeddings in the place of prompts, if one of these is too long; else as they are.

    Args:
        inputs: arguments of the pipeline's call, `prompt` and `negative_prompt` as lists of texts.
        takes: the parameters of the call.

    Returns:
        for Stable Diffusion `prompt_embeds [B, 77 n, D]` and `negative_prompt_embeds` of the same shape, for SDXL
        `pooled_prompt_embeds [B, E]` and their negative ones too, which are of the first chunk.
    """
    prompts, given = inputs.get("prompt"), dict(inputs)
    parts = _chunked(pipeline, takes, inputs)
    if not isinstance(prompts, list) or not parts:
        return given
    negative = inputs.get("negative_prompt") or [""] * len(prompts)
    longest = max(_chunks(tokenizer, text) for tokenizer, _ in parts for text in [*prompts, *negative])
    if longest == 1:
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


def by_length(
    pipeline: Any, prompts: Sequence[Inputs], numbers: Sequence[int], sampling: Sampling
) -> list[Sequence[int]]:
    """The numbers of a batch in parts whose prompts take as many chunks each, the shortest first.

    A prompt in more chunks than it takes makes another image: what is in a batch with it must not decide on that.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    parts: dict[int, list[int]] = {}
    for number in numbers:
        row = _row(prompts[number], sampling)
        counts = [_chunks(t, text) for t, _ in _chunked(pipeline, takes, row) for text in _texts(row)]
        parts.setdefault(max(counts, default=1), []).append(number)
    return [parts[count] for count in sorted(parts)]


def warn_of_cuts(pipeline: Any, prompts: Sequence[Inputs], sampling: Sampling) -> None:
    """Warn where the pipeline cuts prompts, saying how many, after how many tokens, and how to have them whole."""
    takes = inspect.signature(pipeline.__call__).parameters
    rows = [_row(one, sampling) for one in prompts]
    whole = _chunked(pipeline, takes, rows[0]) if rows else []
    if whole and sampling.whole_prompts:
        return
    cut: dict[str, int] = {}
    for name in _TOKENIZERS:
        tokenizer = getattr(pipeline, name, None)
        limit = _limit(pipeline, tokenizer, takes, sampling) if tokenizer is not None else _NO_LIMIT
        longer = limit < _NO_LIMIT and sum(any(_length(tokenizer, t) > limit for t in _texts(row)) for row in rows)
        if longer:
            cut[f"{longer} by its {name} after {limit} tokens"] = longer
    if cut:
        remedy = (
            ", or encode them in chunks (--whole-prompts; in a recipe, whole_prompts of a sampling)" if whole else ""
        )
        if "max_sequence_length" in takes:
            remedy = ", or say how many it takes (--argument max_sequence_length=N)"
        log.warning(
            "of %d prompts %s cuts %s: shorten them%s",
            *(len(rows), type(pipeline).__name__, " and ".join(cut), remedy),
        )


def _row(inputs: Inputs, sampling: Sampling) -> dict[str, Any]:
    own = {"prompt": inputs} if isinstance(inputs, str) else dict(inputs)
    return {**sampling.arguments, **own}


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    return (row[name] for name in ("prompt", "negative_prompt") if isinstance(row.get(name), str))


def _limit(pipeline: Any, tokenizer: Any, takes: Mapping[str, Any], sampling: Sampling) -> int:
    """Tokens of a prompt, with those that the tokenizer adds, after which the pipeline cuts it."""
    own = int(tokenizer.model_max_length)
    if type(tokenizer).__name__.startswith("CLIPTokenizer"):
        return own
    if "max_sequence_length" in takes:
        said = sampling.arguments.get("max_sequence_length", takes["max_sequence_length"].default)
        return said if isinstance(said, int) else own
    if type(tokenizer).__name__.startswith("T5Tokenizer") and getattr(pipeline, "unet", None) is not None:
        return _PIXEL_T5
    return own


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


def _chunked(pipeline: Any, takes: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The tokenizers and encoders of a pipeline that takes embeddings of several chunks; none of any other."""
    parts = [(getattr(pipeline, t, None), getattr(pipeline, e, None)) for t, e in _ENCODERS]
    parts = [(tokenizer, encoder) for tokenizer, encoder in parts if tokenizer is not None and encoder is not None]
    of_clip = all(map(_is_clip, parts)) and getattr(pipeline, "unet", None) is not None
    other = "prompt_embeds" not in takes or inputs.get("prompt_2") or inputs.get("clip_skip")
    return parts if of_clip and not other else []


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
