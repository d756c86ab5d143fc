"""Progress bars on stderr, and the switch for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_shown = True


def show_progress(on: bool) -> None:
    """Show progress bars from now on, or none. The environment's `TQDM_DISABLE` is heeded, too."""
    global _shown
    _shown = on


def bar(iterable: Iterable[Any] | None = None, *, total: int | None = None, name: str, unit: str = "it", **more: Any):
    """tqdm's bar: around an iterable, or moved on by its `update`.

    Args:
        name: in front of the bar.
        more: of tqdm's own arguments. A bar that is disabled by `disable` stays so.
    """
    if not _shown:
        more["disable"] = True
    return tqdm(iterable, total=total, desc=name, unit=unit, **more)
