"""All calls of the denoiser that a picture takes: ranks, precision and schedule, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.full_size import Model
from benchmarks.gpu.cells import VARIANTS
from benchmarks.gpu.timing import Run, graphed, interval, median, timed
from benchmarks.gpu.unets import DTYPES, build, make_inputs, model_of
from slimdiff.denoising.scheduled import TorchPasses
from slimdiff.denoising.trajectory import map_tensors
from slimdiff.schedule import Schedule, ScheduleSettings, levels_of

FULL = "full"
"""The schedule that leaves nothing out."""


@torch.no_grad()
def measure_pictures(
    name: str,
    plans: Mapping[str, Any],
    how: ScheduleSettings,
    runtime: str,
    dtypes: list[str],
    images: int,
    device: str,
    rounds: int,
    seconds: float,
    steps: int,
) -> dict[str, Any]:
    """Every UNet by the full schedule and by this one: milliseconds, and speedups over the full dense picture.

    All are in the first dtype, and so is the picture that speedups are over; of the other dtypes the dense UNet by the
    full schedule alone is measured.
    """
    model = model_of(name, 2 * images)
    schedules = schedules_of(model, how, steps)
    runs: dict[tuple[str, str, str], Run] = {}
    for dtype in dtypes:
        inputs = make_inputs(model, device, DTYPES[dtype])
        first = dtype == dtypes[0]
        for variant in VARIANTS if first else VARIANTS[:1]:
            unet = build(model, plans[variant]["ranks"], device, DTYPES[dtype])
            for kind, schedule in schedules.items() if first else [(FULL, schedules[FULL])]:
                runs[dtype, variant, kind] = picture(TorchPasses(unet, schedule.depth), schedule, inputs, runtime)
    times = timed(runs, device, rounds, seconds)
    base = times[dtypes[0], VARIANTS[0], FULL]
    found: dict[str, Any] = {"rounds": len(base), "schedule": str(schedules["scheduled"]), "pictures": {}}
    for key, taken in times.items():
        ratios = [dense / own for dense, own in zip(base, taken, strict=True)]
        low, high = interval(ratios)
        found["pictures"]["/".join(key)] = {
            "median_ms": median(taken) * 1e3,
            "speedup": {"median": median(ratios), "low": low, "high": high},
        }
    return found


def schedules_of(model: Model, how: ScheduleSettings, steps: int) -> dict[str, Schedule]:
    """The full schedule, and this one."""
    unet: Any = build(model, {}, "meta", torch.float32)
    levels = levels_of(unet.config)
    assert levels is not None
    return {FULL: ScheduleSettings().make(levels, steps), "scheduled": how.make(levels, steps)}


def picture(passes: TorchPasses, schedule: Schedule, inputs: Mapping[str, Any], runtime: str) -> Run:
    """The calls of one picture, in a runtime of torch's; a shallow one reuses what a whole one of its batch left."""
    batch = len(inputs["sample"])
    kinds: dict[tuple[bool, bool], Run] = {}

    def part(value: torch.Tensor) -> torch.Tensor:
        return value[batch // 2 :] if value.ndim and len(value) == batch else value

    in_runtime: Callable[[Run], Run] = graphed if runtime == "graph" else lambda run: run
    for guided, whole in sorted(set(schedule.kinds()), reverse=True):
        arguments = dict(inputs) if guided else map_tensors(part, dict(inputs))
        if whole:
            kinds[guided, whole] = in_runtime(lambda a=arguments: passes.whole(a, schedule.depth))  # type: ignore[misc]
        else:
            assert schedule.depth is not None
            kept = passes.whole(arguments, schedule.depth)[1]
            kinds[guided, whole] = in_runtime(
                lambda a=arguments, k=kept: passes.shallow(a, schedule.depth, k)  # type: ignore[misc]
            )
    order = [kinds[kind] for kind in schedule.kinds()]

    def run() -> None:
        for call in order:
            call()

    return run


def table_of_pictures(pictures: Mapping[str, Any]) -> str:
    """What was measured of pictures so far, in Markdown."""
    lines = ["| model | runtime | images | dtype | UNet | schedule | ms | speedup (95 %) |", "| --- " * 8 + "|"]
    for cell, found in pictures.items():
        model, runtime, images = cell.split("/")
        for key, row in found["pictures"].items():
            dtype, variant, schedule = key.split("/")
            told = found["schedule"] if schedule != FULL else FULL
            speedup = "{median:.3f} ({low:.3f} to {high:.3f})".format(**row["speedup"])
            figures = (model, runtime, images, dtype, variant, told, f"{row['median_ms']:.4g}", speedup)
            lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines)
