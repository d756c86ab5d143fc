"""Choosing a schedule: what each step's guidance and depth are worth, measured on final images, and the best of all.

Each measurement makes the same images again with one thing left out, to the end: errors of early steps travel, and only
the end shows what became of them. Steps before it are the full schedule's own, and are not computed again. Norms of the
changes add up, as if all went the same way: neighbouring steps nearly do. Under that sum the choice is exact, by
dynamic programming over the steps; what the chosen schedule really changes is measured at last.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.scheduled import Scheduled, TorchPasses, guides_as_known, shallow_unet
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Inputs, record_calls, sample_batch, with_denoiser
from slimdiff.errors import InputError
from slimdiff.planning.costs import shallow_share
from slimdiff.planning.pictures import StepCosts
from slimdiff.progress import bar
from slimdiff.prompts import check_inputs
from slimdiff.schedule import Schedule, levels_of
from slimdiff.settings import Sampling

log = logging.getLogger("slimdiff")
LONGEST = 5
"""Steps at most from one whole step to the next."""
_UNIT = 1_000_000
"""Of costs, a whole call of one branch: they are whole numbers, so that equal ones are equal."""

Kinds = list[tuple[bool, bool]]
"""Guided and whole, of each step."""


class _Replayed(TorchPasses):
    """A UNet whose first calls are answered from a record."""

    def __init__(self, unet: Any, recorded: list[Tensor], first: int):
        super().__init__(unet)
        self.recorded, self.first, self.calls = recorded, first, 0

    def whole(self, arguments: Mapping[str, Any], depth: str | None) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        if self.calls <= self.first:
            return self.recorded[self.calls - 1], None
        noise, kept = super().whole(arguments, depth)
        if self.first < 0:
            self.recorded.append(noise)
        return noise, kept


class Images:
    """The final latents of some images by the full schedule, and how far any other schedule is from them.

    Raises:
        InputError: if the pipeline's denoiser is no UNet, or its images do not begin with the first step.
    """

    @own_torch_state()
    def __init__(self, pipeline: DiffusionPipeline, prompts: Sequence[Inputs], sampling: Sampling):
        self.pipeline: Any = in_float32(pipeline)
        self.prompts, self.sampling = check_inputs(prompts), sampling
        if not self.prompts:
            raise InputError("a schedule is measured on images: give at least one prompt")
        levels = levels_of(getattr(getattr(self.pipeline, "unet", None), "config", {}))
        if levels is None:
            raise InputError(f"{type(pipeline).__name__} has no UNet with up blocks: schedules are of those")
        if "strength" in inspect.signature(pipeline.__call__).parameters:
            raise InputError(
                f"{type(pipeline).__name__} begins in the middle, which says nothing of the first steps: measure the "
                "pipeline that makes images of prompts, and give its schedule to this one"
            )
        self.levels = levels
        batch = sampling.batch
        every = range(len(self.prompts))
        self.batches = [every[start : start + batch] for start in every[::batch]]
        self.recorded: list[list[Tensor]] = [[] for _ in self.batches]
        self.reference = [self._run(None, -1, number) for number in range(len(self.batches))]
        self.steps = len(self.recorded[0])
        self.call = record_calls(self.pipeline, self.prompts[:1], sampling.model_copy(update={"batch": 1}))[0]
        self.branches = len(self.recorded[0][0]) // len(self.batches[0])

    def _run(self, schedule: Schedule | None, first: int, number: int, unet: nn.Module | None = None) -> Tensor:
        """The final latents of a batch `[B, C, H, W]`, the first calls from the record."""
        passes = _Replayed(unet or self.pipeline.unet, self.recorded[number], first)
        if schedule is None:
            schedule = Schedule(levels=self.levels, steps=1, guided=[0], whole=[0])
        other = with_denoiser(self.pipeline, Scheduled(passes, schedule))
        latents: Any = sample_batch(other, self.prompts, self.batches[number], self.sampling)
        return torch.as_tensor(latents).double()

    @property
    def guidance_can_go(self) -> bool:
        """Whether steps can run without guidance."""
        return self.branches > 1 and guides_as_known(self.pipeline)

    def depths(self) -> list[str]:
        """All that can be reused."""
        depths = [f"up_blocks.{number}" for number in range(1, self.levels)]
        try:
            for depth in depths:
                shallow_unet(self.pipeline.unet, depth)
        except InputError as error:
            log.info("no depth is reused: %s", error)
            return []
        return depths

    @own_torch_state()
    def change(self, schedule: Schedule, unet: nn.Module | None = None) -> float:
        """Relative mean squared change of the final latents, sum |scheduled - full|^2 / sum |full|^2.

        Args:
            unet: a slim one in the place of the pipeline's.
        """
        kinds = schedule.kinds()
        odd = next((step for step, kind in enumerate(kinds) if kind != (True, True)), None) if unet is None else 0
        if odd is None:
            return 0.0
        # A step that reuses takes what the whole one before it leaves, which so is run.
        first = odd if kinds[odd][1] else odd - 1
        found = [self._run(schedule, first, number, unet) for number in range(len(self.batches))]
        pairs = list(zip(found, self.reference, strict=True))
        total = sum(float(full.square().sum()) for full in self.reference)
        return sum(float((a - b).square().sum()) for a, b in pairs) / total

    def schedule(self, kinds: Kinds, depth: str | None, **made_by: Any) -> Schedule:
        """Of these kinds of steps, for as many.

        Raises:
            InputError: for a depth that the UNet does not have.
        """
        whole = [step for step, (_, whole) in enumerate(kinds) if whole]
        content: dict[str, Any] = {
            "levels": self.levels,
            "steps": len(kinds),
            "depth": depth if len(whole) < len(kinds) else None,
            "guided": [step for step, (guided, _) in enumerate(kinds) if guided],
            "whole": whole,
            "made_by": made_by,
        }
        return Schedule.parse(content, "the schedule")


@dataclass
class Changes:
    """What was measured: norms of the relative change of the final latents.

    Attributes:
        depth: that is reused; None if there is none to.
        shallow: what a shallow call costs, as a share of a whole one.
        branches: of guidance.
        unguided: by step, without its guidance; infinite where that cannot be left out.
        reused: by whole step and number of steps that reuse it.
        times: what each kind of step takes, and a picture beside its steps, measured; multiply-adds count without.
    """

    depth: str | None
    shallow: float
    branches: int
    unguided: list[float]
    reused: list[dict[int, float]] = field(default_factory=list)
    times: StepCosts | None = None

    @property
    def costs(self) -> StepCosts:
        """What a picture costs: measured, or else counted."""
        return self.times or StepCosts.of_macs(self.shallow, self.branches)


def measure_changes(
    images: Images, depths: Sequence[str] | None = None, times: Mapping[str | None, StepCosts] | None = None
) -> list[Changes]:
    """One for each depth, or for guidance alone if the UNet has none.

    Args:
        depths: that are tried; all that the UNet has if not given.
        times: by depth, what steps take where speed is measured; None as a key, where there is no depth.

    Raises:
        InputError: if neither guidance nor depth can be left out.
    """
    steps, full = images.steps, [(True, True)] * images.steps
    known, times = images.guidance_can_go, times or {}
    depths = images.depths() if depths is None else depths
    if not known and not depths:
        raise InputError(
            f"{type(images.pipeline).__name__} has no guidance and no depth that a schedule could leave out"
        )
    jobs: list[tuple[str | None, int, int]] = [(None, step, 0) for step in range(steps) if known]
    for depth in depths:
        for step in range(steps - 1):
            longest = min(LONGEST, steps - step) - 1
            jobs += [(depth, step, count) for count in sorted({1, longest})]
    found: dict[tuple[str | None, int, int], float] = {}
    for depth, step, count in bar(jobs, "measure steps", "run"):
        kinds = list(full)
        for number in range(step + 1, step + 1 + count):
            kinds[number] = (True, False)
        if not count:
            kinds[step] = (False, True)
        found[depth, step, count] = math.sqrt(images.change(images.schedule(kinds, depth)))
    unguided = [found.get((None, step, 0), math.inf) for step in range(steps)]
    if not depths:
        return [Changes(None, 1.0, images.branches, unguided, [{}] * steps, times.get(None))]
    return [
        Changes(
            depth,
            shallow_share(images.pipeline.unet, depth, images.call),
            images.branches,
            unguided,
            [_between({c: v for (d, s, c), v in found.items() if (d, s) == (depth, step)}) for step in range(steps)],
            times.get(depth),
        )
        for depth in depths
    ]


def _between(measured: dict[int, float]) -> dict[int, float]:
    """Changes by number of steps that reuse: those measured, and between them by a power of the number."""
    if len(measured) < 2:
        return measured
    (few, least), (many, most) = sorted(measured.items())
    if min(least, most) <= 0:
        return {n: max(least, most) for n in range(few, many + 1)}
    power = math.log(most / least) / math.log(many / few)
    return {n: least * (n / few) ** power for n in range(few, many + 1)}


@dataclass(frozen=True)
class Choice:
    """A schedule on the frontier: no cheaper one changes less, by the sum of what was measured."""

    cost: float
    """As a share of the full schedule's, what is beside the steps counted if that was measured."""
    change: float
    """The sum of norms."""
    kinds: Kinds
    depth: str | None


