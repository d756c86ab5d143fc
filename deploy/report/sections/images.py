"""Images of the dense and the slim model side by side, how close they are, and the evaluator's scores."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.artifacts import numbers
from slimdiff.errors import InputError

INLINE_BYTES = 200_000
"""Larger images are embedded as WebP, so that 24 images of 1024 pixels do not make a report of 50 MB."""
_SMOOTH_FROM = 200  # pixels: smaller images are scaled up with their pixels shown


def build(results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`pictures`, whether they were `reencoded`, `smooth_from` and the rows of `quality`."""
    compare = results["compare"]
    pictures, reencoded = _pictures(folder, compare["pictures"])
    quality = _quality(compare.get("quality") or {})
    return {"pictures": pictures, "reencoded": reencoded, "smooth_from": _SMOOTH_FROM, "quality": quality}


def _pictures(folder: Path, pictures: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The images of each caption and seed as label and data URI, which is empty where there is no such image.

    With it, whether any of them had to be encoded again.
    """
    labels = {"dense": "dense", "slim": "slim", "slim_onnx": "slim, ONNX Runtime"}
    shown = [k for k in labels if any(p.get(k) for p in pictures)]
    rows, reencoded = [], False
    for picture in pictures:
        images, size = [], (1, 1)
        for key in shown:
            uri = ""
            if picture.get(key):
                uri, size, again = _data_uri(folder / picture[key])
                reencoded |= again
            images.append((labels[key], uri))
        named = {"caption": str(picture["caption"]), "seed": str(picture["seed"])}
        rows.append({**named, "images": images, "width": size[0], "height": size[1]})
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


def _quality(quality: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for name, metric in quality.items():
        share = metric.get("unit") == "share"
        dense, slim = metric["dense"], metric["slim"]
        if dense is None or slim is None:
            change = numbers.NONE
        elif share:
            change = f"{numbers.signed(100 * (slim - dense), 2)} points"
        else:
            change = numbers.signed(slim - dense, 3)
        show = numbers.percent if share else numbers.measured
        texts = {k: numbers.NONE if v is None else show(v) for k, v in (("dense", dense), ("slim", slim))}
        direction = {"higher": "higher is better", "lower": "lower is better"}.get(str(metric.get("better")), "")
        count = str(metric.get("count", "")) or numbers.NONE
        rows.append({"name": _spoken(name), "direction": direction, "change": change, "count": count, **texts})
    return rows


def _spoken(name: str) -> str:
    text = name.replace("_", " ")
    return (text[:1].upper() + text[1:]).replace("Frechet", "Fréchet")
