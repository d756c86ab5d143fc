"""Where things go in the report's plots, in percent of the plot's width and height (0 is left, and top)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from deploy.artifacts.numbers import digits


class Tick(NamedTuple):
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where `value` is, 0 to 100."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return round(100 * (value - low) / (high - low), 2)

    def below(self, value: float) -> float:
        """The same from the top, for an axis that goes up."""
        return round(100 - self.at(value), 2)

    def ticks(self, most: int = 6) -> list[Tick]:
        """At most `most` round values (a few more if the axis spans a single decade)."""
        if self.logarithmic:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            decades = range(first, last + 1, math.ceil((last - first + 1) / most))
            values = [m * 10.0**first for m in (1, 2, 5, 10)] if last - first == 1 else [10.0**e for e in decades]
            return [Tick(self.at(v), digits(v, 1)) for v in values]
        least = (self.high - self.low) / (most - 1)
        size = 10.0 ** math.floor(math.log10(least))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= least * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        places = max(0, -math.floor(math.log10(step)))
        return [Tick(self.at(i * step), f"{i * step:.{places}f}") for i in range(first, last + 1)]


def log_scale(values: Iterable[float | None]) -> Scale | None:
    """Whole decades around the positive values; None if there are none."""
    positive = [v for v in values if v is not None and v > 0]
    if not positive:
        return None
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return Scale(10.0**first, 10.0 ** max(last, first + 1), logarithmic=True)


def place(scale: Scale | None, value: float | None) -> float | None:
    """Where `value` is on a logarithmic scale; None for what has no place there."""
    return scale.at(value) if scale and value is not None and value > 0 else None


def linear_scale(values: Iterable[float], margin: float = 0.08) -> Scale:
    """Around the values, with a margin."""
    values = list(values)
    low, high = min(values), max(values)
    pad = margin * ((high - low) or abs(high) or 1.0)
    return Scale(low - pad, high + pad)


def line(points: Iterable[tuple[float, float]]) -> str:
    """An SVG path through points."""
    return " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
