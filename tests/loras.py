"""LoRA files of tiny pipelines, in the layouts that people have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Deltas = dict[tuple[str, str], Tensor]
"""What a LoRA adds, by component and path of the layer."""
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def layers(pipeline: Any, components: tuple[str, ...], chosen: Callable[[str], bool]) -> Iterator[tuple[str, str, Any]]:
    for component in components:
        for path, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and chosen(path):
                yield component, path, layer


def pair(layer: nn.Module, rank: int, noise: torch.Generator, size: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Up, down, and their product in the layer's shape."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    up = size * torch.randn(weight.shape[0], rank, *([1, 1] if weight.ndim == 4 else []), generator=noise)
    down = torch.randn(rank, *weight.shape[1:], generator=noise)
    return up, down, (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def kohya(
    pipeline: Any,
    file: Path,
    chosen: Callable[[str], bool],
    components: tuple[str, ...] = ("unet", "text_encoder"),
    alphas: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Deltas:
    """A network of kohya's, each layer with a rank and an alpha of its own."""
    noise, state, deltas = torch.Generator().manual_seed(0), {}, {}
    for number, (component, path, layer) in enumerate(layers(pipeline, components, chosen)):
        rank, alpha = 2 + number % 3, (1.0, 2.0, 4.0, 3.0)[number % 4]
        up, down, delta = pair(layer, rank, noise)
        inside = "" if component == "unet" or path.startswith("text_model") else "text_model."
        name = KOHYA[component] + f"{inside}{path}".replace(".", "_")
        state |= {f"{name}.lora_up.weight": up.to(dtype), f"{name}.lora_down.weight": down.to(dtype)}
        if alphas:
            state[f"{name}.alpha"] = torch.tensor(alpha)
        deltas[component, path] = delta * (alpha / rank if alphas else 1)
    save_file(state, file)
    return deltas


def peft_layout(
    pipeline: Any, file: Path, chosen: Callable[[str], bool], components: tuple[str, ...] = ("unet",), **how: Any
) -> Deltas:
    """A file as `save_lora_weights` writes it, without a configuration: every scale is 1."""
    noise, state, deltas = torch.Generator().manual_seed(how.get("seed", 0)), {}, {}
    for component, path, layer in layers(pipeline, components, chosen):
        up, down, delta = pair(layer, how.get("rank", 4), noise, how.get("size", 0.1))
        state |= {f"{component}.{path}.lora_A.weight": down, f"{component}.{path}.lora_B.weight": up}
        deltas[component, path] = delta
    save_file(state, file)
    return deltas
