"""Reads a picture: what is at each of the nine places, in which style and size, and on which background."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.things import backgrounds, world

ATTRIBUTES = ("place", "concept", "style", "size", "background", "count")


class Judge(nn.Module):
    """A convolutional classifier; one head per attribute, read at each place.

    Input: float `[B, 3, 64, 64]` in [-1, 1].
    """

    FEATURES = 256

    def __init__(self) -> None:
        super().__init__()
        # Channels of each layer; a layer before 0 is halved.
        layers: list[nn.Module] = []
        before = 3
        for channels, halve in (
            (48, False),
            (48, True),
            (96, False),
            (96, True),
            (192, False),
            (192, True),
            (192, False),
        ):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * halve
            before = channels
        self.backbone = nn.Sequential(*layers)  # [B, 192, 8, 8]
        self.cell = nn.Sequential(nn.Flatten(), nn.Linear(before * 16, self.FEATURES), nn.ReLU())
        self.concept = nn.Linear(self.FEATURES, 1 + len(world.NAMES))
        self.style = nn.Linear(self.FEATURES, len(world.STYLES))
        self.size = nn.Linear(self.FEATURES, len(world.SIZES))
        self.background = nn.Linear(before, len(backgrounds.NAMES))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits as `world.labels` names them: `concept [B, 9, N + 1]` (0: empty), `style`, `size`, `background`."""
        grid = self.backbone(pictures)
        cells = [grid[:, :, y : y + 4, x : x + 4] for y in (0, 2, 4) for x in (0, 2, 4)]
        features = torch.stack([self.cell(c) for c in cells], dim=1)
        logits = {name: getattr(self, name)(features) for name in ("concept", "style", "size")}
        return {**logits, "background": self.background(grid.mean((2, 3)))}


def label_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Summed cross-entropy; an empty place weighs as little as makes all empty places weigh like the things."""
    total = F.cross_entropy(logits["background"].float(), labels["background"])
    for name in ("concept", "style", "size"):
        flat, target = logits[name].float().flatten(0, 1), labels[name].flatten()
        if name == "concept":
            each = F.cross_entropy(flat, target, reduction="none")
            weight = torch.where(target > 0, 1.0, 0.3)
            total = total + (weight * each).sum() / weight.sum() * 3
        else:
            total = total + F.cross_entropy(flat, target, ignore_index=-100)
    return total


def load(path: str | Path) -> Judge:
    """A saved judge, in eval mode."""
    judge = Judge()
    state = load_file(path)
    judge.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def attribute_hits(judge: Judge, pictures: Tensor, scenes: Tensor) -> dict[str, Tensor]:
    """Which attributes of each caption its picture shows, bool.

    Per thing, `[T]` over all scenes: `place` (something is there), `concept`, `style`, `size` (wrong where nothing is
    there). Per picture, `[B]`: `background`, and `count` (as many things as the caption names).
    """
    read = {name: logits.argmax(-1) for name, logits in judge(pictures).items()}
    rows = world.things(scenes)
    present = rows[..., 0] >= 0
    place = rows[..., 3].clamp(min=0)
    there = read["concept"].gather(1, place) > 0
    hits = {"place": there[present]}
    for name, column, first in (("concept", 0, 1), ("style", 1, 0), ("size", 2, 0)):
        right = read[name].gather(1, place) == rows[..., column] + first
        hits[name] = (right & there)[present]
    hits["background"] = read["background"] == scenes[:, 0]
    hits["count"] = (read["concept"] > 0).sum(1) == present.sum(1)
    return hits


def accuracy(hits: list[dict[str, Tensor]]) -> dict[str, float]:
    """Share of attributes right, by attribute and `all` together, each in [0, 1]."""
    joined = {name: torch.cat([h[name] for h in hits]).float() for name in ATTRIBUTES}
    shares = {name: round(values.mean().item(), 4) for name, values in joined.items()}
    return {**shares, "all": round(torch.cat(list(joined.values())).mean().item(), 4)}
