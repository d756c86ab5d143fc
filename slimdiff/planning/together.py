"""Ranks and a schedule together: how much of a speedup of the whole picture each brings, for the least change.

Some splits are looked at, from ranks alone to the schedule alone, or as far as these go. Of each, the schedule is the
best one by what was measured on final images, and the plan the best one within what is left, by that schedule's own
table. What a schedule changes in the final latents is measured; what a plan does is predicted: its error of the noise,
times a factor that the pairs measured so far show. Both are taken to be orthogonal, so that squares add. The best
predicted pair is made and measured, which corrects the factor, until the best one is a measured one.
"""

from __future__ import annotations

import copy
import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimdiff.budget import Budget
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.errors import InputError
from slimdiff.plan import Plan
from slimdiff.planning.budgets import most_removable
from slimdiff.planning.costs import CostTable
from slimdiff.planning.pictures import Picture, PictureTimes
from slimdiff.planning.planner import Planner
from slimdiff.planning.schedules import Changes, Choice, Images, frontier
from slimdiff.progress import bar
from slimdiff.schedule import Schedule

log = logging.getLogger("slimdiff")
SPLITS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
"""Shares of what a schedule can bring beyond what it must, in logarithms; the ranks bring the rest of the speedup."""
TRIED = 4
"""Pairs at most that are made and measured."""
_LEAST = 0.05
"""Of a measured change, the least that is put down to the plan: what is measured is never all the schedule's."""

_NOTHING = 1e-9
"""Of a picture's time, what a plan removes where the schedule alone is as fast as was asked for."""


@dataclass
class Pair:
    """A schedule and a plan that make a picture as fast as was asked for, as far as tables say.

    Attributes:
        scheduled: relative mean squared change of the final latents by the schedule alone, measured.
        noise_error: of the plan, predicted: ranks and int8.
        full_ms: what a picture takes by the dense model at full schedule.
        slim_ms: what it takes by the slim model and the schedule, by the table.
        predicted: change of the final latents by both, before it was measured; None for the first pair of all.
        measured: the same, measured; None if it was not.
        among: of the one that is chosen, all that there were; and the `speedup` that was asked for.
    """

    schedule: Schedule
    plan: Plan
    scheduled: float
    noise_error: float
    full_ms: float
    slim_ms: float
    predicted: float | None = None
    measured: float | None = None
    among: list[dict[str, Any]] = field(default_factory=list)
    speedup: float | None = None

    @property
    def factor(self) -> float | None:
        """Change of the final latents for a noise error, as measured."""
        if self.measured is None or not self.noise_error:
            return None
        return max(self.measured - self.scheduled, _LEAST * self.measured) / self.noise_error

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        kept = ("scheduled", "noise_error", "full_ms", "slim_ms", "predicted", "measured")
        found = {"schedule": str(self.schedule), **{name: getattr(self, name) for name in kept}}
        return {**found, "speedup": self.speedup, "among": self.among} if self.among else found


