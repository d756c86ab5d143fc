"""Bounds that a build is held to: one field a gate, named for the direction and the figure."""

from __future__ import annotations

from pydantic import Field

from deploy.quality.metrics import METRICS
from slimdiff.settings import Settings


class Gates(Settings):
    """Bounds that must hold for the build to succeed; a gate that is null is left out."""

    parity: bool = True
    """Whether the exported slim model must agree with the slim model in torch."""
    min_speedup: float | None = Field(None, gt=0, le=1000)
    """Least latency of dense over latency of slim; inconclusive where its 95 % interval holds the bound."""
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

    def metrics(self) -> dict[str, str]:
        """The metrics that gates are of, by the gate's key."""
        keys = (key for key in type(self).model_fields if getattr(self, key) is not None)
        return {key: name for key in keys if (name := key.partition("_")[2]) in METRICS}
