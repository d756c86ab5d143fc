"""What steers a pipeline's UNet beside its prompt, and the picture that it is steered by."""

from __future__ import annotations

import inspect
from typing import Any

from slimdiff.errors import InputError


def nets_of(pipeline: Any) -> list[Any]:
    """The ControlNets of a pipeline, or its T2I-Adapter; none of a pipeline that nothing steers."""
    part = getattr(pipeline, "controlnet", None)
    part = part if part is not None else getattr(pipeline, "adapter", None)
    several = getattr(part, "nets", None)
    return list(several) if several is not None else [part] * (part is not None)


def control_name(pipeline: Any) -> str | None:
    """The argument of the pipeline's call for the picture that steers it; None if none does.

    `control_image` where images are made from images, too, and of the newer models; else `image`.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    return "control_image" if "control_image" in takes else "image" if nets_of(pipeline) else None


def has_ip_adapter(pipeline: Any) -> bool:
    """Whether an IP-Adapter is loaded into a pipeline's UNet, which then takes a picture as a prompt."""
    projection = getattr(getattr(pipeline, "unet", None), "encoder_hid_proj", None)
    return hasattr(projection, "image_projection_layers")


def join_controls(pipeline: Any, columns: dict[str, list[Any]]) -> None:
    """Give once for a batch what pipelines take once: a picture for each of several ControlNets or IP-Adapters.

    Raises:
        InputError: if the images of the batch have different ones.
    """
    shared = {"ip_adapter_image": "an IP-Adapter takes"}
    if len(nets_of(pipeline)) > 1:
        shared[str(control_name(pipeline))] = "several ControlNets take"
    for name in shared.keys() & columns.keys():
        first, *others = columns[name]
        if any(other != first for other in others):
            raise InputError(f"{shared[name]} the same pictures for all images of a batch: take a batch of 1")
        columns[name] = first if isinstance(first, list) else [first]
