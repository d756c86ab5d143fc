"""The schedule of a picture: which steps are guided, and which run the whole network. Small, readable, versioned JSON.

A step that does not run the whole network reuses what the last whole one left at a depth: the hidden state that enters
an up block (DeepCache, Ma et al. 2023, arXiv 2312.00858). A step without guidance runs one branch of two (Kynkaanniemi
et al. 2024, arXiv 2404.07724, on intervals of guidance). The file is `schedule.json`, beside the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from slimdiff.errors import InputError
from slimdiff.settings import Settings, like
from slimdiff.storage.editable import Editable
from slimdiff.storage.manifest import replacing

if TYPE_CHECKING:
    from typing_extensions import Self

FILE = "schedule.json"
"""Its name in a model's directory."""
MOST_STEPS = 1000
DEPTH = like(r"up_blocks\.[1-9][0-9]?", "an up block but the first, such as up_blocks.2")
"""Paths of what can be reused: the input of an up block but the first, which takes the middle's."""
_SHARE = r"(0(\.[0-9]+)?|1(\.0+)?)"
_INTERVAL = like(f"{_SHARE}:{_SHARE}", "two numbers from 0 to 1 with a colon between, such as 0.0:0.5")


class ScheduleSettings(Settings):
    """How a schedule is said by hand."""

    guidance_interval: Annotated[str, _INTERVAL] = "0:1"
    """Where steps are guided, as fractions of the trajectory from the noise on, such as 0.0:0.5 for the first half."""
    deep_every: int = Field(1, ge=1, le=MOST_STEPS)
    """Steps from one that runs the whole network to the next; the others reuse what it left."""
    depth: Annotated[str | None, DEPTH] = None
    """The up block whose input is reused, such as up_blocks.2; the last one if not given, and all are tried where a
    schedule is chosen."""

    def make(self, levels: int, steps: int) -> Schedule:
        """The schedule for a UNet of these levels; see `make_schedule`."""
        low, high = map(float, self.guidance_interval.split(":"))
        return make_schedule(levels, steps, guidance_interval=(low, high), deep_every=self.deep_every, depth=self.depth)


class ChoiceSettings(Settings):
    """What a schedule is chosen for: one of these."""

    speedup: float | None = Field(None, gt=1, le=1000)
    """How many times fewer multiply-adds the denoiser's calls of an image take, such as 2; with a runtime, how many
    times as fast the whole image is made there, measured."""
    max_error: float | None = Field(None, gt=0, le=1_000_000)
    """The cheapest schedule that changes the final latents by at most this (relative mean squared), measured."""


