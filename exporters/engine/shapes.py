"""The shapes that an engine gets, from those that its graph leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporters.graphs.reading import inputs_of, steps_of
from exporters.settings import ShapeRange
from slimdiff.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporters.settings import EngineSettings

Dims = Mapping[str, Sequence[int | str]]
"""Per input, its dims; an open one by its name in the graph."""


def dims_of_inputs(model: ir.Model) -> dict[str, list[int | str]]:
    """Dims of a graph's inputs."""
    return {name: list(spec.shape) for name, spec in inputs_of(model).items()}


def engine_shapes(inputs: Dims, settings: EngineSettings) -> dict[str, Any]:
    """Every input's shape, as the settings fix it.

    Returns:
        `fixed` (input -> shape), or `profiles` (each: input -> `min`, `opt`, `max`).

    Raises:
        InputError: for an open dim that nothing fixes, and for shapes that the graph does not take.
    """
    if not settings.profiles:
        return {"fixed": _fix(inputs, settings.shapes, settings.batch)}
    profiles = []
    for profile in settings.profiles:
        ends = {end: _fix(inputs, getattr(profile, end), None) for end in ("min", "opt", "max")}
        profiles.append({name: {end: shapes[name] for end, shapes in ends.items()} for name in inputs})
    return {"profiles": profiles}


def profiles_of(shapes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `engine_shapes` gave as profiles: fixed shapes are one whose `min`, `opt` and `max` are the same."""
    return shapes.get("profiles") or [{n: dict.fromkeys(("min", "opt", "max"), s) for n, s in shapes["fixed"].items()}]


def part_shapes(inputs: Dims, whole: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of a denoiser's part that go with those of the whole: `shapes` or `profiles` of `EngineSettings`.

    Args:
        inputs: of the part; what crosses between parts follows by its open dims.
        whole: `engine_shapes` of the whole denoiser.
    """
    ranges: list[ShapeRange] = []
    for profile in profiles_of(whole):
        ends: dict[str, Any] = {}
        for end in ("min", "opt", "max"):
            own = {name: tuple(profile[name][end]) for name in inputs if name in profile}
            if inputs.get("timestep"):  # which is the whole graph's scalar, for each sample
                own["timestep"] = tuple(profile["sample"][end][:1])
            ends[end] = own
        if (shape_range := ShapeRange(**ends)) not in ranges:
            ranges.append(shape_range)
    return {"batch": None, "shapes": {}, "profiles": [], **fewest(ranges)}


def with_single_branches(inputs: Dims, whole: Mapping[str, Any], branches: int) -> dict[str, Any]:
    """Shapes of a denoiser that also takes what a step without guidance has: one branch, and not all of them.

    Kernels are chosen by profile, so that a batch that no profile takes yet gets one of its own.

    Args:
        whole: `engine_shapes` of it, for all branches together.
        branches: of guidance.

    Returns:
        `shapes` or `profiles` of `EngineSettings`.

    Raises:
        InputError: if the graph takes one batch alone, or a batch is no multiple of the branches.
    """
    if fixed := [name for name, dims in inputs.items() if dims and isinstance(dims[0], int)]:
        raise InputError(
            f"steps without guidance have a smaller batch, and the graph's {fixed[0]} has one of {inputs[fixed[0]][0]} "
            "alone: export the model with this schedule (slimdiff export --schedule)"
        )
    profiles = profiles_of(whole)
    batches = [{end: shape[0] for end, shape in profile["sample"].items()} for profile in profiles]
    for sizes, profile in zip(list(batches), list(profiles), strict=True):
        if sizes["opt"] % branches:
            raise InputError(
                f"steps without guidance run one of {branches} branches, and a batch of {sizes['opt']} is no multiple: "
                f"build for one that is (--batch {branches})"
            )
        own = {end: max(1, size // branches) for end, size in sizes.items()}
        if not any(taken["min"] <= own["opt"] <= taken["max"] for taken in batches):
            batches.append(own)
            profiles.append(
                {n: {end: [own[end], *s[1:]] if s else s for end, s in ends.items()} for n, ends in profile.items()}
            )
    ranges = [
        ShapeRange(**{end: {n: tuple(ends[end]) for n, ends in p.items()} for end in ("min", "opt", "max")})
        for p in profiles
    ]
    return {"batch": None, "shapes": {}, "profiles": [], **fewest(ranges)}


def fewest(ranges: Sequence[ShapeRange]) -> dict[str, Any]:
    """Ranges of shapes as `EngineSettings` have them: fixed shapes where there is but one shape."""
    if len(ranges) == 1 and ranges[0].min == ranges[0].max:
        return {"shapes": ranges[0].max}
    return {"profiles": list(ranges)}


def _fix(inputs: Dims, shapes: Mapping[str, Sequence[int]], batch: int | None) -> dict[str, list[int]]:
    sizes: dict[str, tuple[int, str]] = {}

    def bind(name: str, dim: str, size: int) -> None:
        step, side = steps_of(dim)
        if size % step:
            raise InputError(f"{name} has a side of {size}, and the graph takes multiples of {step}")
        said, by = sizes.setdefault(side, (size // step, name))
        if said != size // step:
            raise InputError(
                f"{side} is {said} in {by} and {size // step} in {name}: the graph has it the same in both"
            )

    for name, shape in shapes.items():
        if name not in inputs:
            raise InputError(f"the graph has no input {name!r}: it has {', '.join(inputs)}")
        for dim, size in _pairs(name, inputs[name], shape):
            bind(name, dim, size)
    for name, dims in inputs.items():
        if batch is not None and dims:
            if isinstance(dims[0], str):
                bind(name, dims[0], batch)
            elif dims[0] != batch:
                raise InputError(f"the graph's {name} has batch {dims[0]}, the engine was asked for batch {batch}")
    for name, dims in inputs.items():
        if any(isinstance(d, str) and steps_of(d)[1] not in sizes for d in dims):
            raise InputError(
                f"input {name} has open dims {shape_text(dims)}, and engines are built for fixed shapes: say a batch, "
                "shapes or profiles, or export with fixed shapes"
            )
    return {name: [_size(d, sizes) if isinstance(d, str) else d for d in dims] for name, dims in inputs.items()}


def _size(dim: str, sizes: Mapping[str, tuple[int, str]]) -> int:
    step, side = steps_of(dim)
    return step * sizes[side][0]


def _pairs(name: str, dims: Sequence[int | str], shape: Sequence[int]) -> list[tuple[str, int]]:
    fits = len(dims) == len(shape) and all(isinstance(d, str) or d == s for d, s in zip(dims, shape, strict=True))
    if not fits:
        raise InputError(f"input {name} has dims {shape_text(dims)}, the engine was asked for {shape_text(shape)}")
    return [(d, s) for d, s in zip(dims, shape, strict=True) if isinstance(d, str)]


def shape_text(dims: Sequence[int | str]) -> str:
    """`2x4x64x64`."""
    return "x".join(map(str, dims)) or "none (a scalar)"
