"""Scenes of one to three named things in two styles, the captions that tell them, and their pictures.

A scene is a row of integers, so that thousands are drawn, told and split at once, on any device.
Which scenes are for evaluation is decided by a hash of what they combine, so training never sees such a combination:
for several things the set of their names, whatever their style, place, size and background; for a single thing its
name, style and background.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.things import backgrounds
from benchmarks.things.sprites import concepts

IMAGE_SIZE = 64
NAMES = [name for _, name in concepts()]
STYLES = ("3D", "flat")
SIZES = ("small", "", "huge")  # the middle size has no word; "huge" is for one thing alone in the middle
_SIDES = torch.tensor([0.375, 0.47, 0.72])  # of the picture's side
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
CENTRE = 4
MOST = 3  # things a picture
_HELD_OUT = 16  # one combination in this many is kept for evaluation
_JITTER = 1.5 / 64
_HASH = 0x7FFFFFFF

# A scene's columns: background, then concept, style, size and place of each thing, -1 where there is none.
COLUMNS = 1 + 4 * MOST


def _layouts(count: int) -> Tensor:
    """Sets of places whose things do not overlap: half a picture apart, across or down."""

    def apart(a: int, b: int) -> bool:
        return abs(a // 3 - b // 3) == 2 or abs(a % 3 - b % 3) == 2

    sets = combinations(range(len(PLACES)), count)
    return torch.tensor([s for s in sets if all(apart(a, b) for a, b in combinations(s, 2))])


LAYOUTS = [_layouts(count) for count in range(1, MOST + 1)]


def things(scenes: Tensor) -> Tensor:
    """The scenes' things: int64 `[B, 3, 4]` (concept, style, size, place), -1 where there is none."""
    return scenes[:, 1:].reshape(-1, MOST, 4)


def _mix(x: Tensor) -> Tensor:
    """A hash of integers below 2^31, the same on every machine."""
    x = (x * 1103515245 + 12345) & _HASH
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _HASH
    return x ^ (x >> 13)


def held_out(scenes: Tensor) -> Tensor:
    """Which scenes belong to the evaluation split: bool `[B]`."""
    concept, style = things(scenes)[..., 0], things(scenes)[..., 1]
    present = concept >= 0
    alone = present.sum(1) == 1
    together = torch.where(present, _mix(concept + 1), 0).sum(1)
    single = (concept[:, 0] * 2 + style[:, 0]) * len(backgrounds.NAMES) + scenes[:, 0] + 7919 * len(NAMES)
    return _mix(torch.where(alone, single, together) & _HASH) % _HELD_OUT == 0


def _draw(count: int, generator: torch.Generator, names: int) -> Tensor:
    def pick(limit: int) -> Tensor:
        return torch.randint(limit, (count,), generator=generator)

    scenes = torch.full((count, COLUMNS), -1)
    scenes[:, 0] = pick(len(backgrounds.NAMES))
    number = pick(MOST)  # one less than the number of things
    rows = things(scenes).clone()
    for less, layouts in enumerate(LAYOUTS):
        chosen = layouts[pick(len(layouts))]
        order = torch.rand(count, less + 1, generator=generator).argsort(1)
        mine = number == less
        rows[mine, : less + 1, 3] = chosen.gather(1, order)[mine]
    present = rows[..., 3] >= 0
    for column, limit in ((0, names), (1, len(STYLES))):
        rows[..., column] = torch.randint(limit, (count, MOST), generator=generator)
    rows[..., 2] = (torch.rand(count, MOST, generator=generator) > 0.35).long()
    huge = (number == 0) & (rows[:, 0, 3] == CENTRE) & (torch.rand(count, generator=generator) < 0.5)
    rows[huge, 0, 2] = 2
    rows[~present] = -1
    scenes[:, 1:] = rows.flatten(1)
    return scenes


