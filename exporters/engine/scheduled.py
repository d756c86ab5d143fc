"""What a schedule asks of a UNet's graphs and engines: the shallow one, and the batches that steps have."""

from __future__ import annotations

from pathlib import Path

from exporters.engine.check import read_engine
from exporters.graphs.reading import depth_of, read_graph
from exporters.layout import ENGINE, SHALLOW, SHALLOW_ENGINE, pipeline_around, schedule_beside, shallow_of
from slimdiff.errors import InputError
from slimdiff.loading.naming import read_index
from slimdiff.schedule import Schedule


def schedule_of(graph: Path) -> Schedule | None:
    """The schedule that lies beside a graph, or beside the index of its pipeline.

    Raises:
        InputError: if the file is none.
    """
    file = schedule_beside(graph)
    return None if file is None else Schedule.load(file)


def branches_of(graph: Path, schedule: Schedule | None) -> int:
    """Of guidance, in a UNet's calls, if steps of the schedule go without; 1 otherwise.

    Args:
        graph: its file, or the folder with its parts.

    Raises:
        InputError: if the shallow graph that the schedule asks for is not there.
    """
    if schedule is None:
        return 1
    find_shallow(graph, schedule)
    if schedule.guides_always():
        return 1
    from slimdiff.denoising.scheduled import guided_branches  # torch and diffusers take seconds

    folder = pipeline_around(graph)
    index = {} if folder is None else read_index(folder)
    return guided_branches(str(index.get("_class_name")).removeprefix("ORT"))


def find_shallow(unet: Path, schedule: Schedule, *, engine: bool = False) -> Path | None:
    """The shallow graph beside a UNet's, or the folder of its engine, that a schedule asks for; None if for none.

    Args:
        unet: the file, or folder, of its graph or engine.

    Raises:
        InputError: if there is none, or it begins with another up block than the schedule's.
    """
    if schedule.depth is None:
        return None
    shallow = shallow_of(unet, engine=engine)
    if shallow is None:
        folder, lacks = unet if unet.is_dir() else unet.parent, f"{SHALLOW_ENGINE}/{ENGINE}" if engine else SHALLOW
        raise InputError(f"{folder} has no {lacks}, and the schedule reuses {schedule.depth}: {remedy(engine)}")
    depth = read_engine(shallow)["parts"].get("depth") if engine else depth_of(read_graph(shallow))
    if depth != schedule.depth:
        raise InputError(f"{shallow} begins with {depth}, and the schedule reuses {schedule.depth}: {remedy(engine)}")
    return shallow


def remedy(engine: bool) -> str:
    """What to do where graphs or engines cannot follow a schedule; right for every command that finds that out."""
    return (
        "build it from a folder that was exported with this schedule or none"
        if engine
        else "export the model with this schedule or none (slimdiff export --schedule)"
    )
