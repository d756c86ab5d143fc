"""LoRA and its kin: fused before slimming and recorded, or refused with the reason."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimdiff.errors import InputError


def refuse_adapters(denoiser: nn.Module) -> None:
    """Raises:
    InputError: if adapters are attached: slimming would leave their layers dense, and they would not fit afterwards.
    """
    # What all of PEFT's tuner layers have; PEFT itself need not be installed.
    wrapped = ((path, module) for path, module in denoiser.named_modules() if hasattr(module, "adapter_layer_names"))
    adapted = {path: m for path, m in wrapped if isinstance(getattr(m, "base_layer", None), nn.Module)}
    if not adapted:
        return
    names = sorted({name for module in adapted.values() for name in getattr(module, "active_adapters", ())})
    what = f"the adapter {', '.join(names)}" if names else "an adapter"
    raise InputError(
        f"{what} is attached to {len(adapted)} layers of {type(denoiser).__name__}, the first {next(iter(adapted))}: "
        "fuse it before slimming, with pipe.fuse_lora(); pipe.unload_lora_weights()"
    )


def fused_files(pipeline: Any) -> list[dict[str, Any]]:
    """The LoRA files that were fused when this pipeline was loaded: `file`, `sha256` and `scale` of each."""
    return list(getattr(pipeline, "slimdiff_loras", ()))


def carry_fused(pipeline: Any, other: Any) -> None:
    """Note of another pipeline of the same weights what has been fused into them."""
    for name in ("slimdiff_loras", "_merged_adapters"):
        if hasattr(pipeline, name):
            setattr(other, name, getattr(pipeline, name))


def fused_adapters(pipeline: Any) -> list[str]:
    """Names of the adapters that `fuse_lora` has merged into this pipeline's weights since it was loaded."""
    return sorted(getattr(pipeline, "fused_loras", ()))
