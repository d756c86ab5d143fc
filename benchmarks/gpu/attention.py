"""Which attention kernel runs, and how fast, by the widths of heads."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import median, timed, without_starts

WIDTHS = (
    (64, 64),
    (64, 48),
    (48, 64),
    (48, 48),
    (44, 44),
    (40, 40),
    (40, 24),
    (24, 24),
    (23, 23),
    (160, 160),
    (160, 96),
)


@torch.no_grad()
def measure_attention(device: str, dtype: torch.dtype, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Per pair of widths (query and key, value): the kernels that take it, its time, and that of padding it.

    Padded: zeros up to one width, a multiple of 8, for both, with the scale of the true one; the result is the same.
    """
    rows = []
    for width, value_width in WIDTHS:
        q, k, v = (torch.randn(2, 8, tokens, w, device=device, dtype=dtype) for w in (width, width, value_width))
        common = -(-max(width, value_width) // 8) * 8

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        def padded(q: Tensor = q, k: Tensor = k, v: Tensor = v, common: int = common) -> Tensor:
            scale = q.shape[-1] ** -0.5
            kept = v.shape[-1]
            q, k, v = (F.pad(x, (0, common - x.shape[-1])) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :kept]

        kernels = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                with sdpa_kernel(backend), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that say why not
                    plain()
                kernels.append(backend.name.removesuffix("_ATTENTION").lower())
            except RuntimeError:  # no kernel of that kind takes these
                continue
        runs = {"plain": without_starts(plain, device), "padded": without_starts(padded, device)}
        times = timed(runs, device, rounds)
        rows.append(
            {
                "query_key": width,
                "value": value_width,
                "kernels": kernels,
                "plain_ms": median(times["plain"]) * 1e3,
                "padded_ms": median(times["padded"]) * 1e3,
                "difference": float((plain().float() - padded().float()).abs().max()),
            }
        )
    return rows
