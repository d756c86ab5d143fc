"""What a user may name as a model, looked at before torch and diffusers are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimdiff import embedded
from slimdiff.errors import InputError
from slimdiff.loading.single_file import PICKLES, check_single_file
from slimdiff.storage import manifest

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_VARIANT = re.compile(r"\.(\w+)(-\d{5}-of-\d{5})?\.safetensors")


def find_model(model: str | Path) -> Path | None:
    """The directory of `demo` or of a local diffusers pipeline, or a file of a whole model; None for a hub id.

    Raises:
        InputError: if it is none of these; see `read_index` and `check_single_file` too.
    """
    path = embedded.path() if str(model) == "demo" else Path(model)
    if path.is_file():
        check_single_file(path)
        return path
    if path.is_dir():
        read_index(path)
        return path
    if not _HUB_ID.fullmatch(str(model)) or str(model).startswith("."):
        raise InputError(
            f"{model}: no such directory; a model is 'demo', a diffusers pipeline directory, "
            "a safetensors file of a whole model, or a hub id"
        )
    snapshot = cached_snapshot(str(model))
    if snapshot is not None:
        read_index(snapshot)
    return snapshot


def cached_snapshot(name: str) -> Path | None:
    """The folder of a hub id in the local cache where `HF_HUB_OFFLINE` is set.

    None for what is no hub id, and where the hub may be asked.

    Raises:
        InputError: if it is not in the cache.
    """
    if name == "demo" or Path(name).exists() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    if not constants.HF_HUB_OFFLINE:
        return None
    for file in (INDEX, manifest.MANIFEST):  # a model, and any artifact of ours
        if isinstance(found := try_to_load_from_cache(name, file, constants.HF_HUB_CACHE), str):
            return Path(found).parent
    raise InputError(
        f"{name} is not in the hub's cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: fetch it first"
    )


def check_lora(path: Path) -> None:
    """See that a file may be a LoRA, by its name; see `check_weights_file`."""
    check_weights_file(path, "a LoRA")


def check_weights_file(path: Path, what: str) -> None:
    """See that a file may be weights of that kind, by its name.

    Raises:
        InputError: if there is none, or its name is a pickle's.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the safetensors file in it of {what}")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; {what} is FILE.safetensors, or FILE.safetensors:SCALE")
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: refused; save it as safetensors")


def choose_variants(asked: str | None, *models: str | None) -> dict[str | None, str | None]:
    """The variant to read of each model: the one that was asked for where the model has it, else None.

    Args:
        models: names; what is no model has no variants, and a hub id that is not here may have any.

    Raises:
        InputError: if none of them has it, naming the variants that there are.
    """
    if asked is None:
        return dict.fromkeys(models)
    folders = {name: embedded.path() if name == "demo" else Path(name) for name in models if name is not None}
    there = {name: _variants(folder) if folder.exists() else {asked} for name, folder in folders.items()}
    known = sorted(set().union(*there.values()))
    if asked not in known:
        only = f"there is {', '.join(known)}" if known else "there is none but the unnamed one"
        raise InputError(f"no weights of the variant {asked!r} are in {' or '.join(there)}: {only}")
    return {None: None} | {name: asked if asked in found else None for name, found in there.items()}


def _variants(folder: Path) -> set[str]:
    """The variants of weights in a model's folder, by the names of files alone."""
    files = (*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors"))
    return {found[1] for file in files if (found := _VARIANT.search(file.name))}


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a folder's `model_index.json`.

    Raises:
        InputError: if there is none, or it is no JSON object.
    """
    file = folder / INDEX
    if not file.is_file():
        raise InputError(f"{folder} is not a diffusers pipeline directory: it has no {INDEX}")
    content = manifest.read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object")
    return content
