"""The embedded model's world: pictures of coloured shapes, and the captions that describe them.

A scene has a background and one to four objects, each in one of four places, with a shape, a colour and a size.
Which scenes are for evaluation is decided by a hash of the scene itself, so the training set can never contain one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 180, 70),
    "blue": (60, 110, 245),
    "yellow": (245, 220, 50),
    "purple": (165, 70, 205),
    "orange": (245, 140, 35),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
SIZES = {"small": 7.0, "large": 12.5}  # radius in pixels
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {"black": (15, 15, 18), "gray": (105, 105, 110), "navy": (20, 25, 85), "brown": (90, 50, 25)}

IMAGE_SIZE = 64
_CELL = IMAGE_SIZE // 2
_JITTER = 2.0  # pixels an object may sit off the middle of its place
_HELD_OUT = 16  # one scene in this many is kept for evaluation


@dataclass(frozen=True)
class Object:
    """One object: indices into `PLACES`, `SHAPES`, `COLOURS` and `SIZES`."""

    place: int
    shape: int
    colour: int
    size: int

    def phrase(self) -> str:
        return f"a {list(SIZES)[self.size]} {list(COLOURS)[self.colour]} {SHAPES[self.shape]} {PLACES[self.place]}"


@dataclass(frozen=True)
class Scene:
    """A background (index into `BACKGROUNDS`) and objects in the order in which the caption names them."""

    background: int
    objects: tuple[Object, ...]

    def caption(self) -> str:
        return ", ".join(o.phrase() for o in self.objects) + f", on a {list(BACKGROUNDS)[self.background]} background"

    def held_out(self) -> bool:
        """Whether this scene, in whatever order its caption names the objects, belongs to the evaluation split."""
        canonical = Scene(self.background, tuple(sorted(self.objects, key=lambda o: o.place)))
        return zlib.crc32(canonical.caption().encode()) % _HELD_OUT == 0


def sample_scenes(count: int, seed: int, *, held_out: bool) -> list[Scene]:
    """`count` random scenes of one split, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([len(SHAPES), len(COLOURS), len(SIZES)])
    scenes: list[Scene] = []
    while len(scenes) < count:
        n = int(torch.randint(1, len(PLACES) + 1, (1,), generator=generator))
        places = torch.randperm(len(PLACES), generator=generator)[:n].tolist()
        attributes = (torch.rand(n, 3, generator=generator) * limits).long().tolist()
        background = int(torch.randint(len(BACKGROUNDS), (1,), generator=generator))
        scene = Scene(background, tuple(Object(p, *a) for p, a in zip(places, attributes, strict=True)))
        if scene.held_out() == held_out:
            scenes.append(scene)
    return scenes


def render(scenes: list[Scene], seed: int) -> Tensor:
    """Draw scenes, anti-aliased, each object jittered by up to two pixels.

    Returns:
        float32 `[N, 3, 64, 64]` in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    radii = torch.tensor(list(SIZES.values()))
    images = grounds[[s.background for s in scenes]][:, :, None, None].repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    axis = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    rows = [(i, o) for i, s in enumerate(scenes) for o in s.objects]
    jitter = (torch.rand(len(rows), 2, generator=generator) * 2 - 1) * _JITTER
    place = torch.tensor([o.place for _, o in rows])
    centre = torch.stack([place % 2, place // 2], 1) * _CELL + _CELL / 2 + jitter
    radius = radii[[o.size for _, o in rows]][:, None, None]
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    kinds = torch.tensor([o.shape for _, o in rows])
    distance = torch.empty_like(x)
    for kind, name in enumerate(SHAPES):
        chosen = kinds == kind
        if chosen.any():
            distance[chosen] = _signed_distance(name, x[chosen], y[chosen], radius[chosen])
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    ink = palette[[o.colour for _, o in rows]][:, :, None, None]
    for row, (i, _) in enumerate(rows):
        images[i] = images[i] * (1 - cover[row]) + ink[row] * cover[row]
    return images / 127.5 - 1


def _signed_distance(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to a shape of radius r at the origin (y points down); negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * r
    if shape == "triangle":
        return torch.maximum(y - 0.1 * r, 0.866 * x.abs() - 0.5 * (y - 0.1 * r)) - 0.6 * r
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74 * r).abs() - 0.24 * r
    if shape == "cross":
        long, short = x.abs() - r, y.abs() - 0.32 * r
        tall, narrow = y.abs() - r, x.abs() - 0.32 * r
        return torch.minimum(torch.maximum(long, short), torch.maximum(tall, narrow))
    # A five-pointed star: fold the plane into one tenth of it, then the distance to one edge.
    x, y, r = x.abs(), -y, 1.1 * r
    kx, ky = 0.809017, -0.587785
    for sign in (1.0, -1.0):
        reach = 2 * (sign * kx * x + ky * y).clamp(min=0)
        x, y = x - reach * sign * kx, y - reach * ky
    x, y = x.abs(), y - r
    inner = 0.45
    bx, by = inner * -ky, inner * kx - 1
    along = ((x * bx + y * by) / (bx * bx + by * by)).clamp(min=0)
    along = torch.minimum(along, r)
    side = torch.sign(y * bx - x * by)
    return torch.hypot(x - bx * along, y - by * along) * side
