"""The schedule that an artifact's images are made by: the one beside it, or the one that a user names."""

from __future__ import annotations

from slimdiff.loading.naming import places_of
from slimdiff.schedule import FILE, Schedule

NONE = "none"
"""In the place of a file: no schedule, though there is one."""


def find_schedule(name: str, asked: str | None) -> Schedule | None:
    """The schedule of that file, else the one in the artifact's folder; None if there is none.

    Raises:
        InputError: if it is none, naming the file.
    """
    if asked == NONE:
        return None
    if asked is not None:
        return Schedule.load(asked)
    files = [place / FILE for place in places_of(name) if name != "demo" and (place / FILE).is_file()]
    return Schedule.load(files[0]) if files else None
