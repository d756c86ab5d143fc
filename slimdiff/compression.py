"""Calibrate, plan, slim: the only orchestration of the three steps, and all of them in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from slimdiff.budget import Budget
from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.fit import check_fit
from slimdiff.denoising.modules import carry_modes
from slimdiff.denoising.offloading import shards_of
from slimdiff.denoising.precision import held_like, in_float32
from slimdiff.denoising.scheduled import Scheduled, shallow_unet
from slimdiff.denoising.sizes import check_size
from slimdiff.denoising.tasks import samples_per_image
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call, Inputs, denoiser_name, with_denoiser, working_pipeline
from slimdiff.errors import InputError
from slimdiff.fidelity import HeldError
from slimdiff.groups import find_sites
from slimdiff.groups.maps import Maps
from slimdiff.models import slim_class_of
from slimdiff.plan import Plan
from slimdiff.planning.budgets import Costs
from slimdiff.planning.costs import CostTable
from slimdiff.planning.knapsack import find_layers
from slimdiff.planning.offloaded import check_offloaded
from slimdiff.planning.pictures import Picture
from slimdiff.planning.planner import PLANNED, Planner, chosen_sites
from slimdiff.prompts import check_inputs
from slimdiff.schedule import Schedule
from slimdiff.settings import CalibrationSettings, PlanSettings
from slimdiff.slimming.offloaded import check_plan, slim_offloaded
from slimdiff.slimming.slim import slim_denoiser
from slimdiff.statistics import Statistics


@dataclass
class Compression:
    """What `compress` gives back.

    Attributes:
        pipeline: a pipeline like the one that came in, with a slim denoiser; its other components are shared.
        plan: site -> rank, costs, predicted errors.
        statistics: reusable for another budget, with what planning measured.
        seconds: time taken by `calibrate`, `plan` and `slim`.
        maps: how each slim layer's weight follows from the dense one's; `slimdiff.save_maps` writes them beside the
            saved pipeline, and `slimdiff.convert_lora` converts LoRA by them.
    """

    pipeline: DiffusionPipeline
    plan: Plan
    statistics: Statistics
    seconds: dict[str, float] = field(default_factory=dict)
    maps: Maps = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Compression({type(self.pipeline).__name__}, {self.plan!r})"


@own_torch_state()
def compress(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    budget: Budget | str | int | None = None,
    *,
    plan: Plan | None = None,
    latency: CostTable | None = None,
    calibration: CalibrationSettings | None = None,
    planning: PlanSettings | None = None,
    statistics: Statistics | None = None,
    schedule: Schedule | None = None,
    release_dense: bool = False,
) -> Compression:
    """Slim a pipeline's denoiser without a gradient step.

    Args:
        prompts: calibration prompts; about 64 suffice for a small model, 500 is the papers' number. For pipelines that
            take images, classes or nothing at all, mappings of their arguments (see `slimdiff.denoising.trajectory`).
            Beyond `calibration.samples` they are not calibrated with: sensitivities and a budget of `max_error` are
            measured on them. A few more, at least a batch, are worth giving.
        budget: how much to take out of the denoiser, in parameters, MACs, latency or error (a text or a count alone is
            of parameters: `"12%"`); or
        plan: the ranks themselves (a plan read from a file, perhaps edited).
        latency: measured milliseconds by layer and rank, for a speedup (`exporters.latency.table`); of a whole picture
            (`exporters.latency.steps`), if there is a schedule.
        schedule: by which the slim model will make its images: a budget in MACs or latency is then of a whole picture,
            in which a deep layer runs less often than others (`slimdiff.schedule_pipeline` follows it).
        statistics: from an earlier calibration of the same weights, to save the time.
        release_dense: let go of the dense weights as the slim ones are made: less memory, but the pipeline that came in
            cannot be used afterwards.

    Raises:
        InputError: for an impossible budget, a plan or statistics of another model, or nothing to slim.
    """
    if (budget is None) == (plan is None):
        raise InputError("give either a budget or a plan")
    if budget is not None and not isinstance(budget, Budget):
        budget = Budget(budget)
    _expect(Plan, plan=plan)
    _expect(Statistics, statistics=statistics)
    _expect(CostTable, latency=latency)
    _expect(Schedule, schedule=schedule)
    work = Compressor(pipeline, prompts, calibration, planning, schedule=schedule)
    if statistics is not None:
        work.statistics = statistics
    work.check([] if budget is None else [budget], latency=latency)
    if plan is not None:
        check_plan(work.denoiser, plan)
    clock = [time.perf_counter()]
    statistics = work.statistics
    clock.append(time.perf_counter())
    if plan is None:
        assert budget is not None
        plan = work.plan(budget, latency)
        work.planner.remember(statistics)
    clock.append(time.perf_counter())
    maps: Maps = {}
    slim = work.slim(plan, release_dense=release_dense, maps=maps)
    clock.append(time.perf_counter())
    seconds = dict(zip(("calibrate", "plan", "slim"), (b - a for a, b in pairwise(clock)), strict=True))
    return Compression(with_denoiser(pipeline, slim), plan.recount(), statistics, seconds, maps)


class Compressor:
    """One pipeline on its way to slim ones: every step is made when first asked for, and once.

    Any number of budgets share the statistics, the recorded calls, and what was measured by forward passes.

    Args:
        unfinished: a folder for a calibration that may be interrupted (see `calibrate`).
        schedule: of the images that budgets are about; see `compress`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[Inputs],
        calibration: CalibrationSettings | None = None,
        planning: PlanSettings | None = None,
        *,
        unfinished: Path | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        _expect(DiffusionPipeline, pipeline=pipeline)
        _expect(CalibrationSettings, calibration=calibration)
        _expect(PlanSettings, planning=planning)
        self.source = pipeline
        self.prompts = check_inputs(prompts)
        self.calibration = calibration or CalibrationSettings()
        self.planning = planning or PlanSettings()
        self.unfinished = unfinished
        self.schedule = schedule
        self._work = working_pipeline(pipeline)

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """What is calibrated and planned on: the denoiser's working copy, in float32 (`in_float32`)."""
        return in_float32(self._work)

    @cached_property
    def calls(self) -> Calls:
        """The calls that are measured and fitted on."""
        return Calls(self.pipeline, self.prompts, self.calibration, self.planning)

    @property
    def denoiser(self) -> nn.Module:
        """A working copy of the dense unet or transformer, as it is calibrated."""
        return getattr(self.pipeline, denoiser_name(self.pipeline))

    @cached_property
    @own_torch_state()
    def statistics(self) -> Statistics:
        """Calibrated now, unless statistics of an earlier calibration were assigned before anything was planned."""
        return calibrate(self.pipeline, self.prompts, self.calibration, unfinished=self.unfinished)

    @cached_property
    @own_torch_state()
    def planner(self) -> Planner:
        """What plans have in common."""
        return Planner(self.denoiser, self.statistics, self.planning, calls=self.calls, picture=self.picture)

    @cached_property
    def picture(self) -> Picture | None:
        """The calls of an image by the schedule.

        Raises:
            InputError: if the schedule is of another model.
        """
        if self.schedule is None:
            return None
        denoiser = getattr(self._work, denoiser_name(self._work))
        self.schedule.check(denoiser.config, "the schedule")
        if self.schedule.depth is not None:
            shallow_unet(denoiser, self.schedule.depth)  # which refuses what it cannot cut
        return Picture(self.schedule, samples_per_image(self.source, self.calibration.sampling))

    @cached_property
    @own_torch_state()
    def held_error(self) -> HeldError:
        """Measures slim models on calls that calibration has not seen."""
        return HeldError(self.denoiser, self.calls.held)

    @own_torch_state()
    def check(
        self,
        budgets: Sequence[Budget],
        *,
        call: Callable[[], Call | None] = lambda: None,
        latency: CostTable | None = None,
    ) -> None:
        """Refuse a model that cannot be slimmed and budgets that no plan can meet, before the long work.

        What cannot be known yet passes: an error; MACs without `call`; a speedup without `latency`; and sites that
        never run in calibration are taken for ones that do.

        Args:
            call: gives a denoiser call to count MACs of, if there is a budget of them.

        Raises:
            InputError: saying why.
        """
        denoiser = getattr(self._work, denoiser_name(self._work))
        if isinstance(denoiser, Scheduled):
            raise InputError(
                "the pipeline runs by a schedule: slim the one that the schedule was given to, and give it as schedule="
            )
        slim_class_of(denoiser)
        measured = "statistics" in vars(self) and bool(self.statistics.sensitivities)
        if budgets:
            check_offloaded(denoiser, self.planning, [budget.kind for budget in budgets], measured)
        check_fit(self.source)
        sampling = self.calibration.sampling
        picture = self.picture
        check_size(self.source, {"height": sampling.height, "width": sampling.width, **sampling.arguments})
        if not budgets:
            return
        sites = chosen_sites(find_sites(denoiser)[0], self.planning)
        costs = Costs(denoiser, find_layers(sites, self.planning.align), {}, call, latency, picture)
        for budget in budgets:
            PLANNED[budget.kind].check(costs, budget)

    @own_torch_state()
    def measure(self) -> None:
        """Add to the statistics what planning measures by forward passes: any budget then needs none."""
        self.planner.remember(self.statistics, macs_too=True)

    @own_torch_state()
    def plan(self, budget: Budget, latency: CostTable | None = None) -> Plan:
        """Ranks within a budget (`make_plan`); a table of `latency` in milliseconds is kept for further plans."""
        if latency is not None:
            self.planner.costs.latency = latency
        return self.planner.plan(budget)

    @own_torch_state()
    def slim(self, plan: Plan, *, release_dense: bool = False, maps: Maps | None = None) -> nn.Module:
        """The slim denoiser of a plan: of this compressor's, or of another's for the same weights (`slim_denoiser`).

        Its weights are in the dtypes that the dense denoiser came in with. Of an offloaded denoiser they are made when
        the slim one is saved (`slim_offloaded`), and there are no maps.
        """
        held = getattr(self._work, denoiser_name(self._work))
        if shards_of(held) is not None:
            planner = vars(self).get("planner")
            factors = planner.factors if planner is not None and planner.knows(plan) else None
            return slim_offloaded(self.denoiser, self.statistics, plan, factors)
        slim = held_like(self._slim(plan, release_dense, maps), held)
        carry_modes(getattr(self.source, denoiser_name(self.source)), slim)
        if release_dense and held is not self.denoiser:
            for tensor in held.parameters():
                tensor.data = tensor.data.new_empty(0)
        return slim

    def _slim(self, plan: Plan, release_dense: bool, maps: Maps | None) -> nn.Module:
        planner = vars(self).get("planner")
        if planner is not None and planner.knows(plan):
            return planner.slim(plan, release_dense=release_dense, maps=maps)
        return slim_denoiser(
            self.denoiser,
            self.statistics,
            plan,
            fitting_calls=self.calls.fitting if plan.is_fitted() else (),
            resnet_settings=self.planning.resnets,
            release_dense=release_dense,
            maps=maps,
        )


def _expect(kind: type, **named: object) -> None:
    """Refuse an argument of another type; None stands for one that was not given.

    Raises:
        InputError: naming it.
    """
    for name, value in named.items():
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} is a {type(value).__name__}: give a {kind.__name__}")
