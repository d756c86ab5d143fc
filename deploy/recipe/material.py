"""What images are made from, as recipes and commands name it: prompts, folders of pictures, classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.recipe.prompts import calibration_prompts, comparison_prompts
from slimdiff.errors import InputError
from slimdiff.prompts.material import Material, find_pictures, pair_masks
from slimdiff.storage import manifest

PICTURES = ("images", "masks", "control_images")
"""Folders that a recipe may name."""


def calibration_material(
    source: str | Sequence[str],
    samples: int,
    more: int,
    *,
    images: str | None = None,
    masks: str | None = None,
    control_images: str | None = None,
    classes: str | None = None,
    default: bool = False,
) -> Material:
    """What up to `samples + more` images of a calibration are made from; nothing is loaded for it.

    Args:
        source: of prompts; `default`: nobody named it, and a pipeline that takes no prompt does without.
        samples: how many the calibration takes; there must be as many images.
        more: how many beyond them serve to measure errors and sensitivities on, as far as there are any.
        images, masks, control_images: folders.
        classes: such as `0-9` or `207,360`.

    Raises:
        InputError: for a source that cannot be read, or holds too few.
    """
    prompts = calibration_prompts(source, samples + more)
    found = find_pictures(images, least=samples)[: samples + more] if images is not None else []
    if masks is not None and images is None:
        raise InputError("--masks say what of an image is painted: give --images with them")
    painted = pair_masks(found, find_pictures(masks, "masks")) if masks is not None else []
    numbers = parse_classes(classes) if classes is not None else []
    count = len(found) if found else samples + more if numbers else len(prompts)
    controls = find_pictures(control_images, "control images") if control_images is not None else []
    return Material(prompts, found, painted, numbers, count, default, controls)


def comparison_material(
    source: str | Sequence[str],
    used: int,
    count: int,
    seed: int,
    *,
    images: str | None = None,
    masks: str | None = None,
    control_images: str | None = None,
    classes: str | None = None,
    default: bool = False,
) -> Material:
    """What `count` images of a comparison are made from, as far as possible unseen by calibration.

    See `comparison_prompts` of prompts; of pictures it is what comes after the first `used`, then the front again.

    Raises:
        InputError: for a source that cannot be read, or holds nothing.
    """
    prompts = comparison_prompts(source, used, count, seed)
    found = find_pictures(images) if images is not None else []
    painted = pair_masks(found, find_pictures(masks, "masks")) if masks is not None else []
    numbers = parse_classes(classes) if classes is not None else []

    def unseen(some: list[Any]) -> list[Any]:
        return (some[used:] + some[:used])[:count]

    controls = find_pictures(control_images, "control images") if control_images is not None else []
    return Material(prompts, unseen(found), unseen(painted), unseen(numbers), count, default, controls, used)


def parse_classes(text: str) -> list[int]:
    """Numbers of classes: `207`, `1,2,3`, `0-999`, or several of these with commas.

    Raises:
        InputError: for any other text.
    """
    numbers: list[int] = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() and len(end) < 7 for end in ends):
            raise InputError(f"classes are numbers such as 207, 1,2,3 or 0-999, not {text!r}")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise InputError(f"classes {part.strip()} run backwards: write {last}-{first}")
        numbers += range(first, last + 1)
    return numbers


def hash_of(material: Material, count: int | None = None) -> str:
    """A hash of what the first `count` images are made from; of prompts alone, that of their list."""
    prompts = list(material.prompts)[:count]
    if not (material.images or material.classes or material.controls):
        return manifest.fingerprint(prompts)
    content: dict[str, Any] = {"prompts": prompts, "classes": list(material.classes)}
    for name, files in (("images", material.images), ("masks", material.masks)):
        content[name] = [manifest.sha256_of(Path(file)) for file in files[:count]]
    if material.controls:
        content["control_images"] = [manifest.sha256_of(Path(file)) for file in material.controls]
    return manifest.fingerprint(content)
