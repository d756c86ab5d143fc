"""Progress bars on stderr, and the one switch that turns them off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_shown = True


def show_progress(on: bool) -> None:
    """Whether this process shows progress bars on stderr. tqdm's own switch, `TQDM_DISABLE=1`, works too.

    Args:
        on: True, the default, shows them.
    """
    global _shown
    _shown = on


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    name: str,
    unit: str = "it",
    hidden: bool = False,
    **more: Any,
) -> Any:
    """A progress bar: tqdm's.

    Args:
        iterable: to go through; without one, call `update` on the bar.
        total: number of steps; that of the iterable if not given.
        name: stands before the bar.
        unit: what a step is called.
        hidden: whether this bar stays away: another process shows the same one.
        more: further arguments of `tqdm.tqdm`.
    """
    if hidden or not _shown:
        more["disable"] = True  # not given otherwise: it would override TQDM_DISABLE
    return tqdm(iterable, total=total, desc=name, unit=unit, **more)
