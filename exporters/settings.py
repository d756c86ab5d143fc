"""Every knob of exports, engines and measurements on one page. Imports neither torch nor a runtime."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from exporters.registry import names
from slimdiff.settings import MOST, MOST_AT_ONCE, Settings

LEAST_ROUNDS = 3
"""Blocks of each side of a process pair, at least: a trimmed mean needs them."""


@dataclass(frozen=True)
class OneOf:
    """Of a field: a name that is among `choices()` when the value is checked; else the error is a `Literal`'s."""

    choices: Callable[[], tuple[str, ...]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, core_schema.str_schema(strict=True))

    def _check(self, value: str) -> str:
        if value not in (known := self.choices()):
            *first, last = map(repr, known)
            raise PydanticCustomError(
                "literal_error", "Input should be {expected}", {"expected": f"{', '.join(first)} or {last}"}
            )
        return value


SessionRuntime = Annotated[str, OneOf(partial(names, "graph", "engine"))]
"""What runs a graph or an engine; see `exporters.registry`."""
TableRuntime = Annotated[str, OneOf(lambda: ("torch", *names("graph")))]
"""Where a latency table can be measured: torch, and whatever takes a graph."""


class ExportSettings(Settings):
    """How a module becomes a graph."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of weights and products. fp16 is for GPUs: on CPUs it is slower than fp32. int8 is the UNet's alone: its inputs
    and outputs, and all else, stay in fp32."""
    opset: int = Field(default=22, ge=21, le=22)
    """From 21 GroupNormalization is one node; from 23 attention would be one that TensorRT-RTX does not take slim."""
    keep_fp32: list[str] = Field(default_factory=list)
    """Paths, or patterns such as `*.attn1`, of UNet modules that overflow: an fp16 or int8 graph computes them in fp32.
    `vae` is the VAE, and paths and patterns that begin with `vae.` are of its modules (`vae.decoder.up_blocks.2`)."""
    int8_error: float = Field(default=1e-3, gt=0, le=1)
    """Most that int8 may change the noise prediction, as its relative mean squared error; layers that cost more for
    their multiply-adds than others stay in fp32."""
    int8_calls: int = Field(default=32, ge=1, le=MOST)
    """Recorded denoiser calls, of all times, that int8 is calibrated on, 8 of each image."""
    dynamic_batch: bool = False
    """Leave the batch open, for ONNX Runtime. Engines want it fixed."""
    dynamic_size: bool = False
    """Leave height and width open, in the steps that the model's down-scaling makes. Engines want them fixed."""
    split: bool = False
    """Write the UNet in parts, for slimdiff's runtimes: graphs of what the prompt and the time alone decide, which run
    once, and the graph of a step, which takes both. optimum opens the whole one alone."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """More arguments of the pipeline's call that the graphs are for, such as `max_sequence_length`."""
    safety_checker: bool = True
    """Keep the pipeline's safety checker, where it has one; without it no image is checked."""


def of_vae(path: str) -> bool:
    """Whether a path or pattern of `keep_fp32` names the VAE, or modules of it."""
    return path.partition(".")[0] == "vae"


def parse_sizes(text: str) -> list[int] | None:
    """Sizes as trtexec and Polygraphy write them, `2x4x64x64`; None for any other text, or a size of seven digits."""
    parts = text.split("x")
    return [int(n) for n in parts] if all(n.isascii() and n.isdigit() and len(n) < 7 for n in parts) else None


def _shape(value: Any) -> Any:
    return parse_sizes(value) or value.split("x") if isinstance(value, str) else value


Shape = Annotated[tuple[Annotated[int, Field(ge=1, lt=2**31)], ...], BeforeValidator(_shape)]


class ShapeRange(Settings):
    """One optimisation profile: the shapes that an engine takes, and those that it is fastest at."""

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


class EngineSettings(Settings):
    """What an engine is built with, and for which GPUs."""

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """`auto` takes what is installed; TensorRT-RTX where there is no GPU, as TensorRT builds on none but its own."""
    targets: list[str] = []
    """Compute capabilities to build for (`sm89`, `sm120`), TensorRT-RTX only; none: the GPU that is here."""
    batch: int | None = Field(default=None, ge=1, le=MOST_AT_ONCE)
    """Batch of the engine, for graphs that leave it open; with guidance, twice the images."""
    shapes: dict[str, Shape] = {}
    """Fixed shapes by input (`sample: 2x4x64x64`), for graphs that leave more open; inputs whose open dims are named
    alike in the graph follow."""
    profiles: list[ShapeRange] = []
    """Ranges of shapes in place of fixed ones. A static engine is faster: build one per shape if there are few."""
    workspace_gib: float | None = Field(default=None, gt=0, le=MOST)
    """Most memory that a layer may use while it runs, GiB; TensorRT's own default if not given."""
    tf32: bool = False
    """Whether fp32 products may round their factors to TF32's 10 bits; then fp32 parity bounds do not hold."""
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


class BenchSettings(Settings):
    """How a pair of processes is timed, and for how long pairs are added."""

    threads: int = Field(default=1, ge=0, le=MOST_AT_ONCE)
    """Of runtimes on the CPU, which are kept on as many cores; 0: the runtime's own choice, on all cores. One thread is
    the least disturbed."""
    batch: int = Field(default=2, ge=1, le=MOST_AT_ONCE)
    """Samples in a call, where the artifact does not fix it."""
    warmup: int = Field(default=3, ge=1, le=MOST)
    """Runs, at least, before a process counts as warm."""
    rounds: int | None = Field(default=None, ge=LEAST_ROUNDS, le=MOST)
    """Blocks of each side; by default 3 to 60, as many as take two seconds together, or as long as opening both."""

    processes: int | None = Field(default=None, ge=2, le=MOST)
    """Process pairs; by default as many as a verdict takes, 6 to 28, and 6 without a gate."""
    max_seconds: float = Field(default=140, gt=0, le=100 * MOST)
    """No pair is begun that would end later; two are always measured."""


class TableSettings(Settings):
    """How the table is measured."""

    runtime: TableRuntime = "onnxruntime"
    """Where latency counts."""
    threads: int | None = Field(None, ge=1, le=MOST_AT_ONCE)
    """Threads of the runtime; its own choice if not given."""
    ranks: int = Field(6, ge=2, le=MOST)
    """Ranks measured per layer, spread evenly from the smallest to the dense one; between them, lines."""
    rounds: int = Field(40, ge=3, le=MOST)
    """Runs, at most, of every layer at every rank and of the whole models; the median counts."""
    interval: float = Field(0.03, gt=0, le=1)
    """Width of a median's interval of 95 %, as a share of it, at which its runs end."""
