"""Numbers as people read them: few digits and a unit.

Pages have a non-breaking space before the unit and a true minus sign; `amount`, `size` and `relative` print the same in
the plain characters that every terminal has.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

NBSP = "\u00a0"
NONE = "undefined"
"""What a value is that JSON has as null: infinite, or not a number."""
_MINUS = "\u2212"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def digits(value: float, figures: int = 3) -> str:
    """`value` to that many significant figures, without an exponent, or `3.2e-5` where one is shorter."""
    if value == 0:
        return "0"
    size = int(f"{value:.{figures - 1}e}".partition("e")[2])
    if size < -3 or size >= 6:
        mantissa, _, exponent = f"{value:.{min(1, figures - 1)}e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{max(0, figures - 1 - size)}f}"
    return text.replace("-", _MINUS, 1) if text.startswith("-") else text


def scaled(value: float, unit: str = "") -> str:
    """A count with a decimal prefix and at most four figures: `859.5 M`, `22.61 MB`; small ones in full."""
    number, prefix = _with_prefix(value)
    return f"{digits(number, 4) if prefix else f'{value:g}'}{NBSP}{prefix}{unit}".rstrip(NBSP)


in_bytes = partial(scaled, unit="B")
"""`22.61 MB`."""


def _with_prefix(value: float) -> tuple[float, str]:
    return next(((value / size, prefix) for size, prefix in _PREFIXES if abs(value) >= size), (value, ""))


def amount(count: float) -> str:
    """For terminals, a count: `5.92 M`."""
    number, prefix = _with_prefix(count)
    return f"{number:.2f} {prefix}" if prefix else f"{count:g}"


def size(count: float) -> str:
    """For terminals, bytes: `22.6 MB`."""
    number, prefix = _with_prefix(count)
    return f"{number:.1f} {prefix}B" if prefix else f"{count:.0f} bytes"


def relative(dense: float, slim: float) -> str:
    """For terminals, how much smaller `slim` is: `-12.0 %`."""
    return f"{100 * (slim - dense) / dense:+.1f} %" if dense else "n/a"


def exact(value: float) -> str:
    """Every digit, in groups of three: `5 923 844`."""
    return f"{value:,.0f}".replace(",", "\u202f")


def percent(share: float, figures: int = 1) -> str:
    """`0.931` -> `93.1 %`."""
    return f"{signless(100 * share, figures)}{NBSP}%"


def change(share: float) -> str:
    """A relative change with its sign: `-0.12` -> `−12.0 %`."""
    return f"{signed(100 * share, 1)}{NBSP}%"


def signed(value: float, places: int) -> str:
    """`+1.2` or `−1.2`; what rounds to nothing has no sign."""
    text = f"{value:+.{places}f}"
    return f"{0:.{places}f}" if float(text) == 0 else text.replace("-", _MINUS)


def signless(value: float, places: int) -> str:
    """With a sign only below zero."""
    return signed(value, places).removeprefix("+")


def milliseconds(value: float) -> str:
    """`12.3 ms`, `1.24 s`."""
    return f"{digits(value)}{NBSP}ms" if value < 1000 else f"{digits(value / 1000)}{NBSP}s"


def duration(seconds: float) -> str:
    """`8.1 s`, `3 min 24 s`, `1 h 02 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def measured(value: Any) -> str:
    """A measured value of any kind, as a table shows it; one that is just below 1 shows by how much."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if 0.99 < value < 1:
            return f"{value:.{min(12, 1 - math.floor(math.log10(1 - value)))}f}".rstrip("0").rstrip(".")
        return digits(value)
    if isinstance(value, list | tuple):
        return " × ".join(map(str, value)) or "scalar"
    return str(value)