def frontier(changes: Changes) -> list[Choice]:
    """Every schedule that is the best at its cost, the cheapest first: exact, by dynamic programming over the steps.

    A state is how many steps have reused the last whole one, and whether that was guided. What is guided does not reuse
    what is not.
    """
    steps, costs = len(changes.unguided), changes.costs
    scale = changes.branches * _UNIT / costs.kinds[True, True]
    units = {kind: round(scale * cost) for kind, cost in costs.kinds.items()}
    rest = round(scale * costs.rest)
    # State -> cost -> change, and the steps as a chain.
    states: dict[tuple[int, bool], dict[int, tuple[float, Any]]] = {(0, True): {0: (0.0, None)}}
    for step in range(steps):
        after: dict[tuple[int, bool], dict[int, tuple[float, Any]]] = {}
        for (reuses, whole_guided), ways in states.items():
            for guided in (True, False):
                extra = 0.0 if guided else changes.unguided[step]
                if extra == math.inf:
                    continue
                moves = [((0, guided), True, units[guided, True], extra)]
                source = changes.reused[step - reuses - 1] if step else {}
                if reuses + 1 in source and (whole_guided or not guided):
                    more = source[reuses + 1] - source.get(reuses, 0.0)
                    moves.append(((reuses + 1, whole_guided), False, units[guided, False], extra + more))
                for state, whole, cost, change in moves:
                    best = after.setdefault(state, {})
                    for before, (so_far, chain) in ways.items():
                        if so_far + change < best.get(before + cost, (math.inf,))[0]:
                            best[before + cost] = (so_far + change, ((guided, whole), chain))
        states = {state: _undominated(ways) for state, ways in after.items()}
    total = steps * units[True, True] + rest
    merged: dict[int, tuple[float, Any]] = {}
    for ways in states.values():
        for cost, way in ways.items():
            if way[0] < merged.get(cost, (math.inf,))[0]:
                merged[cost] = way
    chosen = sorted(_undominated(merged).items())
    return [Choice((cost + rest) / total, change, _unchained(chain), changes.depth) for cost, (change, chain) in chosen]


