"""Images of the dense and the slim model side by side, how close they are, and the evaluator's scores."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimdiff.errors import InputError

INLINE_BYTES = 200_000
"""Larger images are embedded as WebP, so that 24 images of 1024 pixels do not make a report of 50 MB."""
_LABELS = {"dense": "dense", "slim": "slim", "slim_onnx": "slim, ONNX Runtime"}
_SMOOTH_FROM = 200  # pixels: smaller images are scaled up with their pixels shown


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`pictures`, whether they were `reencoded`, and `smooth_from`."""
    pictures, reencoded = _pictures(results["folder"], results["compare"]["pictures"])
    return {"pictures": pictures, "reencoded": reencoded, "smooth_from": _SMOOTH_FROM}


def _pictures(folder: Path, pictures: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The images of each caption and seed as label and data URI, which is empty where there is no such image.

    With it, whether any of them had to be encoded again.
    """
    shown = {key: label for key, label in _LABELS.items() if any(p.get(key) for p in pictures)}
    rows, reencoded = [], False
    for picture in pictures:
        row: dict[str, Any] = {**picture, "images": [], "width": 1, "height": 1}
        for key, label in shown.items():
            uri = ""
            if picture.get(key):
                uri, (row["width"], row["height"]), again = _data_uri(folder / picture[key])
                reencoded |= again
            row["images"].append((label, uri))
        rows.append(row)
    return rows, reencoded


def _data_uri(file: Path) -> tuple[str, tuple[int, int], bool]:
    from PIL import Image

    try:
        data, kind, again = file.read_bytes(), "png", False
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            if len(data) > INLINE_BYTES:
                buffer = io.BytesIO()
                image.save(buffer, "WEBP", quality=92, method=4)
                data, kind, again = buffer.getvalue(), "webp", True
    except OSError as error:
        raise InputError(f"{file} cannot be shown in the report ({error}): build again with --force compare") from error
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", size, again
