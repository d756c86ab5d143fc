"""Models in another dtype than the one that they are held in: what is measured is computed in float32.

Half arithmetic is slow on a CPU and rounds what statistics add up, and diffusers' pipelines cannot be called with
components of different dtypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimdiff.errors import InputError

M = TypeVar("M", bound=nn.Module)


def in_float32(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline itself if it computes in float32, or in one half dtype on a GPU; else one like it in float32.

    Models that are in float32 are shared with it, the others are copies.
    """
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    dtypes = {name: {t.dtype for t in floats(part)} for name, part in models.items()}
    # What is offloaded, on `meta`, is cast layer by layer.
    on_cpu = any(t.device.type in ("cpu", "meta") for part in models.values() for t in floats(part))
    if set().union(*dtypes.values()) <= {torch.float32} or (
        not on_cpu and len({getattr(part, "dtype", None) for part in models.values()}) == 1
    ):
        return pipeline
    other = copy.copy(pipeline)
    halves = {name: part for name, part in models.items() if not dtypes[name] <= {torch.float32}}
    other.register_modules(**{name: cast(part, lambda _: torch.float32) for name, part in halves.items()})
    return other


def in_dtype(pipeline: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline like this one whose models are in that dtype; what their classes keep in float32 on purpose stays so.

    Raises:
        InputError: if fp16 does not hold a weight.
    """
    other = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            kept = set(getattr(part, "_keep_in_fp32_modules", None) or ())
            named = [*part.named_parameters(), *part.named_buffers()]
            wide = {id(t) for path, t in named if not kept.isdisjoint(path.split("."))}
            model = cast(part, lambda t, wide=wide: torch.float32 if id(t) in wide else dtype)  # type: ignore[misc]
            refuse_overflow(model, name)
            other.register_modules(**{name: model})
    return other


def refuse_overflow(model: nn.Module, name: str) -> None:
    """Refuse a component whose weights in fp16 are not finite.

    Raises:
        InputError: naming the first of them.
    """
    for path, tensor in model.named_parameters():
        if tensor.dtype == torch.float16 and tensor.isinf().any():
            raise InputError(f"the {name}'s {path} has values that fp16 does not hold: write it in bf16 or fp32")


def held_like(module: M, other: nn.Module) -> M:
    """The module with each weight in the dtype of the other's of that name; the module itself if they are in it."""
    dtypes = {name: t.dtype for part in (other.named_parameters(), other.named_buffers()) for name, t in part}
    own = {id(t): dtypes[name] for part in (module.named_parameters(), module.named_buffers()) for name, t in part}
    tensors = floats(module)
    return module if all(t.dtype == own[id(t)] for t in tensors) else cast(module, lambda t: own[id(t)])


def cast(module: M, dtype: Callable[[Tensor], torch.dtype]) -> M:
    """A copy whose floating-point tensors are in the dtype that the function gives for each.

    The copy is never in the old dtype, so that half precision costs half the module's memory and not one and a half.
    """
    return copy.deepcopy(module, memo={id(t): _cast(t, dtype(t)) for t in floats(module)})


def floats(module: nn.Module) -> list[Tensor]:
    """The floating-point parameters and buffers; empty ones stand for weights that are held by another runtime."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.numel()]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    new = tensor.detach().to(dtype)
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
