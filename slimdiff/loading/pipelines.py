"""Opening the pipeline that a user names: the embedded model, a diffusers directory, a file, or a hub id."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import slimdiff.models  # noqa: F401  (slim classes must be importable before a slim pipeline is loaded)
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.errors import InputError, SlimdiffError
from slimdiff.loading.components import load_component
from slimdiff.loading.loras import fuse_loras
from slimdiff.loading.model_directory import check_model_directory
from slimdiff.loading.naming import check_lora, find_model
from slimdiff.loading.single_file_weights import load_single_file
from slimdiff.loading.steering import MultiControlNetModel, check_steering, load_controlnets, steer
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
    steering: SteeringSettings | None = None,
) -> DiffusionPipeline:
    """Load `demo`, a diffusers directory (dense or slim), a file of a whole model (`single_file`), or a hub id.

    Safetensors only, and no code but ours.

    What is loaded is looked through first (`check_model_directory`), and held against its manifest if it has one. Every
    weight comes from the files, or the pipeline is refused.

    Args:
        dtype: of all weights: torch's, or `fp32`, `fp16` or `bf16`; each component keeps that of its files if not
            given.
        variant: of the weights, such as `fp16`; if not given the unnamed one, or the only one that is there.
        without: components that are not needed, and are neither fetched nor loaded: they become None.
        lora: files to fuse into the weights, each at its scale, or as text `FILE:SCALE` (see `fuse_loras`).
        steering: ControlNets or a T2I-Adapter to add to it (see `steer`).

    Raises:
        InputError: if it is not a diffusers pipeline, its weights are pickles or do not fit its configuration, it has
            not that variant, or it asks for code of its own; or a LoRA or what is to steer it does not fit it.
        MissingPackageError: if there is a LoRA and peft is not here.
    """
    loras = [one if isinstance(one, Lora) else Lora.model_validate(one) for one in lora]
    for one in loras:
        check_lora(Path(one.file))
    steering = steering or SteeringSettings()
    check_steering(steering)
    absent = dict.fromkeys(without)
    try:
        path = find_model(model)
        if path is None:
            safe = {"use_safetensors": True, "trust_remote_code": False, "variant": variant}
            path = Path(DiffusionPipeline.download(str(model), **safe, **absent))
        if path.is_file():
            if variant is not None:
                raise InputError(f"{path} is one file, without variants: leave out the variant {variant!r}")
            pipeline = load_single_file(path, read_dtype(dtype), without)
        else:
            pipeline = _load_directory(path, read_dtype(dtype), variant, absent)
        if loras:
            fuse_loras(pipeline, loras)
        return steer(pipeline, steering, read_dtype(dtype))
    except SlimdiffError:
        raise
    except Exception as error:  # diffusers raises anything from OSError to KeyError for a broken directory
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{model} could not be loaded as a diffusers pipeline: {reason[0]}") from error


def _load_directory(
    path: Path, dtype: torch.dtype | None, variant: str | None, without: dict[str, None]
) -> DiffusionPipeline:
    found = check_model_directory(path, variant, without)
    parts = found.values | without
    for name, (kind, weights) in found.models.items():
        if kind is MultiControlNetModel:
            parts[name] = load_controlnets(weights.folder, dtype, variant)
        else:
            parts[name] = load_component(weights.folder, kind, weights, dtype, variant)
    for name, (kind, folder) in found.others.items():
        parts[name] = kind.from_pretrained(folder, local_files_only=True)
    takes = inspect.signature(found.pipeline.__init__).parameters
    pipeline = found.pipeline(**{name: part for name, part in parts.items() if name in takes or name not in without})
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
