"""LoRA files put into a pipeline's weights, by diffusers and PEFT.

diffusers leaves out what it does not know with no more than a warning, and gives kohya's networks one alpha for all
attention layers (their names change while they are read). So what was attached is held against the file, tensor by
tensor, and scales are set anew from the file's alphas.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor, nn

from slimdiff.calibration.calibrate import weights_hash
from slimdiff.denoising.precision import refuse_overflow
from slimdiff.denoising.trajectory import denoiser_name
from slimdiff.errors import InputError, require
from slimdiff.loading.lora_files import PEFT_METADATA, LoraFile, Update, describe, read_lora, updates_of
from slimdiff.models import plan_of
from slimdiff.settings import Lora

_SHAPES = re.compile(
    r"size mismatch for (?P<layer>\S+?)\.lora_.*?: copying a param with shape (?P<file>.*?) from checkpoint, "
    r"the shape in current model is (?P<model>.*?)\."
)
_SHOWN = 3


class Attached(NamedTuple):
    """A layer's update `scale * up @ down`, as `lora_files.Update` has them."""

    layer: Any
    """PEFT's, in the place of the layer."""
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None


def fuse_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Fuse LoRA files into the weights of a pipeline's denoiser and text encoders, in place, one after another.

    The sums are float32; each weight keeps its dtype. The pipeline's `slimdiff_loras` says what was fused.

    Raises:
        InputError: naming the file, if anything in it does not fit the pipeline, or a weight is not finite afterwards.
        MissingPackageError: if peft is not here.
    """
    files = [(read_lora(Path(lora.file)), lora.scale) for lora in loras]
    require("peft", "lora")
    for file, _ in files:
        _check_slim(pipeline, file)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    before = {f"{name}.{path}": p.dtype for name, path, p in _parameters(models)}
    for name, _, parameter in _parameters(models):
        if name in getattr(pipeline, "_lora_loadable_modules", ()) and parameter.dtype in (torch.half, torch.bfloat16):
            parameter.data = parameter.data.float()
    for file, scale in files:
        with attached(pipeline, file):
            pipeline.fuse_lora(lora_scale=scale)
    for name, path, parameter in _parameters(models):
        parameter.data = parameter.data.to(before[f"{name}.{path}"])
        if not torch.isfinite(parameter).all():
            refuse_overflow(models[name], name)
            raise InputError(f"with {', '.join(lora.file for lora in loras)} the {name}'s {path} is not finite")
    records = [describe(file.path, scale) for file, scale in files]
    pipeline.slimdiff_loras = [*getattr(pipeline, "slimdiff_loras", ()), *records]


def _parameters(models: dict[str, nn.Module]) -> list[tuple[str, str, nn.Parameter]]:
    return [(name, path, p) for name, model in models.items() for path, p in model.named_parameters()]


def _check_slim(pipeline: Any, file: LoraFile) -> None:
    """Refuse what was converted for one slim model in any other."""
    own = file.own.get("slim")
    if own is not None and own != weights_hash(getattr(pipeline, denoiser_name(pipeline))):
        raise InputError(
            f"{file.path} was converted for another slim model (its weights differ): convert the LoRA that it was made "
            "from for this one, with slimdiff lora"
        )


@contextmanager
def attached(pipeline: Any, file: LoraFile) -> Iterator[dict[str, dict[str, Attached]]]:
    """For the length of a block, a LoRA as a PEFT adapter of a pipeline; nothing of it stays but what is fused.

    Yields:
        its layers by component and module path, all that the file has, at its own scales.

    Raises:
        InputError: if a tensor of the file belongs to no layer of the pipeline, or does not fit it.
    """
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    trained = {f"{name}.{path}": p.requires_grad for name, path, p in _parameters(models)}
    try:
        yield _attach(pipeline, file)
    finally:
        if hasattr(pipeline, "unload_lora_weights"):
            pipeline.unload_lora_weights()
        for name, path, parameter in _parameters(models):
            parameter.requires_grad_(trained[f"{name}.{path}"])


def _attach(pipeline: Any, file: LoraFile) -> dict[str, dict[str, Attached]]:
    kind, path = type(pipeline).__name__, file.path
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"{kind} takes no LoRA in diffusers: {path} cannot be fused into it")
    more: dict[str, Any] = {"adapter_name": re.sub(r"\W", "_", path.stem) or "lora", "local_files_only": True}
    if isinstance(pipeline, StableDiffusionLoraLoaderMixin):  # the others look it up themselves
        more["unet_config"] = pipeline.unet.config
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following alpha_pattern keys")  # scales are set below
            pipeline.load_lora_weights(str(path), use_safetensors=True, **more)
        # Networks of transformers may have fused projections, which diffusers takes apart.
        state = {} if hasattr(pipeline, "unet") else pipeline.lora_state_dict(str(path), local_files_only=True)
    except Exception as error:  # diffusers and peft raise anything from OSError to KeyError
        raise _misfit(pipeline, file, error) from error
    updates = updates_of(dict(state), path) if state else file.updates
    held: dict[bytes, list[Update]] = {}
    for update in updates:
        held.setdefault(_digest(update.down, update.up, update.magnitude), []).append(update)
    found: dict[str, dict[str, Attached]] = {}
    for component, layer_path, layer in _adapted(pipeline, more["adapter_name"]):
        name, vectors = more["adapter_name"], getattr(layer, "lora_magnitude_vector", {})
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        magnitude = vectors[name].weight if name in vectors else None
        alike = held.get(_digest(down, up, magnitude))
        if not alike:
            raise InputError(f"{path} and {kind} do not agree about {component}.{layer_path}: it is of another layout")
        update = max(alike, key=lambda u: _letters(u.layer).endswith(_letters(layer_path)))  # noqa: B023
        alike.remove(update)
        if file.has_alphas:
            layer.scaling[name] = (update.rank if update.alpha is None else update.alpha) / update.rank
        elif PEFT_METADATA not in file.metadata:
            layer.scaling[name] = 1.0
        found.setdefault(component, {})[layer_path] = Attached(layer, down, up, layer.scaling[name], magnitude)
    left = [update.layer for alike in held.values() for update in alike]
    if left:
        more_left = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        raise InputError(
            f"{path} has updates for {', '.join(left[:_SHOWN])}{more_left}, {len(left)} of {len(updates)}, that belong "
            f"to no layer of this {kind}: it is another model's, or of a layout that diffusers does not read"
        )
    return found


def _adapted(pipeline: Any, name: str) -> list[tuple[str, str, Any]]:
    """Component, path and layer wherever an adapter is attached."""
    models = [(component, part) for component, part in pipeline.components.items() if isinstance(part, nn.Module)]
    return [
        (component, path, layer)
        for component, model in models
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    ]


def _letters(name: str) -> str:
    return re.sub("[^A-Za-z0-9]", "", name)


def _digest(*tensors: Tensor | None) -> bytes:
    """Of the values alone: neither dtypes nor dimensions of one count."""
    sums = hashlib.sha256()
    for tensor in tensors:
        sums.update(b"" if tensor is None else tensor.detach().float().cpu().contiguous().numpy().tobytes())
        sums.update(b"none" if tensor is None else str([n for n in tensor.shape if n != 1]).encode())
    return sums.digest()


def _misfit(pipeline: Any, file: LoraFile, error: Exception) -> InputError:
    """What diffusers or PEFT raised, in one line."""
    kind, text = type(pipeline).__name__, str(error)
    denoiser = next((p for name in ("unet", "transformer") if (p := getattr(pipeline, name, None)) is not None), None)
    if isinstance(error, InputError):
        return InputError(f"{file.path}: {error}")
    if (found := _SHAPES.search(text)) is not None:
        shapes = (re.sub(r"torch\.Size\((.*)\)", r"\1", found[side]) for side in ("file", "model"))
        what = f"at {found['layer']} the LoRA has {' and the model '.join(shapes)}"
        right = "convert it with slimdiff lora" if plan_of(denoiser) else "it is another model's"
        return InputError(f"{file.path} does not fit this {kind}: {what}: {right}")
    lines = text.strip().splitlines() or [type(error).__name__]
    return InputError(f"{file.path} could not be read as a LoRA of this {kind} by diffusers: {lines[0]}")
