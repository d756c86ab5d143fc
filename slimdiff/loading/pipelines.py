"""Opening the pipeline that a user names: the embedded model, a diffusers directory, a file, or a hub id."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import slimdiff.models  # noqa: F401  (slim classes must be importable before a slim pipeline is loaded)
from slimdiff.denoising.fit import check_fit
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import DENOISERS
from slimdiff.errors import InputError, SlimdiffError
from slimdiff.loading.components import load_component
from slimdiff.loading.loras import fuse_loras
from slimdiff.loading.model_directory import check_component, check_model_directory
from slimdiff.loading.naming import check_lora, choose_variants, find_component, find_model
from slimdiff.loading.offloaded import load_offloaded
from slimdiff.loading.single_file_weights import load_single_file
from slimdiff.loading.steering import MultiControlNetModel, check_steering, load_controlnets, steer
from slimdiff.loading.weights import choose_variant
from slimdiff.progress import working
from slimdiff.settings import DTYPES, Lora, SteeringSettings


@working("load the model")
@own_torch_state()
def load_pipeline(
    model: str | Path,
    dtype: torch.dtype | str | None = None,
    *,
    variant: str | None = None,
    without: Sequence[str] = (),
    lora: Sequence[Lora | str] = (),
    rest: str | None = None,
    steering: SteeringSettings | None = None,
    offload: bool = False,
) -> DiffusionPipeline:
    """Load `demo`, a diffusers directory (dense or slim), a file of a whole model (`single_file`), or a hub id.

    The folder of a denoiser alone is loaded with the other components of its pipeline, or of `rest`.

    Safetensors only, and no code but ours.

    What is loaded is looked through first (`check_model_directory`), and held against its manifest if it has one. Every
    weight comes from the files, or the pipeline is refused.

    Args:
        dtype: of all weights: torch's, or `fp32`, `fp16` or `bf16`; each component keeps that of its files if not
            given.
        variant: of the weights, such as `fp16`; if not given the unnamed one, or the only one that is there.
        without: components that are not needed, and are neither fetched nor loaded: they become None.
        lora: files to fuse into the weights, each at its scale, or as text `FILE:SCALE` (see `fuse_loras`).
        rest: the model that gives the other components to a denoiser alone; the pipeline that it lies in if not given.
        steering: ControlNets or a T2I-Adapter to add to it (see `steer`).
        offload: leave the denoiser's weights in their files, and read them as they are needed (see
            `slimdiff.denoising.offloading`).

    Raises:
        InputError: if it is not a diffusers pipeline, its weights are pickles or do not fit its configuration, its
            parts do not fit each other, it has not that variant, or it asks for code of its own; or a LoRA or what is
            to steer it does not fit it; or a file of a whole model, LoRA or what steers is to go with `offload`.
        MissingPackageError: if there is a LoRA and peft is not here.
    """
    loras = [one if isinstance(one, Lora) else Lora.model_validate(one) for one in lora]
    for one in loras:
        check_lora(Path(one.file))
    steering = steering or SteeringSettings()
    check_steering(steering)
    if offload and (loras or steering):
        raise InputError("an offloaded denoiser takes no LoRA, and nothing steers it: leave these out, or offload")
    instead: dict[str, Any] = dict.fromkeys(without)
    try:
        path, whole, own = find_model(model, rest), model, None
        if rest is not None and (own := find_component(model)) is not None:
            variants, whole = choose_variants(variant, str(model), rest), rest
            instead[own.name] = load_denoiser(model, dtype, variants[str(model)], offload)
            path, variant = find_model(rest), variants[rest]
        if path is None:
            safe = {"use_safetensors": True, "trust_remote_code": False, "variant": variant}
            path = Path(DiffusionPipeline.download(str(whole), **safe, **instead))
        if path.is_file():
            _check_file(path, variant, offload)
            pipeline = load_single_file(path, read_dtype(dtype), instead)
        else:
            pipeline = _load_directory(path, read_dtype(dtype), variant, instead, offload)
        if own is not None and own.name not in pipeline.components:
            raise InputError(f"{rest} is a {type(pipeline).__name__}, which has no {own.name}: name another --pipeline")
        check_fit(pipeline)
        if loras:
            fuse_loras(pipeline, loras)
        return steer(pipeline, steering, read_dtype(dtype))
    except SlimdiffError:
        raise
    except Exception as error:  # diffusers raises anything from OSError to KeyError for a broken directory
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{model} could not be loaded as a diffusers pipeline: {reason[0]}") from error


def _check_file(path: Path, variant: str | None, offload: bool) -> None:
    """Refuse what a file of a whole model does not go with."""
    if variant is not None:
        raise InputError(f"{path} is one file, without variants: leave out the variant {variant!r}")
    if offload:
        raise InputError(
            f"{path} is one file of a whole model, and a denoiser is offloaded to the shards of a diffusers directory: "
            "save it as one first, or leave out offload"
        )


def load_denoiser(
    model: str | Path, dtype: torch.dtype | str | None = None, variant: str | None = None, offload: bool = False
) -> nn.Module:
    """The model in a component folder alone (`find_component`), with every weight from its files.

    Args:
        dtype, variant, offload: as of `load_pipeline`.

    Raises:
        InputError: if it is none, or what `load_pipeline` would refuse of it.
    """
    component = find_component(model)
    if component is None:
        raise InputError(f"{model} is no folder of a denoiser alone, with its config.json and weights")
    kind, weights = check_component(component)
    choose_variant([weights], variant, component.folder)
    load = load_offloaded if offload else load_component
    return load(component.folder, kind, weights, read_dtype(dtype), variant)


def _load_directory(
    path: Path, dtype: torch.dtype | None, variant: str | None, instead: Mapping[str, Any], offload: bool = False
) -> DiffusionPipeline:
    """The pipeline in a directory; `instead` has components that are not read, and what is in their place."""
    found = check_model_directory(path, variant, instead)
    parts = {**found.values, **instead}
    for name, (kind, weights) in found.models.items():
        if kind is MultiControlNetModel:
            parts[name] = load_controlnets(weights.folder, dtype, variant)
        else:
            load = load_offloaded if offload and name in DENOISERS else load_component
            parts[name] = load(weights.folder, kind, weights, dtype, variant)
    for name, (kind, folder) in found.others.items():
        parts[name] = kind.from_pretrained(folder, local_files_only=True)
    takes = inspect.signature(found.pipeline.__init__).parameters
    pipeline = found.pipeline(**{name: part for name, part in parts.items() if name in takes or name not in instead})
    pipeline.register_to_config(_name_or_path=str(path))
    return pipeline


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch's dtype of a name such as `fp16`.

    Raises:
        InputError: for any other name, or a dtype of no weights.
    """
    known = {short: getattr(torch, name) for short, name in DTYPES.items()}
    found = known.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in (None, *known.values()):
        raise InputError(f"dtype {dtype!r}: weights are {', '.join(known)}, or None for what the files have")
    return found
