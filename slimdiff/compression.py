"""Calibrate, plan, slim: the three steps in one call."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from diffusers import DiffusionPipeline

from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.trajectory import Call, Inputs, denoiser_name, record_calls, usable_inputs
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS, find_sites, is_fitted
from slimdiff.models import slim_class_of
from slimdiff.plan import Plan
from slimdiff.planning.costs import CostTable
from slimdiff.planning.planner import MEASURED, Planner, check_budgets, chosen_sites, is_measured
from slimdiff.settings import Budget, CalibrationSettings, PlanSettings, Sampling
from slimdiff.slimming.slim import Factors, factorise, slim_denoiser
from slimdiff.statistics import Statistics


@dataclass
class Compression:
    """What `compress` gives back.

    Attributes:
        pipeline: a pipeline like the one that came in, with a slim denoiser; its other components are shared.
        plan: site -> rank, costs, predicted errors.
        statistics: reusable for another budget, with what planning measured.
        seconds: time taken by `calibrate`, `plan` and `slim`.
    """

    pipeline: DiffusionPipeline
    plan: Plan
    statistics: Statistics
    seconds: dict[str, float] = field(default_factory=dict)


def compress(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    budget: Budget | None = None,
    *,
    plan: Plan | None = None,
    latency: CostTable | None = None,
    calibration: CalibrationSettings | None = None,
    planning: PlanSettings | None = None,
    statistics: Statistics | None = None,
    release_dense: bool = False,
    progress: bool = True,
) -> Compression:
    """Slim a pipeline's denoiser without a gradient step.

    Args:
        prompts: calibration prompts; about 64 suffice for a small model, 500 is the papers' number. For pipelines that
            take images, classes or nothing at all, mappings of their arguments (see `slimdiff.denoising.trajectory`).
            Beyond `calibration.samples` they are not calibrated with, and serve to measure a budget of `max_error`.
        budget: what goes out of the denoiser, in parameters, MACs, latency or error; or
        plan: the ranks themselves (a plan read from a file, perhaps edited).
        latency: measured milliseconds by layer and rank, for a speedup (`exporters.latency.table`).
        statistics: from an earlier calibration of the same weights, to save the time.
        release_dense: let go of the dense weights as the slim ones are made: less memory, but the pipeline that came in
            cannot be used afterwards.

    Raises:
        InputError: for an impossible budget, a plan or statistics of another model, or nothing to slim.
    """
    if (budget is None) == (plan is None):
        raise InputError("give either a budget or a plan")
    calibration, planning = calibration or CalibrationSettings(), planning or PlanSettings()
    name = denoiser_name(pipeline)
    denoiser = getattr(pipeline, name)
    slim_class_of(denoiser)  # refuse before the long work, not after
    if budget is not None:
        check_budgets(denoiser, [budget], planning, latency=latency)
    wanted = chosen_sites(find_sites(denoiser)[0], planning) if plan is None else []
    started = time.perf_counter()
    seconds = {}

    def lap(step: str) -> None:
        nonlocal started
        seconds[step], started = time.perf_counter() - started, time.perf_counter()

    if statistics is None:
        statistics = calibrate(pipeline, prompts, calibration, progress="calibrate" if progress else None)
    lap("calibrate")
    factors = None
    recorded: PlanningCalls = {}
    if plan is None:
        assert budget is not None
        factors = factorise(denoiser, statistics, wanted, "plan: factorise" if progress else None, planning.forms)
        recorded = planning_calls(pipeline, prompts, budget, calibration, planning, statistics)
        planner = Planner(
            denoiser,
            statistics,
            planning,
            **recorded,
            latency=latency,
            factors=factors,
            progress="plan" if progress else None,
        )
        plan = planner.plan(budget)
        planner.remember(statistics)
    lap("plan")
    fitted_on = recorded.get("fitting_calls", [])
    if plan.is_fitted() and not fitted_on:
        fitted_on = fitting_calls(pipeline, prompts, calibration, planning)
    slim = slim_denoiser(
        denoiser,
        statistics,
        plan,
        factors,
        "slim" if progress else None,
        fitting_calls=fitted_on,
        resnet_settings=planning.resnets,
        release_dense=release_dense,
    )
    lap("slim")
    return Compression(with_denoiser(pipeline, slim), plan.recount(), statistics, seconds)


class PlanningCalls(TypedDict, total=False):
    """Recorded denoiser calls, as `make_plan` takes them."""

    calls: list[Call]
    held: list[Call]
    fitting_calls: list[Call]


def planning_calls(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    budget: Budget,
    calibration: CalibrationSettings,
    planning: PlanSettings,
    statistics: Statistics,
) -> PlanningCalls:
    """Record what planning under this budget needs and the statistics do not hold, and no more.

    A plan that has to be fitted needs `fitting_calls` afterwards too.
    """
    recorded: PlanningCalls = {}
    wanted = [s for s in find_sites(getattr(pipeline, denoiser_name(pipeline)))[0] if s.group in planning.groups]
    covered = [s for s in wanted if GROUPS[s.group].covers(s, statistics)]
    unmeasured = planning.allocation in MEASURED and not is_measured(statistics, covered, planning)
    if unmeasured or (budget.kind != "parameters" and not statistics.macs):
        recorded["calls"] = sensitivity_calls(pipeline, prompts, calibration.sampling, planning)
    if budget.kind == "max_error":
        recorded["held"] = held_calls(pipeline, prompts, calibration, planning)
    if is_fitted(planning) and (budget.kind == "max_error" or unmeasured):
        recorded["fitting_calls"] = fitting_calls(pipeline, prompts, calibration, planning)
    return recorded


def measure(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    calibration: CalibrationSettings,
    planning: PlanSettings,
    statistics: Statistics,
    factors: Factors | None = None,
    *,
    progress: str | None = "sensitivity",
) -> None:
    """Add to statistics what planning measures by forward passes: any budget then needs none.

    Args:
        factors: from `factorise` on all sites that may be slimmed, if they are there already.
    """
    planner = Planner(
        getattr(pipeline, denoiser_name(pipeline)),
        statistics,
        planning,
        calls=sensitivity_calls(pipeline, prompts, calibration.sampling, planning),
        fitting_calls=fitting_calls(pipeline, prompts, calibration, planning)
        if any(GROUPS[g].fitted for g in planning.groups)
        else [],
        factors=factors,
        progress=progress,
    )
    planner.remember(statistics)


def sensitivity_calls(
    pipeline: DiffusionPipeline, prompts: Sequence[Inputs], sampling: Sampling, planning: PlanSettings
) -> list[Call]:
    """Denoiser calls spread evenly over one batch of trajectories, as many as the settings say (at most one a step)."""
    calls = record_calls(pipeline, usable_inputs(prompts)[: sampling.batch], sampling)
    count = min(planning.sensitivity_calls, len(calls))
    return [calls[i * len(calls) // count] for i in range(count)]


def fitting_calls(
    pipeline: DiffusionPipeline, prompts: Sequence[Inputs], calibration: CalibrationSettings, planning: PlanSettings
) -> list[Call]:
    """Denoiser calls to fit a slim model on, as many as the settings say, spread over the calibration's images."""
    chosen, sampling = usable_inputs(prompts)[: calibration.samples], calibration.sampling
    total = -(-len(chosen) // sampling.batch) * sampling.steps
    return record_calls(pipeline, chosen, sampling, every=-(-total // planning.fitting_calls), staggered=True)


def held_calls(
    pipeline: DiffusionPipeline, prompts: Sequence[Inputs], calibration: CalibrationSettings, planning: PlanSettings
) -> list[Call]:
    """Denoiser calls that calibration has not seen: prompts beyond its own if there are any, and noise of its own.

    As many as sensitivities are measured on, spread evenly over one batch of trajectories.
    """
    given = usable_inputs(prompts)
    fresh = given[calibration.samples :] or given
    noise = calibration.sampling.model_copy(update={"seed": calibration.sampling.seed + len(given)})
    return sensitivity_calls(pipeline, fresh, noise, planning)


def with_denoiser(pipeline: DiffusionPipeline, denoiser: object) -> DiffusionPipeline:
    """A pipeline like this one with another denoiser; the original is untouched, its other components are shared."""
    other = copy.copy(pipeline)
    other.register_modules(**{denoiser_name(pipeline): denoiser})
    return other