class Schedule(Editable):
    """What each step of a picture runs, for a number of steps; `at` carries it over to another."""

    noun: ClassVar[str] = "schedule"

    levels: int = Field(ge=1)
    """Of the UNet: how many up blocks it has."""
    steps: int = Field(ge=1, le=MOST_STEPS)
    """Calls of the denoiser a picture: one a step with nearly all samplers."""
    depth: Annotated[str | None, DEPTH] = None
    """The up block whose input is kept and reused, such as `up_blocks.2`; None if every step runs the whole network."""
    guided: list[int]
    """Steps, from 0, that run all branches of guidance; the others run the branch of the prompt alone."""
    whole: list[int]
    """Steps, from 0, that run the whole network."""
    carried_from: int | None = Field(None, ge=1, le=MOST_STEPS)
    """The number of steps that it was said or measured for, if that was another."""
    made_by: dict[str, Any] = {}
    """What was asked for, and what was measured on which trajectories; nothing of it if it was said by hand."""

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        for name, steps in (("guided", self.guided), ("whole", self.whole)):
            if (odd := next((s for s in steps if not 0 <= s < self.steps), None)) is not None:
                raise ValueError(f"{name} has step {odd}, and the steps are 0 to {self.steps - 1}")
            if sorted(set(steps)) != list(steps):
                raise ValueError(f"{name} must name each step once, in their order")
        if 0 not in self.whole:
            raise ValueError("whole must have step 0: there is nothing to reuse before it")
        shallow = set(range(self.steps)) - set(self.whole)
        if shallow and self.depth is None:
            raise ValueError(f"step {min(shallow)} is not in whole: say at which depth it reuses (up_blocks.1 or on)")
        if self.depth is not None and int(self.depth.rpartition(".")[2]) >= self.levels:
            raise ValueError(f"depth is {self.depth}, and a UNet of {_levels(self.levels)} has {_depths(self.levels)}")
        for step in sorted(shallow & set(self.guided)):
            last = max(w for w in self.whole if w < step)
            if last not in self.guided:
                raise ValueError(
                    f"step {step} is guided and reuses step {last}, which is not: guide step {last}, or add {step} to "
                    "whole"
                )
        return self

    def __str__(self) -> str:
        reuse = f"{len(self.whole)} whole, the others from {self.depth} on" if self.depth else "all whole"
        carried = f", carried over from {self.carried_from} steps" if self.carried_from else ""
        return f"{self.steps} steps: {len(self.guided)} guided, {reuse}{carried}"

    def kinds(self) -> list[tuple[bool, bool]]:
        """Whether each step is guided, and whether it is whole."""
        guided, whole = set(self.guided), set(self.whole)
        return [(step in guided, step in whole) for step in range(self.steps)]

    def is_full(self) -> bool:
        """Whether it changes nothing."""
        return len(self.guided) == len(self.whole) == self.steps

    def guides_always(self) -> bool:
        """Whether every step is guided."""
        return len(self.guided) == self.steps

    def cost(self, shallow: float, branches: int = 2) -> float:
        """What a picture's calls cost, as a share of the full schedule's.

        Args:
            shallow: what a call that reuses costs, as a share of a whole one (see `planning.schedule_costs`).
            branches: of guidance; 1 for a pipeline without.
        """
        each = [(branches if g else 1) * (1.0 if w else shallow) for g, w in self.kinds()]
        return sum(each) / (branches * self.steps)

    def at(self, steps: int) -> Schedule:
        """The same for another number of steps, by trajectory fraction: whole steps lie where they lay.

        A step is whole if a whole one of the old steps begins in it; of more steps than before, those in a run of whole
        steps are whole, too. The full schedule stays full.

        Raises:
            InputError: for no step, or more than there can be.
        """
        if not 1 <= steps <= MOST_STEPS:
            raise InputError(f"a schedule is for 1 to {MOST_STEPS} steps, not {steps}")
        if steps == self.steps:
            return self
        own = self.kinds()
        found: list[tuple[bool, bool]] = []
        last_guided = True
        for step in range(steps):
            covers = range(step * self.steps // steps, -(-(step + 1) * self.steps // steps))
            begins = [old for old in covers if old * steps >= step * self.steps]
            middle = own[(2 * step + 1) * self.steps // (2 * steps)]
            within, after = covers[0], covers[0] + 1
            run = own[within][1] and (after >= self.steps or own[after][1])
            whole = step == 0 or any(own[old][1] for old in begins) or (not begins and run)
            guided = middle[0]
            whole = whole or (guided and not last_guided)
            last_guided = guided if whole else last_guided
            found.append((guided, whole))
        return self.model_copy(
            update={
                "steps": steps,
                "guided": [step for step, (guided, _) in enumerate(found) if guided],
                "whole": [step for step, (_, whole) in enumerate(found) if whole],
                "carried_from": self.carried_from or self.steps,
            }
        )

    def how_carried(self, calls: int) -> str:
        """What people should know of `at(calls)`, where that is another number; nothing was measured of a schedule
        that was said by hand."""
        measured = f", and what was measured holds for {self.carried_from or self.steps}"
        return (
            f"is for {self.steps} calls of the UNet: it is carried over to {calls} by trajectory fraction"
            f"{measured if self.is_measured() else ''}"
        )

    def is_measured(self) -> bool:
        """Whether it is known what it changes."""
        return "latent_error" in self.made_by

    def of_slim(self) -> Schedule:
        """The same for a slim model: what was measured was measured of the dense one, and it says so."""
        if not self.is_measured():
            return self
        return self.model_copy(update={"made_by": {**self.made_by, "measured_on": "the dense model"}})

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Refuse a UNet, by its configuration, that this is no schedule of; `where` is what errors call the schedule.

        Raises:
            InputError: for another number of levels.
        """
        levels = levels_of(config)
        if self.depth is not None and levels is None:
            raise InputError(f"{where} reuses {self.depth}, and this denoiser has no up blocks: leave out the depth")
        if levels is not None and levels != self.levels:
            raise InputError(
                f"{where} is for a UNet of {_levels(self.levels)}, and this one has {levels}: make another with "
                "slimdiff schedule"
            )

    def save(self, path: Path | str) -> None:
        """Write it, whole or not at all: a line a field."""
        text = json.dumps(self.model_dump(exclude_none=True), indent=1)
        text = re.sub(r"\[[\d,\s]*\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text)
        with replacing(Path(path), is_file=True) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a schedule, perhaps edited by hand; of a model's directory, the one in it.

        Raises:
            InputError: saying which entry is wrong and why.
        """
        path = Path(path)
        return super().load(path / FILE if path.is_dir() else path)


def levels_of(config: Mapping[str, Any]) -> int | None:
    """How many up blocks a UNet has, by its configuration; None of a denoiser without."""
    blocks = config.get("up_block_types")
    return len(blocks) if isinstance(blocks, Sequence) and not isinstance(blocks, str) else None


def make_schedule(
    levels: int,
    steps: int,
    *,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    deep_every: int = 1,
    depth: str | None = None,
) -> Schedule:
    """A schedule by hand: guidance in an interval of the trajectory, the whole network every so many steps.

    Args:
        levels: of the UNet (`levels_of`).
        guidance_interval: fractions from 0, where the noise is, to 1: a step i of N is guided if i / N lies in it.
        depth: the last up block if not given.

    Raises:
        InputError: for an interval that is none, or a UNet that has no such depth.
    """
    low, high = guidance_interval
    if not 0 <= low < high <= 1:
        raise InputError(f"an interval of guidance is like 0.0:0.5, within 0 and 1, not {low:g}:{high:g}")
    if deep_every > 1 and levels < 2:
        raise InputError("a UNet of one level has no depth to reuse: leave out deep_every")
    whole = set(range(0, steps, deep_every))
    guided = [step for step in range(steps) if low <= step / steps < high]
    # What is guided cannot reuse what is not: guidance that sets in runs the whole network first.
    last: int | None = None
    for step in range(steps):
        if step in whole or (step in guided and last not in guided):
            whole.add(step)
            last = step
    asked = {"guidance_interval": f"{low:g}:{high:g}", "deep_every": deep_every}
    content: dict[str, Any] = {
        "levels": levels,
        "steps": steps,
        "depth": None if len(whole) == steps else depth or f"up_blocks.{levels - 1}",
        "guided": guided,
        "whole": sorted(whole),
        "made_by": asked,
    }
    return Schedule.parse(content, "the schedule")


def _levels(count: int) -> str:
    return f"{count} level{'s' * (count != 1)}"


def _depths(levels: int) -> str:
    return "no depth to reuse" if levels < 2 else " or ".join(f"up_blocks.{level}" for level in range(1, levels))
