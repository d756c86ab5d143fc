"""What steers a pipeline's UNet beside its prompt, and the picture that it is steered by."""

from __future__ import annotations

import inspect
from typing import Any

from slimdiff.errors import InputError


def nets_of(pipeline: Any) -> list[Any]:
    """The ControlNets of a pipeline, or its T2I-Adapters; none of a pipeline that nothing steers."""
    part = getattr(pipeline, "controlnet", None)
    part = part if part is not None else getattr(pipeline, "adapter", None)
    several = next((found for name in ("nets", "adapters") if (found := getattr(part, name, None)) is not None), None)
    return list(several) if several is not None else [part] * (part is not None)


def control_name(pipeline: Any) -> str | None:
    """The argument of the pipeline's call for the picture that steers it; None if none does.

    `control_image` where images are made from images, too, and of the newer models; else `image`.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    return "control_image" if "control_image" in takes else "image" if nets_of(pipeline) else None


def join_controls(pipeline: Any, columns: dict[str, list[Any]]) -> None:
    """Have what several ControlNets are given once for a batch, as a picture each: no pipeline takes other pictures.

    Raises:
        InputError: if the images of the batch have different ones.
    """
    column = columns.get(str(control_name(pipeline)), []) if len(nets_of(pipeline)) > 1 else []
    if column and all(isinstance(value, list) for value in column):
        if any(value != column[0] for value in column):
            raise InputError("several ControlNets steer all images of a batch by the same pictures: take a batch of 1")
        columns[str(control_name(pipeline))] = column[0]
