"""What a user may name as a model, looked at before torch and diffusers are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimdiff import embedded
from slimdiff.errors import InputError
from slimdiff.loading.single_file import PICKLES, check_single_file
from slimdiff.storage import manifest

INDEX = "model_index.json"
CONFIG = "config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_VARIANT = re.compile(r"\.(\w+)(-\d{5}-of-\d{5})?\.safetensors")
_DENOISERS = re.compile(r"(Slim)?\w*(UNet|Transformer|DiT)\w*")


@dataclass(frozen=True)
class Component:
    """The folder of a denoiser alone, such as the `unet` of a pipeline's directory.

    Attributes:
        kind: the name of its class.
        pipeline: the directory above it, where its `model_index.json` names this component; else None.
    """

    folder: Path
    kind: str
    pipeline: Path | None

    @property
    def name(self) -> str:
        """What pipelines call it: `unet` or `transformer`."""
        return "unet" if "UNet" in self.kind else "transformer"


def find_component(model: str | Path) -> Component | None:
    """The component that a folder is, by its `config.json` and weights; None for anything else.

    Raises:
        InputError: if its configuration cannot be read.
    """
    folder = Path(model).absolute()
    if not (folder / CONFIG).is_file() or (folder / INDEX).is_file():
        return None
    config = manifest.read_json(folder / CONFIG)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    weights = any(file.suffix in (".safetensors", *PICKLES) for file in folder.iterdir())
    if not weights or not isinstance(kind, str) or not _DENOISERS.fullmatch(kind):
        return None
    above = folder.parent
    entry = read_index(above).get(folder.name) if (above / INDEX).is_file() else None
    named = isinstance(entry, list) and len(entry) == 2 and entry[1] == kind
    return Component(folder, kind, above if named else None)


def is_part(folder: Path) -> bool:
    """Whether a folder lies in a pipeline's directory, with a configuration of its own, whatever it holds."""
    return (folder / CONFIG).is_file() and (folder.absolute().parent / INDEX).is_file()


def places_of(model: str | Path) -> list[Path]:
    """Where a model's files lie: its own place, and the directory of the pipeline that a component belongs to."""
    component = find_component(model)
    return [Path(model), *([component.pipeline] if component and component.pipeline else [])]


def find_model(model: str | Path, rest: str | None = None) -> Path | None:
    """The directory of `demo` or of a local diffusers pipeline, or a file of a whole model; None for a hub id.

    Of a component folder it is the directory of its pipeline; with `rest`, the folder itself.

    Args:
        rest: the model that gives the other components to a component folder.

    Raises:
        InputError: if it is none of these, or a component without its pipeline; see `read_index` and
            `check_single_file` too.
    """
    path = embedded.path() if str(model) == "demo" else Path(model)
    component = find_component(path)
    if rest is not None:
        if component is None:
            raise InputError(f"{model} is no denoiser alone, which --pipeline gives other components: leave that out")
        find_model(rest)
        return path
    if path.is_file():
        check_single_file(path)
        return path
    if component is not None:
        if component.pipeline is None:
            raise InputError(
                f"{model} is a {component.name} alone, and no pipeline's directory holds it: name the whole model, or "
                "say with --pipeline, where the command has that, which model's other components go with it"
            )
        return component.pipeline
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
        if is_part(folder):
            raise InputError(f"{folder} is a part of a pipeline and no denoiser: name {folder.absolute().parent}")
        raise InputError(f"{folder} is not a diffusers pipeline directory: it has no {INDEX}")
    content = manifest.read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object")
    return content
