"""Reads shape, colour, size and place back from a picture: caption accuracy and a Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimdiff.embedded import scenes as world
from slimdiff.errors import InputError

ATTRIBUTES = ("place", "shape", "colour", "size", "background", "count")


class Evaluator(nn.Module):
    """A small convolutional classifier; one head per attribute, read at each of the four places.

    Input: float `[N, 3, 64, 64]` in [-1, 1].
    """

    FEATURES = 96

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 24, 48, 96, self.FEATURES)
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            if i < 3:
                layers += [nn.MaxPool2d(2)]
        self.backbone = nn.Sequential(*layers)  # [N, 96, 8, 8]
        self.cell = nn.Sequential(nn.Flatten(), nn.Linear(self.FEATURES * 16, self.FEATURES), nn.ReLU())
        self.shape = nn.Linear(self.FEATURES, 1 + len(world.SHAPES))
        self.colour = nn.Linear(self.FEATURES, len(world.COLOURS))
        self.size = nn.Linear(self.FEATURES, len(world.SIZES))
        self.background = nn.Linear(self.FEATURES, len(world.BACKGROUNDS))

    def features(self, images: Tensor) -> Tensor:
        """Features per place: `[N, 4, 96]`."""
        grid = self.backbone(images)
        cells = [grid[:, :, y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)]
        return torch.stack([self.cell(c) for c in cells], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits: `shape [N, 4, 7]` (0: empty place), `colour [N, 4, 8]`, `size [N, 4, 2]`, `background [N, 4]`."""
        f = self.features(images)
        return {
            "shape": self.shape(f),
            "colour": self.colour(f),
            "size": self.size(f),
            "background": self.background(f.mean(1)),
        }


def load(path: str | Path | None = None) -> Evaluator:
    """The shipped evaluator, in eval mode."""
    file = Path(path) if path else Path(__file__).parent / "evaluator.safetensors"
    evaluator = Evaluator()
    evaluator.load_state_dict(load_file(file), strict=True)
    return evaluator.eval().requires_grad_(False)


def to_tensor(images: Sequence) -> Tensor:
    """PIL images or uint8 arrays to float32 `[N, 3, 64, 64]` in [-1, 1]."""
    arrays = np.stack([np.asarray(i) for i in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def attribute_hits(evaluator: Evaluator, images: Tensor, scenes: Sequence[world.Scene]) -> list[dict[str, list[bool]]]:
    """Which attributes of each caption its picture shows.

    Per object: `place` (something is there), `shape`, `colour`, `size` (wrong where nothing is there). Per picture:
    `background`, and `count` (as many objects as the caption names, so that an invented object costs something).
    """
    logits = evaluator(images)
    read = {k: v.argmax(-1) for k, v in logits.items()}
    hits = []
    for i, scene in enumerate(scenes):
        row: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
        for o in scene.objects:
            there = bool(read["shape"][i, o.place] > 0)
            row["place"].append(there)
            row["shape"].append(there and int(read["shape"][i, o.place]) == o.shape + 1)
            row["colour"].append(there and int(read["colour"][i, o.place]) == o.colour)
            row["size"].append(there and int(read["size"][i, o.place]) == o.size)
        row["background"].append(int(read["background"][i]) == scene.background)
        row["count"].append(int((read["shape"][i] > 0).sum()) == len(scene.objects))
        hits.append(row)
    return hits


def caption_accuracy(hits: Sequence[dict[str, list[bool]]]) -> dict[str, float]:
    """Share of attributes right, by attribute and `all` together, each in [0, 1]."""
    by_name = {name: [hit for row in hits for hit in row[name]] for name in ATTRIBUTES}
    by_name["all"] = [hit for row in by_name.values() for hit in row]
    return {name: sum(row) / len(row) for name, row in by_name.items()}


def frechet_distance(evaluator: Evaluator, images: Tensor, reference: Tensor) -> float:
    """Fréchet distance between two sets of pictures in the evaluator's feature space (mean over places, 96 dims).

    The same formula as FID (Heusel et al. 2017, eq. 6) on this evaluator's features; not comparable with FID figures.

    Raises:
        InputError: for a set of one.
    """
    return distance_of(features(evaluator, images), features(evaluator, reference))


@torch.no_grad()
def features(evaluator: Evaluator, images: Tensor) -> np.ndarray:
    """What `frechet_distance` is of, float64 `[N, 96]`."""
    return evaluator.features(images).mean(1).double().numpy()


def distance_of(images: np.ndarray, reference: np.ndarray) -> float:
    """`frechet_distance` of sets of `features`."""
    if min(len(images), len(reference)) < 2:
        raise InputError("the distance of two sets of images takes at least two of each: make more")
    (mean_a, cov_a), (mean_b, cov_b) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (images, reference))
    eigenvalues = scipy.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum())


@dataclass(frozen=True)
class Seen:
    """What the evaluator sees in images, one row each: figures of any number of them follow from it.

    Attributes:
        right, asked: attributes of the caption that the image shows, and that there are; `[N]`.
        features: of the image, and `rendered`, of the scene of its caption; `[N, 96]`.
    """

    right: np.ndarray
    asked: np.ndarray
    features: np.ndarray
    rendered: np.ndarray

    def figures(self, rows: Any = slice(None)) -> dict[str, float]:
        """`caption_accuracy` in [0, 1], and `frechet_distance` to all scenes; of the images of these numbers."""
        return {
            "caption_accuracy": float(self.right[rows].sum() / self.asked[rows].sum()),
            "frechet_distance": distance_of(self.features[rows], self.rendered),
        }
