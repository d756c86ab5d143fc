"""What an engine is built with."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator


def _shape(value: Any) -> Any:
    """`2x4x64x64`, as trtexec and Polygraphy write shapes."""
    return [int(n) if n.isdigit() else n for n in value.split("x")] if isinstance(value, str) else value


Shape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_shape)]


class ShapeRange(BaseModel):
    """One optimisation profile: the shapes that an engine takes, and those that it is fastest at."""

    model_config = ConfigDict(extra="forbid")

    min: dict[str, Shape]
    """Smallest shape, by input. Inputs whose open dims are named alike in the graph (`batch`) follow."""
    opt: dict[str, Shape]
    """The shape that kernels are chosen for."""
    max: dict[str, Shape]
    """Largest shape."""

    @model_validator(mode="after")
    def _in_order(self) -> ShapeRange:
        if not self.min.keys() == self.opt.keys() == self.max.keys():
            raise ValueError("min, opt and max of a profile name the same inputs")
        for name, low in self.min.items():
            best, high = self.opt[name], self.max[name]
            if not len(low) == len(best) == len(high) or any(
                not a <= b <= c for a, b, c in zip(low, best, high, strict=True)
            ):
                raise ValueError(f"a profile goes up from min over opt to max, and {name}'s does not")
        return self


class EngineSettings(BaseModel):
    """What an engine is built with, and for which GPUs."""

    model_config = ConfigDict(extra="forbid")

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """`auto` takes what is installed; TensorRT-RTX where there is no GPU, as TensorRT builds on none but its own."""
    targets: list[str] = []
    """Compute capabilities to build for (`sm89`, `sm120`), TensorRT-RTX only; none: the GPU that is here."""
    batch: int | None = Field(default=None, ge=1)
    """Batch of the engine, for graphs that leave it open; with guidance, twice the images."""
    shapes: dict[str, Shape] = {}
    """Fixed shapes by input (`sample: 2x4x64x64`), for graphs that leave more open; inputs whose open dims are named
    alike in the graph follow."""
    profiles: list[ShapeRange] = []
    """Ranges of shapes in place of fixed ones. A static engine is faster: build one per shape if there are few."""
    workspace_gib: float | None = Field(default=None, gt=0)
    """Most memory that a layer may use while it runs, GiB; TensorRT's own default if not given."""
    tf32: bool = False
    """Whether fp32 products may round their factors to TF32's 10 bits; then fp32 parity bounds do not hold."""
    strip_weights: bool = False
    """Leave the weights out of the engine and fill them in from the ONNX graph whenever it is opened; needs a GPU."""
    check_memory: bool = True
    """Refuse a build that is estimated to need more memory than there is."""

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: list[str]) -> list[str]:
        for target in targets:
            if not re.fullmatch(r"sm\d{2,3}", target):
                raise ValueError(f"a target is named like sm89, not {target!r}")
        return targets

    @field_validator("shapes", "profiles")
    @classmethod
    def _one_way(cls, value: Any, info: ValidationInfo) -> Any:
        others = [name for name in ("batch", "shapes") if name != info.field_name and info.data.get(name)]
        if value and others:
            raise ValueError(f"shapes are said in one way, and {' and '.join(others)} is given too")
        return value
