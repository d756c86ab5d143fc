"""The safetensors files that a component's weights lie in: variants, shards, and what their headers say.

Names are diffusers' and transformers': `model.safetensors`, `model.fp16.safetensors`,
`model-00001-of-00002.safetensors` beside `model.safetensors.index.json`, and `model.fp16-00001-of-00002.safetensors`
beside `model.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from slimdiff.errors import InputError
from slimdiff.loading.single_file import header_of
from slimdiff.storage import manifest

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in safetensors that a model can compute in, the widest first."""
_SMALL_FLOATS = ("F8", "F6", "F4")
_FILE = re.compile(r"(?P<stem>[a-z_]+)(\.(?P<variant>[^.]+?))?(?P<shard>-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"(?P<stem>[a-z_]+)\.safetensors\.index(\.(?P<variant>[^.]+))?\.json")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass
class Weights:
    """One component's files, by variant; None is the one without a name."""

    folder: Path
    files: dict[str | None, list[Path]] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Names of the variants, sorted."""
        return sorted(name for name in self.files if name is not None)

    def choose(self, asked: str | None) -> str | None:
        """The variant to read: the one that was asked for, else the unnamed one, else the only one.

        A component without the variant that was asked for has its unnamed files read: diffusers' own rule.

        Raises:
            InputError: if there is none of these.
        """
        if asked in self.files:
            return asked
        if None in self.files:
            return None
        if asked is not None or len(self.files) != 1:
            there = ", ".join(self.variants)
            raise InputError(
                f"{self.folder} has no weights of the variant {asked!r}: there is {there}"
                if asked is not None
                else f"{self.folder} has the variants {there} and none without a name: choose one with --variant"
            )
        return self.variants[0]


def find_weights(folder: Path, kind: Any) -> Weights:
    """The files of a component of this class; nothing but the names and indices of files is read.

    Raises:
        InputError: if there is none, they are pickles, or an index and its shards do not belong together.
    """
    stem = "diffusion_pytorch_model" if issubclass(kind, ModelMixin) else "model"
    found = Weights(folder)
    for file in sorted(folder.glob("*.safetensors")):
        if (name := _FILE.fullmatch(file.name)) and name["stem"] == stem and not name["shard"]:
            found.files[name["variant"]] = [file]
    for file in sorted(folder.glob("*.safetensors.index*.json")):
        shards = _read_shards(file)
        name = _INDEX.fullmatch(file.name)
        if name is None or name["stem"] != stem:
            continue
        # Where both are there, diffusers reads the shards and transformers the one file.
        if issubclass(kind, ModelMixin) or name["variant"] not in found.files:
            found.files[name["variant"]] = shards
    if not found.files:
        _refuse_missing(folder, stem)
    return found


def _refuse_missing(folder: Path, stem: str) -> None:
    pickle = next((p for p in sorted(folder.iterdir()) if p.suffix in _PICKLES), None)
    others = [p.name for p in sorted(folder.glob("*.safetensors"))]
    if pickle is not None and not others:
        raise InputError(
            f"{pickle} is a pickle, which can run code when opened: refused; "
            "save the model again with safe_serialization=True"
        )
    shard = next((name for name in others if (found := _FILE.fullmatch(name)) and found["shard"]), None)
    if shard is not None:
        raise InputError(f"{folder / shard} is a shard, and its index is not beside it: copy the folder whole")
    there = f"there is {', '.join(others)}" if others else "there is no safetensors file"
    raise InputError(f"{folder} holds no weights: {stem}.safetensors is read, and {there}")


def _read_shards(index: Path) -> list[Path]:
    content = manifest.read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise InputError(f"{index} has no table of weights (weight_map)")
    names = list(dict.fromkeys(str(value) for value in table.values()))
    for name in names:
        if not manifest.is_inside(name) or "/" in name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}: weights are safetensors files beside it, refused")
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is not beside it: copy the directory whole")
    return [index.parent / name for name in names]


def read_headers(files: Iterable[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of each tensor -> its dtype, as safetensors names it, and its shape. No tensor is read.

    Raises:
        InputError: for a file whose header is not sound, or that its tensors do not fill.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        found |= header_of(file)[0]
    return found


def float_dtypes(headers: Mapping[str, tuple[str, tuple[int, ...]]], where: Path) -> dict[str, torch.dtype]:
    """The dtype of every floating-point tensor, by name.

    Raises:
        InputError: for floats that no layer computes in.
    """
    for name, (dtype, _) in headers.items():
        if dtype.startswith(_SMALL_FLOATS):
            raise InputError(f"{where} holds {name} in {dtype}, which no layer computes in: read it with --dtype bf16")
    return {name: DTYPES[dtype] for name, (dtype, _) in headers.items() if dtype in DTYPES}


def choose_variant(components: Iterable[Weights], asked: str | None, folder: Path) -> None:
    """See that at least one component has the variant that was asked for.

    Raises:
        InputError: naming the variants that there are.
    """
    components = list(components)
    if asked is None or any(asked in found.files for found in components):
        return
    there = sorted({name for found in components for name in found.variants})
    raise InputError(
        f"{folder} has no variant {asked!r}: there is {', '.join(there) if there else 'none but the unnamed one'}"
    )
