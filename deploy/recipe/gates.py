"""Bounds that a build is held to: one field a gate, named for the direction and the figure."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, ValidationError

from deploy.quality.metrics import METRICS
from slimdiff.errors import InputError
from slimdiff.settings import Settings

MEASURED_ELSEWHERE = ("parity", "min_speedup")
"""Gates of a build that a comparison alone cannot decide."""


class Gates(Settings):
    """Bounds that must hold for the build to succeed; a gate that is null is left out.

    Where a figure has a 95 % interval, all of it must keep the bound: a gate is inconclusive if the bound lies within.
    """

    parity: bool = True
    """Whether the exported slim model must agree with the slim model in torch."""
    min_speedup: float | None = Field(None, gt=0, le=1000)
    """Least latency of dense over latency of slim."""
    max_quality_loss: float | None = Field(None, ge=0, le=100)
    """Most points of caption accuracy that may be lost (models with an evaluator only)."""
    max_noise_error: float | None = Field(None, gt=0, le=1000)
    """Largest relative mean squared change of the noise prediction."""
    min_psnr_db: float | None = Field(None, gt=0, le=1000)
    """Least PSNR of slim images to dense ones."""
    min_ssim: float | None = Field(None, gt=0, le=1)
    """Least SSIM of slim images to dense ones."""
    max_lpips: float | None = Field(None, gt=0, le=1000)
    """Largest LPIPS of slim images to dense ones."""
    min_clip: float | None = Field(None, gt=0, le=100)
    """Least CLIP score of slim images and their captions."""
    max_fid: float | None = Field(None, gt=0, le=1e6)
    """Largest FID of slim images, to the reference where the recipe has one, else to dense ones."""

    @classmethod
    def of_comparison(cls, texts: Sequence[str]) -> Gates:
        """Gates of a comparison, from texts such as `max_lpips=0.1`.

        Raises:
            InputError: naming the gates that there are, or what the bound must be.
        """
        names = [name for name in cls.model_fields if name not in MEASURED_ELSEWHERE]
        bounds: dict[str, str] = {}
        for text in texts:
            name, _, bound = text.partition("=")
            if name not in names or name in bounds:
                fault = "is there twice" if name in bounds else f"is none of {', '.join(names)}"
                raise InputError(f"--gate {text}: {name!r} {fault}; write NAME=BOUND, such as max_lpips=0.1")
            bounds[name] = bound
        try:
            return cls.model_validate({"parity": False, **bounds})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            reason = first["msg"][:1].lower() + first["msg"][1:]
            raise InputError(f"--gate {name}={bounds[name]}: {reason}") from error

    def metrics(self) -> dict[str, str]:
        """The metrics that gates are of, by the gate's key."""
        keys = (key for key in type(self).model_fields if getattr(self, key) is not None)
        return {key: name for key in keys if (name := key.partition("_")[2]) in METRICS}
