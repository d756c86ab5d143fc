"""How much each block changes what goes through it: the score of the papers' allocation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from slimdiff.denoising.hooks import watching
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.progress import bar


@torch.no_grad()
def block_influences(denoiser: nn.Module, paths: Sequence[str], calls: Sequence[Call]) -> list[float]:
    """Block influence per layer: 1 - E[cos(x, y)] over the tokens of a block's input and output (MoDeGPT).

    A layer's block is the transformer block that it is part of, else the layer itself.

    Args:
        paths: module paths of the layers.
        calls: recorded denoiser calls.
    """
    blocks = [_block(denoiser, path) for path in paths]
    sums: dict[str, list[float]] = {block: [] for block in blocks}

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        sums[name].append(float(1 - _cosine(before, after)))

    with watching() as hooks:
        for block in sums:
            hooks.after(denoiser.get_submodule(block), partial(see, block))
        for call in bar(calls, "block influences", "call"):
            predict(denoiser, call)
    return [sum(sums[block]) / max(1, len(sums[block])) for block in blocks]


def _block(denoiser: nn.Module, path: str) -> str:
    parent = path.rpartition(".")[0]
    return parent if parent and isinstance(denoiser.get_submodule(parent), BasicTransformerBlock) else path


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    channels = 1 if before.ndim == 4 else -1  # pictures [B, C, H, W], else tokens [B, T, C]
    return torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=channels).mean()
