"""Every knob of the method on one page, and what a plan may cost. Imports neither torch nor diffusers."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from slimdiff.errors import InputError


class Sampling(BaseModel):
    """How images are made wherever a trajectory is needed."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(20, ge=1, le=1000)
    """Scheduler steps per image."""
    guidance: float = Field(5.0, ge=0)
    """Classifier-free guidance scale, where the pipeline has one; above 1 the denoiser runs on both branches."""
    batch: int = Field(8, ge=1)
    """Prompts per denoising batch (with guidance, twice as many samples go through the denoiser)."""
    seed: int = 0
    """Prompt i starts from the noise of seed + i, whatever the batch size."""
    height: int | None = None
    """Image height in pixels; the pipeline's own default if not given."""
    width: int | None = None
    """Image width in pixels; the pipeline's own default if not given."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """More arguments of the pipeline's call, the same for every image, such as `num_frames` of a video."""


TimestepWeights = Literal["uniform", "min_snr", "inverse_snr"]


class StatisticsSettings(BaseModel):
    """What is collected of each forward pass."""

    model_config = ConfigDict(extra="forbid")

    timestep_weights: TimestepWeights = "uniform"
    """How much each timestep counts; all but `uniform` need a scheduler with `alphas_cumprod`."""
    tokens_per_dimension: int | None = Field(64, ge=1)
    """Tokens that a site sees in all, per dimension of its width, where there are more: an even selection of each
    call's. Null takes every token."""
    memory_limit: float = Field(2.0, gt=0)
    """GiB that moments may take at a time. Sites that need more are watched in turns, each turn by its share of the
    prompts: it costs no forward pass, but each site sees fewer prompts."""


class CalibrationSettings(StatisticsSettings):
    """What the denoiser is watched doing, and what is collected of it."""

    samples: int = Field(64, ge=1)
    """How many prompts, taken from the front of the list."""
    sampling: Sampling = Sampling()
    """How their images are made."""


class Forms(BaseModel):
    """Which form slims each group. The defaults measured best (`python -m benchmarks.quality --ablation`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    centre_keys: bool = True
    """query_key: take key moments about each image's mean key, which softmax does not see."""
    value_moments: Literal["attended", "values"] = "attended"
    """value_output: whiten by what the output projection receives, or (the papers) by the values before attention."""
    joint_output: bool = True
    """value_output: solve the output projection again over all heads at once; else each head keeps its own part."""
    channels: Literal["elimination", "ridge_leverage"] = "elimination"
    """feed_forward: choose channels by backward elimination on the output error, or (the papers) by ridge leverage."""
    constant: bool = True
    """value_output, feed_forward: what goes leaves its mean in the last linear's bias, where there is one."""
    compensate: Literal["none", "projections", "sequential"] = "projections"
    """Afterwards, solve again on what is received in the slim model (`slimdiff.slimming.compensation`): the projections
    behind slimmed transformer blocks; or, in the order in which they run, those and each block's last linears; or
    nothing."""

    def local(self) -> Forms:
        """Without what is done afterwards: what bases, orders and sensitivities depend on."""
        return self.model_copy(update={"compensate": "none"})


PAPERS = Forms(
    centre_keys=False,
    value_moments="values",
    joint_output=False,
    channels="ridge_leverage",
    constant=False,
    compensate="none",
)
"""SlimDiff's and MoDeGPT's local forms, as we read them."""


class ResnetSettings(BaseModel):
    """How slim resnets are fitted to the dense ones."""

    model_config = ConfigDict(extra="forbid")

    solve: Literal["im2col", "channels", "none"] = "im2col"
    """How conv2 is solved again. `channels`: its input channels are mixed anew. `im2col`: every weight is free, drawn
    towards those of `channels`; sites for which memory does not suffice fall back to `channels`. `none`: the
    kept channels' weights stay as they are."""
    affine: bool = True
    """Fit the norm's weight and bias first, so that its kept channels come closest to the dense norm's."""
    ridge: float | None = Field(None, gt=0)
    """Of the least squares, as a share of the mean square of conv2's inputs: draws `im2col` towards `channels`, and
    that towards `none`. If not given, each site's own: the one whose fit on half of the images errs least on others."""
    memory_gib: float = Field(2.0, gt=0)
    """Bound on the sums and solutions of `im2col`; sites that do not fit at once are fitted one wave after another."""


TRANSFORMER_GROUPS = ("query_key", "value_output", "feed_forward")
"""The groups of a transformer block, which are slimmed unless something else is said (`slimdiff.groups` has all)."""


