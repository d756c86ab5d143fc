"""The matrix of a recipe: further exports of its slim model, and what all settings of a recipe have in common."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from exporters.registry import names
from exporters.settings import parse_sizes
from slimdiff.settings import MOST_PIXELS
from slimdiff.settings import Settings as Strict


class Settings(Strict, frozen=True, populate_by_name=True):
    """What all settings have in common: unknown keys are errors, values never change."""


class ImageShape(Settings):
    """How many images go through a denoiser together, and their size."""

    height: int = Field(ge=8, le=MOST_PIXELS, multiple_of=8)
    """Pixels, a multiple of 8 as diffusers asks for."""
    width: int = Field(ge=8, le=MOST_PIXELS, multiple_of=8)
    """Pixels, a multiple of 8 too."""
    images: int = Field(1, ge=1, le=1024)
    """In one call, in which guidance takes two samples of each."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        """Also of `512x512`, or of `4x512x512` for four images."""
        if not isinstance(value, str):
            return value
        sizes = parse_sizes(value)
        if sizes is None or len(sizes) not in (2, 3):
            raise ValueError("write a size such as 512x512, or 4x512x512 for four images at once")
        return dict(zip(("width", "height", "images"), reversed(sizes), strict=False))

    def __str__(self) -> str:
        return f"{self.images}x{self.height}x{self.width}"


class MatrixStage(Settings):
    """Further exports of the slim model: a cell for every target with every shape in every precision."""

    targets: tuple[str, ...] = Field(("onnxruntime",), min_length=1)
    """A runtime for graphs, such as `onnxruntime` or `openvino`, or the compute capability, such as `sm89`, of a GPU
    that TensorRT-RTX builds an engine for."""
    shapes: tuple[ImageShape, ...] = Field(min_length=1)
    """Such as `512x512` (height and width, pixels), or `4x512x512` for four images at once."""
    precision: tuple[Literal["fp32", "fp16", "int8"], ...] = Field(("fp32",), min_length=1)
    """Of graphs and engines."""

    @field_validator("targets", "precision", "shapes")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({str(v) for v in value}) < len(value):
            raise ValueError("the same is there twice")
        return value

    @field_validator("targets")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for target in value:
            if target not in names("graph") and not re.fullmatch(r"sm\d{2,3}", target):
                raise ValueError(f"a target is a GPU such as sm89, or one of {', '.join(names('graph'))}")
        return value