def _undominated(ways: dict[int, tuple[float, Any]]) -> dict[int, tuple[float, Any]]:
    """Those that change less than all cheaper ones."""
    kept: dict[int, tuple[float, Any]] = {}
    least = math.inf
    for cost, way in sorted(ways.items(), key=lambda item: item[0]):
        if way[0] < least:
            kept[cost], least = way, way[0]
    return kept


def _unchained(chain: Any) -> Kinds:
    def steps() -> Iterator[tuple[bool, bool]]:
        link = chain
        while link is not None:
            kind, link = link
            yield kind

    return [*steps()][::-1]


@own_torch_state()
def choose_schedule(
    images: Images,
    changes: Sequence[Changes],
    *,
    speedup: float | None = None,
    max_error: float | None = None,
) -> Schedule:
    """The schedule that changes least at a speedup, or the cheapest that changes at most so much, measured.

    Args:
        speedup: the multiply-accumulates of a picture's denoiser calls, full over scheduled; or what a picture takes,
            where `Changes.times` are there.
        max_error: relative mean squared change of the final latents.

    Raises:
        InputError: unless exactly one is given, or if no schedule is so fast.
    """
    if (speedup is None) == (max_error is None):
        raise InputError("a schedule is chosen for a speedup or for an error: give one of them")
    choices = sorted((one for of_depth in changes for one in frontier(of_depth)), key=lambda one: one.cost)
    if speedup is not None:
        within = [one for one in choices if one.cost <= 1 / speedup + 1e-9]
        if not within:
            most = 1 / choices[0].cost
            raise InputError(f"no schedule of this model is {speedup:g} times as fast: the fastest is {most:.3g} times")
        best = min(within, key=lambda one: one.change)
        return _described(images, best, images.change(images.schedule(best.kinds, best.depth)), speedup=speedup)
    assert max_error is not None
    # A cheaper choice that is expected to change less makes a dearer one needless, whatever their depths.
    ordered: list[Choice] = []
    for one in choices:
        if not ordered or one.change < ordered[-1].change:
            ordered.append(one)
    low, high = 0, len(ordered) - 1  # the last is the full schedule, which changes nothing
    measured: dict[int, float] = {high: 0.0}
    while low < high:
        middle = (low + high) // 2
        measured[middle] = images.change(images.schedule(ordered[middle].kinds, ordered[middle].depth))
        low, high = (low, middle) if measured[middle] <= max_error else (middle + 1, high)
    return _described(images, ordered[high], measured[high], max_error=max_error)


def _described(images: Images, choice: Choice, error: float, **asked: float) -> Schedule:
    sampling = images.sampling
    return images.schedule(
        choice.kinds,
        choice.depth,
        **asked,
        latent_error=error,
        predicted_error=choice.change**2,
        cost=choice.cost,
        images=len(images.prompts),
        guidance=sampling.guidance,
        seed=sampling.seed,
        scheduler=type(images.pipeline.scheduler).__name__ if sampling.scheduler is None else sampling.scheduler,
    )