Allocation = Literal["global", "local", "uniform", "softmax"]


class PlanSettings(BaseModel):
    """How ranks are chosen."""

    model_config = ConfigDict(extra="forbid")

    allocation: Allocation = "global"
    """`global`: the knapsack on local errors times measured sensitivities; `local`: on local errors alone; `uniform`:
    the same share of every site; `softmax`: shares by block influence (the papers)."""
    forms: Forms = Forms()
    """The closed forms that slim each group."""
    softmax_temperature: float = Field(0.1, gt=0)
    """Of the softmax allocation: the lower, the more the least influential blocks lose."""
    align: int = Field(8, ge=1)
    """Ranks are multiples of this: per head for attention, channels for feed_forward and resnet."""
    groups: tuple[str, ...] = TRANSFORMER_GROUPS
    """Which groups may be slimmed; query_key and value_output go together. `resnet` must be named to be slimmed."""
    sensitivity_calls: int = Field(16, ge=1)
    """Recorded denoiser calls on which sensitivities are measured."""
    resnets: ResnetSettings = ResnetSettings()
    """How slim resnets are fitted."""
    fitting_calls: int = Field(64, ge=1)
    """Recorded denoiser calls that resnets are fitted on, and that `forms.compensate` solves on."""


BudgetKind = Literal["parameters", "macs", "speedup", "max_error"]
KINDS: tuple[BudgetKind, ...] = ("parameters", "macs", "speedup", "max_error")
_NOUN = {"parameters": "parameters", "macs": "MACs"}


class Budget(BaseModel):
    """How much goes out of the denoiser: exactly one of four.

    `parameters` and `macs` are counts (`100M`, `2.5G`, `30k`, `1500000`) or shares of *all* the denoiser's parameters
    or multiply-accumulates (`12%`); a leading minus is allowed, for what is said is what goes. MACs are those of one
    call at batch 1. `speedup` is the dense model's latency over the slim one's, by a measured table of latencies.
    `max_error` bounds the relative mean squared change of the noise prediction: the smallest model below it is sought.

    Raises:
        InputError: unless exactly one is given, or for a speedup not above 1, or an error not above 0.
    """

    model_config = ConfigDict(extra="forbid")

    parameters: str | None = None
    macs: str | None = None
    speedup: float | None = None
    max_error: float | None = None

    def __init__(self, parameters: str | int | None = None, *, macs: str | int | None = None, **data: Any) -> None:
        def text(value: str | int | None) -> str | None:
            return None if value is None else str(value)

        super().__init__(parameters=text(parameters), macs=text(macs), **data)

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            seen = " and ".join(given) or "none"
            raise InputError(f"a budget is exactly one of {', '.join(KINDS)}; given: {seen}")
        if self.speedup is not None and not (1 < self.speedup < math.inf):
            raise InputError(f"a speedup is dense latency over slim latency, such as 1.35, not {self.speedup:g}")
        if self.max_error is not None and not (0 < self.max_error < math.inf):
            raise InputError(f"max_error is a relative squared error above 0, such as 1e-4, not {self.max_error:g}")
        return self

    @property
    def kind(self) -> BudgetKind:
        """Which of the four it is."""
        return cast(BudgetKind, next(name for name in KINDS if getattr(self, name) is not None))

    def __str__(self) -> str:
        return f"{self.kind} {getattr(self, self.kind)}"

    def removed(self, total: float) -> int | float:
        """How much of `total` must go: parameters or MACs (whole numbers), or milliseconds for a speedup.

        Raises:
            InputError: if the text is no amount, or asks for nothing, or for everything, or the budget is `max_error`.
        """
        if self.speedup is not None:
            return total * (1 - 1 / self.speedup)
        text = self.parameters if self.parameters is not None else self.macs
        if text is None:
            raise InputError("max_error bounds the error: what it removes shows only when models are measured")
        match = re.fullmatch(r"-?\s*(\d+(?:\.\d+)?)\s*([kMGBT%]?)", text.strip())
        if not match:
            raise InputError(f"budget {text!r}: write a count such as 100M or a share such as 25%")
        number, unit = float(match[1]), match[2]
        scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "%": total / 100}[unit]
        removed = round(number * scale)
        if not 0 < removed < total:
            noun = _NOUN[self.kind]
            raise InputError(f"budget {text!r} is {removed:,} of {total:,.0f} {noun}: it must lie between")
        return removed
