"""IP-Adapters: a picture as a prompt, by cross-attention of its own beside the prompt's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from slimdiff.errors import InputError
from slimdiff.loading.components import load_component
from slimdiff.loading.naming import check_weights_file
from slimdiff.loading.weights import find_weights, read_headers
from slimdiff.models import plan_of
from slimdiff.settings import ScaledFile
from slimdiff.storage import manifest

IMAGE_ENCODER = "image_encoder"
"""The folder of CLIP's half for pictures, beside an adapter's file, where the model has none itself."""


def check_ip_adapter(adapter: ScaledFile) -> None:
    """Refuse a file that holds no IP-Adapter, or one of a kind that is not taken, by the names of its tensors.

    Raises:
        InputError: saying what it is.
    """
    path = Path(adapter.file)
    check_weights_file(path, "an IP-Adapter")
    names = read_headers([path])
    if not any(name.startswith("image_proj.") for name in names) or "ip_adapter.1.to_k_ip.weight" not in names:
        raise InputError(f"{path} is no IP-Adapter: it has no tensors image_proj and ip_adapter.1.to_k_ip.weight")
    faces = any(name.startswith("image_proj.perceiver_resampler.") for name in names)
    if faces or "image_proj.norm.weight" in names and "image_proj.proj.weight" not in names:
        raise InputError(f"{path} is a FaceID adapter, which takes what a network for faces gives: it is not taken")


def add_ip_adapter(pipeline: Any, adapter: ScaledFile, dtype: torch.dtype | None = None) -> None:
    """Load an IP-Adapter into a pipeline, with the image encoder that lies beside its file if the pipeline has none.

    Raises:
        InputError: if the pipeline has no place for one, or its UNet or image encoder does not go with it.
    """
    path, name = Path(adapter.file), type(pipeline).__name__
    if not hasattr(pipeline, "load_ip_adapter"):
        raise InputError(f"diffusers' {name} takes no IP-Adapter: leave out {path}")
    weights = load_file(path)
    _check_unet(pipeline, weights, path)
    if pipeline.image_encoder is None:
        pipeline.register_modules(image_encoder=_image_encoder(path.parent / IMAGE_ENCODER, path, dtype))
    _check_encoder(pipeline.image_encoder.config, weights, path)
    parts: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in weights.items():
        part, _, rest = key.partition(".")
        if part in parts:
            parts[part][rest] = tensor.to(pipeline.unet.dtype)
    given: Any = {"subfolder": "", "weight_name": "", "image_encoder_folder": None, "low_cpu_mem_usage": False}
    try:
        pipeline.load_ip_adapter(parts, **given)
    except (RuntimeError, KeyError) as error:  # of tensors that are missing, unknown or of another shape
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} is no whole IP-Adapter: {reason}") from error
    pipeline.unet.eval()
    pipeline.set_ip_adapter_scale(adapter.scale)


def _check_unet(pipeline: Any, weights: dict[str, Any], path: Path) -> None:
    """By the shapes of the layers that stand beside keys and values of the prompt, in diffusers' order."""
    unet, expected = pipeline.unet, {}
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, layer in enumerate(layers):
        for kind in ("k", "v"):
            weight = getattr(unet.get_submodule(layer), f"to_{kind}").weight
            expected[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = tuple(weight.shape)
    have = {name: tuple(tensor.shape) for name, tensor in weights.items() if re.search(r"to_[kv]_ip\.weight$", name)}
    odd = next((name for name in (*expected, *have) if have.get(name) != expected.get(name)), None)
    if odd is None:
        return
    if plan_of(unet) is not None:
        raise InputError(
            f"the model is slim, and {path} is for the dense one's cross-attention, which had more dimensions: add the "
            "IP-Adapter to the dense model"
        )
    raise InputError(
        f"{path} is of another UNet: its {odd} is {have.get(odd)}, and for this model it is {expected.get(odd)}: take "
        "one that was trained for this model"
    )


def _check_encoder(config: Any, weights: dict[str, Any], path: Path) -> None:
    """By the width of what the adapter projects: of CLIP's embedding, or of its last hidden states but one."""
    sides = {
        "proj.weight": config.projection_dim,
        "proj.0.weight": config.hidden_size,
        "proj_in.weight": config.hidden_size,
    }
    for name, its in sides.items():
        if (tensor := weights.get(f"image_proj.{name}")) is not None and tensor.shape[1] != its:
            raise InputError(
                f"{path} takes {tensor.shape[1]} numbers of an image encoder, and the one that is there gives {its}: "
                f"put the {IMAGE_ENCODER} that it was trained with beside it"
            )


def _image_encoder(folder: Path, path: Path, dtype: torch.dtype | None) -> Any:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{path} needs an image encoder, and there is no {config}: put its {IMAGE_ENCODER} beside it")
    content = manifest.read_json(config)
    kind, names = CLIPVisionModelWithProjection, content.get("architectures") if isinstance(content, dict) else None
    if names != [kind.__name__]:
        raise InputError(f"{folder} holds {names}, and a {kind.__name__} is asked for")
    return load_component(folder, kind, find_weights(folder, kind), dtype)
