"""Progress bars on stderr, and the one switch that turns them off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_hidden: dict[str, bool] = {}


def show_progress(shown: bool) -> None:
    """Show progress bars in this process, or none.

    tqdm's own switch, `TQDM_DISABLE=1` in the environment, works too.
    """
    _hidden.clear()
    if not shown:
        _hidden["disable"] = True


def bar(over: Iterable[Any] | None = None, name: str | None = None, unit: str = "it", **more: Any) -> tqdm:
    """A progress bar over things, or over `total` steps that are counted by `update`.

    Args:
        name: what is under way; None for no bar.
        more: further arguments of `tqdm`.
    """
    hidden = {"disable": True} if name is None else _hidden
    return tqdm(over, desc=name, unit=unit, **hidden, **more)
