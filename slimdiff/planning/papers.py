"""How much each block changes its input: the score of the papers' allocation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch.nn.functional import cosine_similarity

from slimdiff.denoising.trajectory import Call, predict
from slimdiff.progress import bar


@torch.no_grad()
def block_influences(denoiser: nn.Module, paths: Sequence[str], calls: Sequence[Call]) -> list[float]:
    """Block influence per layer: 1 - E[cos(x, y)] over the tokens of a block's input and output (MoDeGPT).

    A layer's block is the transformer block that it is part of, else the layer itself.
    """
    blocks = [_block(denoiser, path) for path in paths]
    sums: dict[str, list[float]] = {block: [] for block in blocks}

    def hook(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        channels = 1 if before.ndim == 4 else -1  # pictures [B, C, H, W], else tokens [B, T, C]
        sums[name].append(float(1 - cosine_similarity(before.float(), after.float(), dim=channels).mean()))

    with ExitStack() as stack:
        for block in sums:
            module = denoiser.get_submodule(block)
            stack.enter_context(module.register_forward_hook(partial(hook, block), with_kwargs=True))
        for call in bar(calls, "block influences", "call"):
            predict(denoiser, call)
    return [sum(sums[block]) / max(1, len(sums[block])) for block in blocks]


def _block(denoiser: nn.Module, path: str) -> str:
    parent = path.rpartition(".")[0]
    return parent if parent and isinstance(denoiser.get_submodule(parent), BasicTransformerBlock) else path
