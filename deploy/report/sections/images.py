"""Images of the dense and the slim model side by side and their difference, how close they are, and the evaluator's
scores."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimdiff.errors import InputError

INLINE_BYTES = 200_000
"""Larger images are embedded as WebP, so that 24 images of 1024 pixels do not make a report of 50 MB."""
MOST_AMPLIFIED = 64
"""At most, the difference of two images is shown so many times as large: what one step of 255 becomes visible by."""
_LABELS = {"dense": "dense", "slim": "slim", "slim_onnx": "slim, ONNX Runtime"}
_SMOOTH_FROM = 200  # pixels: smaller images are scaled up with their pixels shown


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`pictures`, the factor that their differences are `amplified` by, whether images were `reencoded`, and
    `smooth_from`."""
    shown = [{**p, "opened": _open_all(results["folder"], p)} for p in results["compare"]["pictures"]]
    amplified = _factor([images for p in shown if (images := p["opened"])])
    pictures, reencoded = _pictures(shown, amplified)
    return {"pictures": pictures, "amplified": amplified, "reencoded": reencoded, "smooth_from": _SMOOTH_FROM}


def _open_all(folder: Path, picture: Mapping[str, Any]) -> dict[str, tuple[bytes, Any]]:
    """The files of a caption and seed and the images in them, by key of `_LABELS`."""
    return {key: _open(folder / picture[key]) for key in _LABELS if picture.get(key)}


def _open(file: Path) -> tuple[bytes, Any]:
    from PIL import Image

    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return data, image.convert("RGB")
    except OSError as error:
        raise InputError(f"{file} cannot be shown in the report ({error}): build again with --force compare") from error


def _difference(images: Mapping[str, tuple[bytes, Any]]) -> Any:
    """|slim - dense| per pixel and channel; None unless there are both."""
    from PIL import ImageChops

    both = [images[key][1] for key in ("dense", "slim") if key in images]
    return ImageChops.difference(*both) if len(both) == 2 and both[0].size == both[1].size else None


def _factor(pictures: Sequence[Mapping[str, tuple[bytes, Any]]]) -> int:
    """The largest power of two, to `MOST_AMPLIFIED`, by which no difference leaves the 255 steps of a pixel: one for
    all pictures, so that rows compare."""
    differences = [d for images in pictures if (d := _difference(images)) is not None]
    most = max((high for d in differences for _, high in d.getextrema()), default=0)
    factor = MOST_AMPLIFIED
    while factor > 1 and factor * most > 255:
        factor //= 2
    return factor


def _pictures(pictures: Sequence[Mapping[str, Any]], amplified: int) -> tuple[list[dict[str, Any]], bool]:
    """The images of each caption and seed as label and data URI, which is empty where there is no such image.

    With it, whether any of them had to be encoded again.
    """
    shown = {key: label for key, label in _LABELS.items() if any(key in p["opened"] for p in pictures)}
    rows, reencoded = [], False
    for picture in pictures:
        row: dict[str, Any] = {**picture, "images": [], "width": 1, "height": 1}
        images = dict(picture["opened"])
        for key, label in shown.items():
            uri = ""
            if key in images:
                data, image = images[key]
                uri, again = _data_uri(data, image)
                row["width"], row["height"] = image.size
                reencoded |= again
            row["images"].append((label, uri))
        if (difference := _difference(images)) is not None:
            image = difference.point(lambda step: step * amplified)
            label = f"difference, dense to slim, \u00d7{amplified}" if difference.getbbox() else "no difference"
            row["images"].append((label, _data_uri(_as_png(image), image)[0]))
        rows.append(row)
    return rows, reencoded


def _as_png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(png: bytes, image: Any) -> tuple[str, bool]:
    """Of a PNG file that holds this image; whether it is encoded anew, for its size."""
    data, kind = png, "png"
    if again := len(png) > INLINE_BYTES:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=92, method=4)
        data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", again
