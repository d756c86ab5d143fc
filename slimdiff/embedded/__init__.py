"""The embedded model: a small text-to-image Stable Diffusion of coloured shapes, and the means to judge its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimdiff.errors import InputError

if TYPE_CHECKING:
    from slimdiff.embedded.evaluator import Seen


def path() -> Path:
    """The embedded model's pipeline directory."""
    folder = Path(__file__).parent / "model"
    if not (folder / "model_index.json").is_file():
        raise InputError(f"the embedded model is missing from {folder}: install slimdiff again")
    return folder


def captions(count: int, seed: int = 0, *, held_out: bool = False) -> list[str]:
    """`count` captions of the embedded model's world; with `held_out`, ones that its training set never contains."""
    from slimdiff.embedded.scenes import sample_scenes

    return [s.caption() for s in sample_scenes(count, seed, held_out=held_out)]


def look(images: Sequence[Any], seed: int) -> Seen:
    """What the evaluator sees in images made from `captions(len(images), seed, held_out=True)`."""
    import numpy as np

    from slimdiff.embedded import evaluator, scenes

    reader = evaluator.load()
    captioned = scenes.sample_scenes(len(images), seed, held_out=True)
    pictures = evaluator.to_tensor(images)
    hits = evaluator.attribute_hits(reader, pictures, captioned)
    each = [[hit for name in row.values() for hit in name] for row in hits]
    return evaluator.Seen(
        np.array([sum(row) for row in each]),
        np.array([len(row) for row in each]),
        evaluator.features(reader, pictures),
        evaluator.features(reader, scenes.render(captioned, seed)),
    )
