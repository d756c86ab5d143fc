"""The schedule that an artifact's images are made by: the one beside it, or the one that a user names."""

from __future__ import annotations

import logging
from contextlib import suppress

from slimdiff.errors import InputError
from slimdiff.loading.naming import places_of
from slimdiff.schedule import FILE, Schedule

log = logging.getLogger("slimdiff")

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


def refuse_schedule(name: str, what: str) -> None:
    """Refuse an artifact whose schedule would be lost: what is made of it takes none.

    Raises:
        InputError: if there is a schedule beside it.
    """
    if find_schedule(name, None) is not None:
        raise InputError(
            f"{name} has a schedule, and {what} takes none: with one, run the model or its ONNX folder; without, take "
            f"{FILE} out, or export with --schedule none"
        )


def warn_of_schedule(name: str) -> None:
    """Warn that a slim model does not carry the schedule of the model that it is made of."""
    with suppress(InputError):  # a file of that name may be anything of the user's, and none of it is read here
        if find_schedule(name, None) is not None:
            log.warning(
                "%s has a schedule, which was made for it alone: the slim model gets none (make it one with slimdiff "
                "schedule, or name this one with --schedule)",
                name,
            )
