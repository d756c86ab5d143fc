"""The schedule that an artifact's images are made by: the one beside it, or the one that a user names."""

from __future__ import annotations

from pathlib import Path

from exporters.layout import CONFIG, read_config, schedule_beside
from slimdiff import embedded
from slimdiff.loading.naming import places_of
from slimdiff.schedule import FILE, Schedule

NONE = "none"
"""In the place of a file: no schedule, though there is one."""


def find_schedule(name: str, asked: str | None) -> Schedule | None:
    """The schedule of that file, else the one in the artifact's folder or its pipeline's; None if there is none.

    Raises:
        InputError: if it is none, naming the file.
    """
    if asked == NONE:
        return None
    if asked is not None:
        return Schedule.load(asked)
    if name == "demo":  # the embedded model has none, whatever is called so here
        return None
    files = [place / FILE for place in places_of(name) if (place / FILE).is_file()]
    file = files[0] if files else schedule_beside(Path(name))
    return None if file is None else Schedule.load(file)


def check_schedule(name: str, schedule: Schedule | None) -> None:
    """Refuse a schedule of another UNet than the artifact's, by its configuration on the disk; nothing is opened.

    Raises:
        InputError: for another number of levels.
    """
    root = embedded.path() if name == "demo" else Path(name)
    file = next((file for file in (root / "unet" / CONFIG, root / CONFIG) if file.is_file()), None)
    if schedule is not None and file is not None:
        schedule.check(read_config(file), f"the schedule of {name}")
