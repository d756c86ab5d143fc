"""A file of LoRA updates, read as it is: two matrices a layer, perhaps an alpha, and nothing else."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slimdiff.errors import InputError
from slimdiff.loading.naming import check_lora
from slimdiff.storage import manifest

PEFT_METADATA = "lora_adapter_metadata"
"""Key of a file's header under which diffusers keeps PEFT's configuration, alphas among it."""
OWN_METADATA = "slimdiff"
"""And under which a converted file says what it was converted from and for."""

# diffusers' attention processors and PEFT's layers, kohya's networks; `_lora` was part of a layer's name once.
_TENSOR = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?\.(?P<matrix>down|up)\.weight"
    r"|\.lora_(?P<letter>down|up|A|B)(?:\.\w+)?\.weight"
    r"|\.(?P<alpha>alpha)"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.\w+)*)"
)


@dataclass(eq=False)
class Update:
    """One layer's `scale * up @ down`, with the name that the file has for the layer."""

    layer: str
    down: Tensor
    """`[rank, in]`, or `[rank, in, k, k]` of a convolution."""
    up: Tensor
    """`[out, rank]`, or `[out, rank, 1, 1]`."""
    alpha: float | None = None
    """The scale is alpha / rank; None if the file has none for this layer."""
    magnitude: Tensor | None = None
    """DoRA's length of each row, `[out]`."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass
class LoraFile:
    """What a file holds.

    Attributes:
        has_alphas: whether the scale of a layer is its alpha over its rank.
        metadata: of its header.
    """

    path: Path
    updates: list[Update] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def has_alphas(self) -> bool:
        return any(update.alpha is not None for update in self.updates)

    @property
    def is_dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates)

    @property
    def own(self) -> dict[str, Any]:
        """What `slimdiff lora` noted in it; nothing in a file that it did not write."""
        try:
            content = json.loads(self.metadata.get(OWN_METADATA, "{}"))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def read_lora(path: Path) -> LoraFile:
    """Read a safetensors file of LoRA updates, in any layout that diffusers reads.

    Raises:
        InputError: if there is none, it is a pickle or damaged, holds anything else than LoRA, the matrices of a layer
            do not belong together, or a value is not finite.
    """
    check_lora(path)
    try:
        with safe_open(path, framework="pt") as opened:
            found = LoraFile(path, metadata=dict(opened.metadata() or {}))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except Exception as error:  # safetensors has an exception of its own, below Exception alone
        raise InputError(f"{path} is not a whole safetensors file ({error}): copy it again") from error
    found.updates = updates_of(tensors, path)
    return found


def updates_of(tensors: dict[str, Tensor], where: Path) -> list[Update]:
    """The updates in a file's tensors; see `read_lora` for what is refused."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            what = "kohya's DoRA is not read by diffusers" if name.endswith("dora_scale") else "that is no LoRA"
            raise InputError(
                f"{where} holds {name}: {what}; taken are LoRA's two matrices and alpha of each layer, and PEFT's DoRA"
            )
        role = match["matrix"] or {"A": "down", "B": "up"}.get(match["letter"], match["letter"])
        parts.setdefault(match["layer"], {})[role or match["alpha"] or match["magnitude"]] = tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise InputError(f"{where} holds {name}, which is not finite: the LoRA is damaged")
    if not parts:
        raise InputError(f"{where} holds no tensor: it is no LoRA")
    return [_update(layer, part, where) for layer, part in parts.items()]


def _update(layer: str, part: dict[str, Tensor], where: Path) -> Update:
    for role in ("down", "up"):
        if role not in part:
            raise InputError(f"{where} has no {role} matrix of {layer}, only {', '.join(part)}: it is not whole")
    down, up, alpha = part["down"], part["up"], part.get("alpha")
    if {down.ndim, up.ndim} not in ({2}, {4}) or down.shape[0] != up.shape[1]:
        raise InputError(
            f"{where}: the matrices of {layer} are {list(up.shape)} and {list(down.shape)}, whose ranks "
            "(the second of the one, the first of the other) differ: it is not whole"
        )
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(float(alpha))):
        raise InputError(f"{where}: the alpha of {layer} is no number")
    return Update(layer, down, up, None if alpha is None else float(alpha), part.get("magnitude_vector"))


def describe(path: Path, scale: float) -> dict[str, Any]:
    """What plans and manifests say of a LoRA that was fused; see `check_lora` for what is refused."""
    check_lora(path)
    return {"file": path.name, "sha256": manifest.sha256_of(path), "scale": scale}
