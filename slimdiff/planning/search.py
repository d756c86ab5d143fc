"""The smallest model whose noise prediction stays close enough: predicted errors choose, measured ones decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError
from slimdiff.fidelity import noise_error
from slimdiff.plan import Plan

if TYPE_CHECKING:
    from slimdiff.planning.planner import Planner
    from slimdiff.settings import Budget

# Sizes that are considered: this many equal steps from the dense model to the smallest there is.
STEPS = 128


class Judge:
    """True noise-prediction errors of slim models against one dense model, on calls that calibration never saw."""

    def __init__(self, denoiser: nn.Module, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.reference: dict[int, Tensor] = {id(call): predict(denoiser, call) for call in calls}

    def error(self, slim: nn.Module) -> float:
        """Relative mean squared change of the noise prediction over all calls."""
        found = noise_error(lambda call: self.reference[id(call)], lambda call: predict(slim, call), self.calls)
        return float(found["relative_mse"])


def smallest_within(planner: Planner, budget: Budget, held: Sequence[Call]) -> Plan:
    """The plan with the fewest parameters whose measured error on `held` is at most `budget.max_error`.

    Errors of sites do not simply add up, so models are made and measured: the amount of parameters that goes is
    bisected on a grid of `STEPS` steps, which takes eight models at most. The next step of the grid breaks the bound
    (or there is none). The same inputs give the same plan.

    Raises:
        InputError: if even the first step breaks the bound, or there are no calls to measure on.
    """
    bound = budget.max_error
    assert bound is not None
    if not held:
        raise InputError("max_error is measured: give recorded denoiser calls to measure it on")
    table, judge = planner.parameters, Judge(planner.denoiser, held)
    most = planner.most(table)
    errors: dict[int, float] = {}
    plans: dict[int, Plan] = {}
    holds, breaks = 0, STEPS + 1
    with tqdm(desc=planner.told("models"), disable=planner.progress is None, unit="model") as bar:
        while breaks - holds > 1:
            step = (holds + breaks) // 2
            plans[step] = planner.written(planner.ranks(table, most * step / STEPS), budget, {})
            slim = planner.slim(plans[step])
            errors[step] = judge.error(slim)
            holds, breaks = (step, breaks) if errors[step] <= bound else (holds, step)
            bar.update()
    if holds == 0:
        least = table.dense - plans[1].parameters["slim"]
        raise InputError(
            f"max_error {bound:g} cannot be kept: the smallest step, {least:,.0f} parameters out of the "
            f"{len(planner.chosen)} sites, makes an error of {errors[1]:.3g}; ask for more than that"
        )
    return plans[holds].model_copy(update={"noise_error": errors[holds]})