@dataclass
class Choosing:
    """Pairs for one speedup of a picture, dense at full schedule over slim by its schedule.

    Args:
        images: that changes are measured on.
        changes: what `measure_changes` found on them, with the times.
        times: milliseconds of steps and layers.
    """

    planner: Planner
    images: Images
    changes: Sequence[Changes]
    times: PictureTimes
    speedup: float
    pairs: list[Pair] = field(default_factory=list)

    @own_torch_state()
    def best(self) -> Pair:
        """The measured pair that changes least.

        Raises:
            InputError: if no pair is so fast.
        """
        self.pairs = self._candidates()
        chosen = self.pairs[len(self.pairs) // 2]
        for _ in range(TRIED):
            self._measure(chosen)
            for at, pair in enumerate(self.pairs):
                if pair.measured is None:
                    pair.predicted = self._predicted(at)
            chosen = min(self.pairs, key=_change)
            if chosen.measured is not None:
                break
        best = min((pair for pair in self.pairs if pair.measured is not None), key=_change)
        best.among = [pair.described() for pair in self.pairs]
        best.speedup = self.speedup
        return best

    def table(self, pair: Pair) -> CostTable:
        """What the pair's plan was made by."""
        return self.times.table(Picture(pair.schedule, self.images.branches), self.planner.denoiser)

    def _candidates(self) -> list[Pair]:
        """One for each split that a schedule and a plan can make, the least of the schedule first."""
        # Computed once, before copies of the planner take them over.
        _ = self.planner.factors, self.planner.sensitivities, self.planner.in_int8 and self.planner.int8_errors
        choices = [one for changes in self.changes for one in frontier(changes)]
        choices.sort(key=lambda one: one.cost)
        fast = bisect_left(choices, True, key=lambda one: self._fastest(one) < self.speedup)  # so many can be
        if not fast:
            raise InputError(
                f"no schedule and ranks of this model make an image {self.speedup:g} times as fast: at most "
                f"{self._fastest(choices[0]):.3g} times, by what was measured"
            )
        most, least = choices[fast - 1].cost, max(choices[0].cost, 1 / self.speedup)
        found: dict[tuple[Any, ...], Pair] = {}
        for split in bar(SPLITS, "plans", "split"):
            within = [one for one in choices[:fast] if one.cost <= most * (least / most) ** split + 1e-9]
            choice = min(within, key=lambda one: (one.change, one.cost))
            key = (choice.depth, *choice.kinds)
            if key not in found and (pair := self._pair(choice)) is not None:
                found[key] = pair
        return [*found.values()]

    def _fastest(self, choice: Choice) -> float:
        """How fast an image is by a schedule with the lowest ranks, against the dense one at full schedule."""
        schedule = self.images.schedule(choice.kinds, choice.depth)
        table = self.times.table(Picture(schedule, self.images.branches), self.planner.denoiser)
        return self.times.full(schedule) / (table.dense - most_removable(table, self.planner.layers))

    def _pair(self, choice: Choice) -> Pair | None:
        """The best plan by a schedule; None if no plan is so fast."""
        schedule = self.images.schedule(choice.kinds, choice.depth)
        picture = Picture(schedule, self.images.branches)
        table = self.times.table(picture, self.planner.denoiser)
        full = self.times.full(schedule)
        removed = table.dense - full / self.speedup
        if removed > most_removable(table, self.planner.layers):
            return None
        removed = max(removed, _NOTHING * table.dense)
        plan = _weighed(self.planner, picture, table).cut(table, removed, Budget(speedup=self.speedup), bounds=True)
        alone = self.images.change(schedule)
        made_by = {"speedup": full / table.dense, "latent_error": alone, "images": len(self.images.prompts)}
        made_by |= {"guidance": self.images.sampling.guidance, "seed": self.images.sampling.seed}
        schedule = self.images.schedule(choice.kinds, choice.depth, **made_by)
        return Pair(schedule, plan, alone, _noise_error(plan), full, plan.costs[table.name]["slim"])

    def _measure(self, pair: Pair) -> None:
        with self.planner.as_planned(pair.plan) as unet:
            pair.measured = self.images.change(pair.schedule, unet)
        log.info(
            "together: %.3g ms an image, %s; the final latents change by %.3g",
            pair.slim_ms,
            pair.schedule,
            pair.measured,
        )

    def _predicted(self, at: int) -> float:
        """By the factor of the nearest pair that was measured."""
        measured = [i for i, pair in enumerate(self.pairs) if pair.factor is not None]
        pair = self.pairs[at]
        if not measured:
            return pair.scheduled
        factor = self.pairs[min(measured, key=lambda i: abs(i - at))].factor
        assert factor is not None
        return pair.scheduled + factor * pair.noise_error


def _change(pair: Pair) -> float:
    """Measured, or else predicted."""
    change = pair.measured if pair.measured is not None else pair.predicted
    return math.inf if change is None else change


def _noise_error(plan: Plan) -> float:
    """Predicted, of ranks and int8; without sensitivities the local errors stand for it."""
    ranks = sum((site.predicted_error or site.local_error or 0.0) for site in plan.sites.values())
    return ranks + sum(plan.layers[path].noise_error or 0.0 for path in plan.int8())


def _weighed(planner: Planner, picture: Picture, latency: CostTable) -> Planner:
    """The same planner for the pictures of another schedule."""
    other = copy.copy(planner)
    other.costs = replace(planner.costs, picture=picture, latency=latency)
    return other
