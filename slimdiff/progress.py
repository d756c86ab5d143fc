"""Progress bars on stderr, and the one switch that turns them off."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_shown = True


def show_progress(shown: bool) -> None:
    """Show progress bars in this process, or none.

    tqdm's own switch, `TQDM_DISABLE=1` in the environment, works too.
    """
    global _shown
    _shown = shown


def bar(over: Iterable[Any] | None = None, name: str = "", unit: str = "it", **more: Any) -> tqdm:
    """A progress bar over things, or over `total` steps that are counted by `update`.

    A bar inside a bar goes when it is full. Of the processes of `torchrun` or `accelerate launch`, the first shows
    bars alone.
    """
    if not _shown or os.environ.get("RANK", "0") != "0":  # False would overrule the environment's switch
        more["disable"] = True
    return tqdm(over, desc=name, unit=unit, **{"leave": None, **more})
