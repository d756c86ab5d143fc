"""A compact calibration set: few prompts that stand for many, chosen by their text embeddings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import normalize

from slimdiff.errors import InputError
from slimdiff.progress import bar
from slimdiff.prompts import check_inputs

log = logging.getLogger("slimdiff")
# No tokenizer needs more for a prompt; some of them name no limit of their own.
_MOST_TOKENS = 512


@torch.no_grad()
def embed(pipeline: DiffusionPipeline, prompts: Sequence[str], *, batch: int = 64) -> Tensor:
    """Text embeddings by the pipeline's own text encoders, `[N, D]`, float32 on the CPU.

    Of each encoder: the mean of the last hidden states over the prompt's own tokens, scaled to length 1. Several
    encoders stand side by side, so D is the sum of their widths.

    Raises:
        InputError: if the pipeline has no text encoder.
    """
    named = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3"))
    pairs: list[list[Any]] = [[getattr(pipeline, name, None) for name in names] for names in named]
    encoders = [pair for pair in pairs if None not in pair]
    if not encoders:
        raise InputError(f"{type(pipeline).__name__} has no text encoder: name a model that takes prompts")
    prompts = [str(prompt) for prompt in check_inputs(prompts)]
    parts = []
    with bar(name="embed", unit="prompt", total=len(prompts) * len(encoders)) as done:
        for tokenizer, encoder in encoders:
            rows, longer, limit = [], 0, min(tokenizer.model_max_length, _MOST_TOKENS)
            for start in range(0, len(prompts), batch):
                chunk = list(prompts[start : start + batch])
                longer += sum(len(ids) > limit for ids in tokenizer(chunk, verbose=False).input_ids)
                tokens = tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
                mask = tokens.attention_mask.to(encoder.device)
                hidden = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask).last_hidden_state.float()
                own = mask[:, :, None]
                rows.append(normalize((hidden * own).sum(1) / own.sum(1)).cpu())
                done.update(len(chunk))
            parts.append(torch.cat(rows))
            if longer:
                log.warning("%d of %d prompts are judged by their first %d tokens", longer, len(prompts), limit)
    return torch.cat(parts, 1)


def select(embeddings: Tensor, count: int) -> list[int]:
    """Indices of `count` rows whose first and second moments are close to those of all rows, the most telling first.

    Calibration takes nothing but second moments from prompts, so a few prompts stand for many if they have the moments
    of the many. Rows are taken one by one, each time the one that leaves the least distance between the moments of the
    taken and of all: kernel herding (Chen, Welling & Smola 2010) with `k(x, y) = (1 + x.y)^2`, for which distances of
    mean embeddings are distances of moments. After t rows the next maximises
    `E_y k(x, y) - (sum_s k(x, x_s) + k(x, x) / 2) / (t + 1)`.
    Nothing is random, and the first n of more are what is selected if n are asked for.

    Args:
        embeddings: `[N, D]`; costs O(N D^2 + count N D).

    Raises:
        InputError: if there are fewer rows than are asked for, or none is asked for.
    """
    if not 1 <= count <= len(embeddings):
        raise InputError(f"{count} prompts cannot be selected from {len(embeddings)}: ask for 1 to {len(embeddings)}")
    rows = _standard(embeddings)
    closeness = (rows @ _second_moment(rows) * rows).sum(1)
    taken = rows.square().sum(1).square() / 2
    chosen: list[int] = []
    for step in range(count):
        score = closeness - taken / (step + 1)
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
        taken += (rows @ rows[chosen[-1]]).square()
    return chosen


def moment_error(embeddings: Tensor, chosen: Sequence[int]) -> float:
    """Relative Frobenius distance of the chosen rows' moments from those of all rows: 0 if they are the same."""
    rows = _standard(embeddings)
    everything = _second_moment(rows)
    return float((_second_moment(rows[list(chosen)]) - everything).norm() / everything.norm())


def _standard(embeddings: Tensor) -> Tensor:
    """Rows about their mean, of length 1 in the root mean square, after a constant 1 that stands for first moments."""
    rows = embeddings - embeddings.mean(0)
    scale = rows.square().sum(1).mean().sqrt().clamp(min=1e-12)
    return torch.cat([torch.ones(len(rows), 1), rows / scale], 1)


def _second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)
