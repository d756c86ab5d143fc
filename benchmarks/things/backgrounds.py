"""Named backgrounds, drawn by a few lines each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = (
    *("wooden", "brick", "grassy", "cloudy", "starry", "sandy", "snowy"),
    *("checkered", "striped", "dotted", "gray", "pink"),
)
VARIANTS = 48  # drawings of each


def _colour(red: int, green: int, blue: int) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32)[:, None, None] / 255


def _noise(size: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Smooth noise in [-1, 1]: `[1, size, size]`, with so many grains a side."""
    grains = torch.rand(1, 1, rows, columns, generator=generator) * 2 - 1
    return F.interpolate(grains, (size, size), mode="bicubic", align_corners=False)[0].clamp(-1, 1)


def _mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    return first * (1 - share) + second * share


def _specks(size: int, count: int, generator: torch.Generator) -> Tensor:
    points = torch.zeros(1, size, size)
    at = torch.randint(size, (2, count), generator=generator)
    points[0, at[0], at[1]] = 0.5 + 0.5 * torch.rand(count, generator=generator)
    return points


def _draw(name: str, size: int, generator: torch.Generator) -> Tensor:
    """One background: float `[3, size, size]` in [0, 1]."""
    unit = size / 64
    shift = torch.rand(2, generator=generator) * 16
    y, x = torch.meshgrid(torch.arange(size) / unit + shift[0], torch.arange(size) / unit + shift[1], indexing="ij")
    y, x = y[None], x[None]
    if name == "wooden":
        seam = ((y % 16) < 1.2).float() * 0.6
        return _mix(_colour(165, 108, 62), _colour(84, 50, 26), (seam + 0.3 * _noise(size, 24, 3, generator)).clamp(0))
    if name == "brick":
        row = (y / 8).floor()
        mortar = ((y % 8 < 1.3) | ((x + 8 * (row % 2)) % 16 < 1.3)).float()
        wall = _colour(168, 72, 56) * (1 + 0.12 * _noise(size, 9, 5, generator))
        return _mix(wall, _colour(205, 195, 185), mortar)
    if name == "grassy":
        return _mix(_colour(98, 160, 62), _colour(52, 112, 38), 0.5 + 0.5 * _noise(size, 14, 26, generator))
    if name == "cloudy":
        cloud = (_noise(size, 4, 3, generator) * 1.6).clamp(0, 1)
        return _mix(_colour(112, 178, 236), _colour(244, 248, 252), cloud)
    if name == "starry":
        return _mix(_colour(16, 18, 56), _colour(250, 245, 215), _specks(size, 26, generator))
    if name == "sandy":
        return _mix(_colour(226, 196, 140), _colour(196, 160, 104), 0.4 + 0.4 * _noise(size, 20, 8, generator))
    if name == "snowy":
        ground = _mix(_colour(196, 214, 232), _colour(228, 238, 246), 0.5 + 0.5 * _noise(size, 3, 3, generator))
        return _mix(ground, _colour(255, 255, 255), _specks(size, 60, generator))
    if name == "checkered":
        return _mix(_colour(235, 235, 235), _colour(70, 130, 125), ((x // 8 + y // 8) % 2))
    if name == "striped":
        return _mix(_colour(246, 236, 218), _colour(232, 168, 152), (((x + y) % 14 - 7).abs() - 3).clamp(0, 1))
    if name == "dotted":
        away = torch.hypot(x % 10 - 5, y % 10 - 5)
        return _mix(_colour(245, 226, 150), _colour(214, 150, 90), (3 - away).clamp(0, 1))
    plain = {"gray": _colour(128, 130, 134), "pink": _colour(238, 160, 190)}[name]
    return plain.expand(3, size, size)


def bank(size: int, seed: int) -> Tensor:
    """All drawings: float32 `[12, 48, 3, size, size]` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    drawings = [torch.stack([_draw(n, size, generator) for _ in range(VARIANTS)]) for n in NAMES]
    return torch.stack(drawings).clamp(0, 1)
