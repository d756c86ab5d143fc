"""The maps of a slim model in a file beside it: what LoRA updates of the dense model are converted by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimdiff.calibration.calibrate import weights_hash
from slimdiff.errors import InputError
from slimdiff.groups.maps import AxisMap, LayerMap, Maps
from slimdiff.models import plan_of
from slimdiff.storage.manifest import replacing

MAPS = "slim_maps.safetensors"
"""Its name in a slim model's folder. Nothing but the conversion reads it: a model without it opens as well."""
SCHEMA = 1


def save_maps(folder: str | Path, maps: Maps, denoiser: nn.Module) -> Path:
    """Write the maps that slimming gave beside a saved slim model.

    Args:
        folder: of the model; maps: `Compression.maps`; denoiser: the slim one, as it is saved.

    Returns:
        the file.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in maps.items():
        for side, axis in zip(LayerMap._fields, layer, strict=True):
            tensors |= {f"{path}/{side}/{name}": t for name, t in (axis.tensors() if axis else ())}
    plan = plan_of(denoiser)
    about = {"schema": SCHEMA, "dense": plan.model_hash if plan else None, "slim": weights_hash(denoiser)}
    file = Path(folder) / MAPS
    with replacing(file, is_file=True) as temporary:
        save_file(tensors, temporary, {"slimdiff": json.dumps(about)})
    return file


def load_maps(folder: Path, denoiser: nn.Module) -> Maps:
    """The maps of a slim model.

    Args:
        denoiser: as it was loaded from the folder.

    Raises:
        InputError: if the folder has none, or those of other weights.
    """
    file = folder / MAPS
    if not file.is_file():
        raise InputError(
            f"{folder} has no {MAPS}, by which a LoRA is converted: compress the dense model again (older "
            "versions and --no-maps wrote none)"
        )
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {})["slimdiff"])
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                path, side, name = key.split("/")
                found.setdefault(path, {}).setdefault(side, {})[name] = opened.get_tensor(key)
        maps = {
            path: LayerMap(**{side: AxisMap(**parts) for side, parts in sides.items()}) for path, sides in found.items()
        }
    except Exception as error:  # safetensors has an exception of its own, below Exception alone
        raise InputError(f"{file} cannot be read ({error}): compress the dense model again") from error
    if about.get("schema") != SCHEMA or about.get("slim") != weights_hash(denoiser):
        raise InputError(f"{file} is not this model's (its weights differ): compress the dense model again")
    return maps
