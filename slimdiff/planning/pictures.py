"""What a whole picture costs: a schedule runs each part of a UNet so many times, and at one batch or another.

A layer of the outer blocks runs in every step, one of the deep blocks in the whole steps alone; a step without guidance
runs one branch of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from slimdiff.denoising.trajectory import Call
from slimdiff.planning.costs import CostName, CostTable, left_out_of_shallow, shallow_share
from slimdiff.schedule import Schedule

Kind = tuple[bool, bool]
"""Of a step: guided, and whole."""


@dataclass(frozen=True)
class StepCosts:
    """What each kind of step costs, in any unit, and what a picture costs beside its steps."""

    kinds: Mapping[Kind, float]
    rest: float = 0.0

    @classmethod
    def of_macs(cls, shallow: float, branches: int) -> StepCosts:
        """In whole calls of one branch.

        Args:
            shallow: what a call that reuses costs, as a share of a whole one.
        """
        return cls(
            {(g, w): (branches if g else 1) * (1.0 if w else shallow) for g in (True, False) for w in (True, False)}
        )

    def of(self, schedule: Schedule) -> float:
        """What a picture costs by a schedule."""
        return self.rest + sum(self.kinds[kind] for kind in schedule.kinds())

    def full(self, steps: int) -> float:
        """What a picture costs whose steps are all guided and whole."""
        return self.rest + steps * self.kinds[True, True]


@dataclass(frozen=True)
class Picture:
    """The calls that make one picture."""

    schedule: Schedule
    branches: int
    """Of guidance, in a guided step."""

    def table(self, name: CostName, unet: nn.Module, calls: Mapping[bool, CostTable], steps: StepCosts) -> CostTable:
        """What a picture costs by the ranks of the UNet's layers.

        Args:
            name: the unit.
            calls: what a guided call costs (True), and one without guidance; of kinds that the schedule has.
            steps: what they cost in the dense model, whole and not, and what is beside them; in the same unit.
        """
        counts = Counter(self.schedule.kinds())
        depth = self.schedule.depth
        left_out = [] if depth is None else left_out_of_shallow(unet, depth)
        layers: dict[str, dict[int, float]] = {}
        int8: dict[str, dict[int, float]] = {}
        for (guided, whole), count in counts.items():

            def runs(path: str, whole: bool = whole) -> bool:
                return whole or not any(path.startswith(f"{block}.") for block in left_out)

            for path, saved_by in calls[guided].int8.items():
                product = int8.setdefault(path, dict.fromkeys(saved_by, 0.0))
                for rank, ms in zip(list(product), calls[guided].int8_savings(path, list(product)), strict=True):
                    product[rank] += count * float(ms) * runs(path)
            for path, curve in calls[guided].layers.items():
                layer = layers.setdefault(path, dict.fromkeys(curve, 0.0))
                if runs(path):
                    ranks = sorted(layer)
                    saved = calls[guided].savings(path, ranks)
                    for rank, less in zip(ranks, saved, strict=True):
                        layer[rank] += count * (curve[max(curve)] - float(less))
        made_from = dict(next(iter(calls.values())).made_from)
        return CostTable(name, steps.of(self.schedule), layers, made_from, int8)

    def macs(self, unet: nn.Module, sample: CostTable, call: Call) -> CostTable:
        """Multiply-accumulates of a picture by rank, from those of one sample.

        Args:
            call: whose shapes count, whatever its batch.
        """
        share = 1.0 if self.schedule.depth is None else shallow_share(unet, self.schedule.depth, call)
        steps = StepCosts.of_macs(share, self.branches)
        steps = StepCosts({kind: cost * sample.dense for kind, cost in steps.kinds.items()})
        scaled = {
            guided: replace(
                sample,
                layers={
                    path: {rank: samples * cost for rank, cost in curve.items()}
                    for path, curve in sample.layers.items()
                },
            )
            for guided, samples in ((True, self.branches), (False, 1))
        }
        return self.table("macs_per_image", unet, scaled, steps)


@dataclass(frozen=True)
class PictureTimes:
    """Milliseconds that were measured once, for the tables of pictures by any schedule.

    Attributes:
        steps: by depth, what each kind of step of the dense model takes; None is the key where no depth is reused.
        calls: what a guided call takes by rank (True), and one without guidance.
    """

    steps: Mapping[str | None, StepCosts]
    calls: Mapping[bool, CostTable]

    def of(self, depth: str | None) -> StepCosts:
        """What steps take, of pictures that reuse a depth; where all are whole, any measurement has them."""
        return self.steps[depth] if depth in self.steps else next(iter(self.steps.values()))

    def full(self, schedule: Schedule) -> float:
        """What a picture takes at full schedule, measured beside this one's steps."""
        return self.of(schedule.depth).full(schedule.steps)

    def table(self, picture: Picture, unet: nn.Module) -> CostTable:
        """What a picture takes by the ranks of the UNet's layers."""
        steps = self.of(picture.schedule.depth)
        table = picture.table("latency_ms_per_image", unet, self.calls, steps)
        measured = {"steps_ms": {name_of(kind): ms for kind, ms in steps.kinds.items()}, "rest_ms": steps.rest}
        return replace(table, made_from={**table.made_from, **measured})


def name_of(kind: Kind) -> str:
    """A kind of step in words."""
    guided, whole = kind
    return f"{'guided' if guided else 'unguided'}, {'whole' if whole else 'shallow'}"