def sample_scenes(count: int, seed: int, *, held: bool, names: int = len(NAMES)) -> Tensor:
    """`count` random scenes of one split, of the first `names` things: int64 `[count, 13]`, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        scenes = _draw(count * (_HELD_OUT + 2 if held else 1) + 64, generator, names)
        kept.append(scenes[held_out(scenes) == held])
    return torch.cat(kept)[:count]


def phrase(thing: list[int]) -> str:
    concept, style, size, place = thing
    words = ("a", SIZES[size], STYLES[style], NAMES[concept], PLACES[place])
    return " ".join(word for word in words if word)


def captions(scenes: Tensor) -> list[str]:
    told = []
    for background, rows in zip(scenes[:, 0].tolist(), things(scenes).tolist(), strict=True):
        phrases = [phrase(row) for row in rows if row[0] >= 0]
        told.append(", ".join(phrases) + f", on a {backgrounds.NAMES[background]} background")
    return told


def labels(scenes: Tensor) -> dict[str, Tensor]:
    """Scenes as class indices, int64.

    Returns:
        `concept`, `style`, `size` of shape `[B, 9]` by place, with `concept` 0 for an empty place and 1 + index
        otherwise (`style` and `size` are -100, torch's ignored class, at empty places), and `background` `[B]`.
    """
    rows = things(scenes)
    place = torch.where(rows[..., 3] >= 0, rows[..., 3], len(PLACES))  # a tenth column takes the absent ones

    def spread(values: Tensor, empty: int) -> Tensor:
        table = values.new_full((len(scenes), len(PLACES) + 1), empty)
        return table.scatter(1, place, values)[:, :-1]

    return {
        "concept": spread(rows[..., 0] + 1, 0),
        "style": spread(rows[..., 1], -100),
        "size": spread(rows[..., 2], -100),
        "background": scenes[:, 0],
    }


class Painter:
    """Draws scenes on a device from packed sprites, uint8 `[2, N, 48, 48, 4]`, premultiplied."""

    def __init__(self, sprites: np.ndarray, device: torch.device | str, seed: int) -> None:
        self.device = torch.device(device)
        self.sprites = torch.from_numpy(sprites).permute(0, 1, 4, 2, 3).to(self.device).float() / 255
        self.backgrounds = backgrounds.bank(IMAGE_SIZE, seed).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def __call__(self, scenes: Tensor) -> Tensor:
        """Pictures, each thing a little off its place and size.

        Returns:
            float32 `[B, 3, 64, 64]` in [-1, 1].
        """
        scenes = scenes.to(self.device, non_blocking=True)
        count = len(scenes)
        variant = (self._random(count) * backgrounds.VARIANTS).long()
        pictures = self.backgrounds[scenes[:, 0], variant]
        mirrored = self._random(count, 1, 1, 1) < 0.5
        pictures = torch.where(mirrored, pictures.flip(3), pictures)
        rows = things(scenes)
        concept, style, size, place = rows.clamp(min=0).unbind(-1)
        centre = torch.stack([place % 3, place // 3], -1) * 0.25 + 0.25
        centre = centre + (self._random(count, MOST, 2) * 2 - 1) * _JITTER
        side = _SIDES.to(self.device)[size] * (1 + 0.06 * (self._random(count, MOST) * 2 - 1))
        for i in range(MOST):
            # From the picture's coordinates in [-1, 1] to the sprite's.
            scale = 1 / side[:, i]
            offset = -(2 * centre[:, i] - 1) * scale[:, None]
            theta = torch.zeros(count, 2, 3, device=self.device)
            theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale, scale, offset
            grid = F.affine_grid(theta, [count, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
            layer = F.grid_sample(self.sprites[style[:, i], concept[:, i]], grid, align_corners=False)
            layer = layer * (rows[:, i, 0] >= 0).float()[:, None, None, None]
            pictures = pictures * (1 - layer[:, 3:]) + layer[:, :3]
        return (pictures * 2 - 1).clamp(-1, 1)
