"""Progress bars on stderr, and the one switch that turns them off."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

_shown = True


def show_progress(shown: bool) -> None:
    """Show progress bars in this process, or none.

    tqdm's own switch, `TQDM_DISABLE=1` in the environment, works too.
    """
    global _shown
    _shown = shown


def progress_is_shown() -> bool:
    """Whether this process shows progress bars."""
    return _shown


def bar(over: Iterable[Any] | None = None, name: str = "", unit: str = "it", **more: Any) -> tqdm:
    """A progress bar over things, or over `total` steps that are counted by `update`.

    A bar inside a bar goes when it is full. Of the processes of `torchrun` or `accelerate launch`, the first shows
    bars alone.
    """
    if not _shown or os.environ.get("RANK", "0") != "0":  # False would overrule the environment's switch
        more["disable"] = True
    return tqdm(over, desc=name, unit=unit, **{"leave": None, **more})


AFTER = 2.0
"""Seconds of work before it is shown, where most work of its kind takes less."""


@contextmanager
def working(name: str) -> Iterator[None]:
    """Show the time that has passed on work that counts no steps, once it takes longer than `AFTER`.

    Functions are decorated with it, too.
    """
    done, stream = Event(), sys.stderr  # libraries are made quiet meanwhile, and this is not

    def show() -> None:
        start = time.time()
        if not done.wait(AFTER):
            with bar(name=name, bar_format="{desc} {elapsed}", leave=False, file=stream) as shown:
                shown.start_t = start
                while not done.wait(0.5):
                    shown.refresh()

    thread = Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
