"""Stable Diffusion's safety checker in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from exporters.registry import names, runtime_of
from exporters.runtimes.module import RuntimeModule, answer
from exporters.runtimes.session import Session
from slimdiff.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("slimdiff")


class SafetyChecker(RuntimeModule):
    """Drop-in for a pipeline's safety_checker, a StableDiffusionSafetyChecker.

    Raises:
        InputError: if the session is none.
    """

    tensor = "clip_input"

    def __init__(self, session: Session, config: dict[str, Any]):
        if set(session.inputs) != {"clip_input"} or set(session.outputs) != {"has_nsfw_concepts"}:
            raise InputError(f"{session.source} is no safety checker: its inputs are {', '.join(session.inputs)}")
        super().__init__(session, config)

    @classmethod
    def open_in(cls, folder: Path, name: str, runtime: str, threads: int | None = None) -> Self:
        """Open it in `exact_runtime(runtime)`."""
        return cls.open(folder / name, exact_runtime(runtime), threads)

    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Blacken what is not to be shown, in place, as diffusers does.

        Args:
            clip_input: `[B, 3, H, W]`, the images as the feature extractor gives them.
            images: a tensor or an array of B images, or a list of them.

        Returns:
            the images, and of each whether it was blackened.
        """
        found = answer(self.session, {"clip_input": clip_input})["has_nsfw_concepts"].tolist()
        for image in (image for image, unsafe in zip(images, found, strict=True) if unsafe):
            image[...] = 0
        if any(found):
            log.warning(
                "the safety checker blackened %d of %d images: try another prompt or seed", sum(found), len(found)
            )
        return images, found


def exact_runtime(runtime: str) -> str:
    """What runs the safety checker of a pipeline in this runtime: graphs are run, in the graph's own precision."""
    row = runtime_of(runtime)
    if row.takes != "graph":
        return "onnxruntime"
    rows = [runtime_of(name) for name in names("graph")]
    return next((r.name for r in rows if r.module == row.module and r.precision == "fp32"), runtime)
