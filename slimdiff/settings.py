"""Every knob of the method on one page, and what a plan may cost. Imports neither torch nor diffusers."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

_NUMBERS = (int, float, int | None, float | None)
MOST = 1_000_000
"""Of what is counted: prompts, images, calls, runs. More is a slip of the pen, and would run for ever."""
MOST_AT_ONCE = 4096
"""Samples in a call, and threads."""
LAST_SEED = 2**63 - 1
"""With a number of an image added, torch still takes it."""
MOST_PIXELS = 65536
"""Of an image's side."""
MOST_SCALE = 1000
"""Of a LoRA, either way."""


class Settings(BaseModel):
    """What all settings have in common: unknown keys are errors, and the docstring of a field is its help.

    Every number has a range, and is finite.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in _NUMBERS:
            raise ValueError("input should be a number")  # Python takes True for 1
        return value


def like(pattern: str, what: str) -> AfterValidator:
    """Of a field: text of that form, which errors say in words and by an example, as `what`."""

    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            raise ValueError(f"must be {what}")
        return value

    return AfterValidator(check)


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What weights can be in: names for people, and torch's."""
_SIZE = like(r"\s*0*[1-9][0-9]*(\.[0-9]+)?\s*([KMGT]B)\s*", "a size such as 5GB or 500MB")
_VARIANT = like(r"[A-Za-z0-9_]+", "letters, digits and underscores, such as fp16")


class WeightSettings(Settings):
    """Which files a model's weights are read from, and how they are written."""

    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the weights; each component keeps that of its files if not given."""
    variant: Annotated[str | None, _VARIANT] = None
    """Of the weights, such as fp16 for model.fp16.safetensors; if not given, the files without a variant's name are
    read, or the only ones that there are. The files of a model that is written are named for what was asked."""
    max_shard_size: Annotated[str | None, _SIZE] = None
    """Weights beyond this are written as several files, such as 5GB or 500MB (of 1000 each); diffusers' own default if
    not given."""


class OffloadSettings(Settings):
    """Where a denoiser's weights are while it is slimmed."""

    offload: bool = False
    """Leave the denoiser's weights in its files and read each layer's when it runs, for a model larger than memory; the
    slim one is written while it is made."""


class ScaledFile(Settings, frozen=True):
    """A file, and how much of what it holds is added to a model; also written `FILE` or `FILE:SCALE`."""

    file: str = Field(min_length=1)
    """A safetensors file."""
    scale: float = Field(1.0, ge=-MOST_SCALE, le=MOST_SCALE)
    """How much of it is added."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        """A number after the last colon is the scale: other colons belong to the name."""
        if not isinstance(value, str | PurePath):
            return value
        file, _, scale = str(value).rpartition(":")
        try:
            return {"file": file, "scale": float(scale)} if file else {"file": scale}
        except ValueError:
            return {"file": str(value)}


class Lora(ScaledFile, frozen=True):
    """A LoRA that is fused into a model's weights when it is loaded, in diffusers', PEFT's or kohya's layout."""


class LoraSettings(Settings):
    """What is fused into a model."""

    lora: tuple[Lora, ...] = ()
    """LoRA to fuse into the weights, as FILE or FILE:SCALE, such as style.safetensors:0.8; text encoders' parts too."""


class SteeringSettings(Settings):
    """What steers a Stable Diffusion UNet beside its prompt, added to the model when it is opened."""

    controlnet: tuple[str, ...] = ()
    """A diffusers directory of a ControlNet that steers the model; again for several."""
    adapter: str | None = Field(None, min_length=1)
    """A diffusers directory of a T2I-Adapter that steers the model."""
    ip_adapter: ScaledFile | None = None
    """A safetensors file of an IP-Adapter, its image encoder in image_encoder beside it, at a scale."""

    def __bool__(self) -> bool:
        return bool(self.controlnet) or self.adapter is not None or self.ip_adapter is not None

    @model_validator(mode="after")
    def _one_kind(self) -> SteeringSettings:
        if self.controlnet and self.adapter is not None:
            raise ValueError("diffusers has no pipeline that ControlNets and a T2I-Adapter steer together: name one")
        return self


class Sampling(Settings):
    """How images are made wherever a trajectory is needed."""

    steps: int = Field(20, ge=1, le=1000)
    """Scheduler steps per image."""
    guidance: float = Field(5.0, ge=0, le=1000)
    """Classifier-free guidance scale, where the pipeline has one; above 1 the denoiser runs on both branches."""
    batch: int = Field(8, ge=1, le=MOST_AT_ONCE)
    """Prompts per denoising batch (with guidance, twice as many samples go through the denoiser)."""
    seed: int = Field(0, ge=0, le=LAST_SEED)
    """Prompt i starts from the noise of seed + i, whatever the batch size."""
    height: int | None = Field(None, ge=1, le=MOST_PIXELS)
    """Image height in pixels; the width if that is given alone, else the pipeline's own default."""
    width: int | None = Field(None, ge=1, le=MOST_PIXELS)
    """Image width in pixels; the height if that is given alone, else the pipeline's own default."""
    scheduler: str | None = None
    """In the place of the pipeline's own: a class of diffusers such as EulerDiscreteScheduler, or euler for short. It
    gets the settings of the pipeline's own."""
    whole_prompts: bool = False
    """Whether prompts longer than CLIP takes are encoded in chunks, rather than cut as diffusers does, with a warning.
    Graphs take one number of tokens, and refuse what is longer."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """More arguments of the pipeline's call, the same for every image, such as `num_frames` of a video."""

    @field_validator("arguments")
    @classmethod
    def _no_field(cls, value: dict[str, Any]) -> dict[str, Any]:
        fields = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
        for name in fields.keys() & value.keys():
            raise ValueError(f"{name} is set by {fields[name]}")
        return value

    @model_validator(mode="after")
    def _square(self) -> Sampling:
        self.height, self.width = self.height or self.width, self.width or self.height
        return self


TimestepWeights = Literal["uniform", "min_snr", "inverse_snr"]


class StatisticsSettings(Settings):
    """What is collected of each forward pass."""

    timestep_weights: TimestepWeights = "uniform"
    """How much each timestep counts; all but `uniform` need a scheduler with `alphas_cumprod`."""
    tokens_per_dimension: int | None = Field(64, ge=1, le=MOST)
    """Tokens that a site sees in all, per dimension of its width, where there are more: an even selection of each
    call's. Null takes every token."""
    memory_limit: float = Field(2.0, gt=0, le=MOST)
    """GiB that moments may take at a time. Sites that need more are watched in turns, each turn by its share of the
    prompts: it costs no forward pass, but each site sees fewer prompts."""


class CalibrationSettings(StatisticsSettings):
    """What the denoiser is watched doing, and what is collected of it."""

    samples: int = Field(64, ge=1, le=MOST)
    """How many prompts, taken from the front of the list."""
    sampling: Sampling = Sampling()
    """How their images are made."""


class Forms(Settings, frozen=True):
    """Which form slims each group. The defaults measured best (`python -m benchmarks.quality --ablation`)."""

    centre_keys: bool = True
    """query_key: take key moments about each image's mean key, which softmax does not see."""
    value_moments: Literal["attended", "values"] = "attended"
    """value_output: whiten by what the output projection receives, or (the papers) by the values before attention."""
    joint_output: bool = True
    """value_output: solve the output projection again over all heads at once; else each head keeps its own part."""
    channels: Literal["elimination", "ridge_leverage"] = "elimination"
    """feed_forward: choose channels by backward elimination on the output error, or (the papers) by ridge leverage."""
    constant: bool = True
    """value_output, feed_forward: the last linear's bias, where there is one, keeps the mean of what is removed."""
    compensate: Literal["none", "projections", "sequential", "everything"] = "projections"
    """Afterwards, solve again on what is received in the slim model (`slimdiff.slimming.compensation`): the projections
    behind slimmed transformer blocks; in the order in which they run, those and each block's last linears; so too
    `everything` that joins the residual stream, to mend that; or nothing."""

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


class ResnetSettings(Settings):
    """How slim resnets are fitted to the dense ones."""

    solve: Literal["im2col", "channels", "none"] = "im2col"
    """How conv2 is solved again. `channels`: its input channels are mixed anew. `im2col`: every weight is free, drawn
    towards those of `channels`; sites for which memory does not suffice fall back to `channels`. `none`: the
    kept channels' weights stay as they are."""
    affine: bool = True
    """Fit the norm's weight and bias first, so that its kept channels come closest to the dense norm's."""
    ridge: float | None = Field(None, gt=0, le=MOST)
    """Of the least squares, as a share of the mean square of conv2's inputs: draws `im2col` towards `channels`, and
    that towards `none`. If not given, each site's own: the one whose fit on half of the images errs least on others."""
    memory_gib: float | None = Field(None, gt=0, le=MOST)
    """Bound on the sums and solutions of `im2col`; sites that do not fit at once are fitted one wave after another.
    If not given, a quarter of the memory that is available, and 2 GiB at least."""


TRANSFORMER_GROUPS = ("query_key", "value_output", "feed_forward", "values")
"""The groups of a transformer block, which are slimmed unless something else is said (`slimdiff.groups` has all)."""


Allocation = Literal["global", "local", "uniform", "softmax"]


class PlanSettings(Settings):
    """How ranks are chosen."""

    allocation: Allocation = "global"
    """`global`: the knapsack on local errors times measured sensitivities; `local`: on local errors alone; `uniform`:
    the same share of every site; `softmax`: shares by block influence (the papers)."""
    forms: Forms = Forms()
    """The closed forms that slim each group."""
    softmax_temperature: float = Field(0.1, gt=0, le=MOST)
    """Of the softmax allocation: the lower, the more the least influential blocks lose."""
    align: int = Field(8, ge=1, le=MOST_PIXELS)
    """Ranks are multiples of this: per head for attention, channels for feed_forward and resnet."""
    precision: Literal["own", "int8"] = "own"
    """int8: choose, together with the ranks, which linears and convolutions an export puts into int8. `own`: the
    plan says nothing of precision."""
    int8_error: float = Field(default=1e-3, gt=0, le=1)
    """Most that int8 may change the noise prediction, as its relative mean squared error, where the budget is in
    parameters or MACs, which int8 saves none of; any other budget bounds ranks and int8 together."""
    groups: tuple[str, ...] = TRANSFORMER_GROUPS
    """Which groups may be slimmed; query_key and value_output go together. `resnet` must be named to be slimmed."""
    sensitivity_calls: int = Field(16, ge=1, le=MOST)
    """Recorded denoiser calls on which sensitivities are measured at most: no more are when plans no longer change."""
    replans: int = Field(0, ge=0, le=16)
    """How often the plan is made again by sensitivities at the ranks that were chosen; the best one is taken."""
    resnets: ResnetSettings = ResnetSettings()
    """How slim resnets are fitted."""
    fitting_calls: int = Field(64, ge=1, le=MOST)
    """Recorded denoiser calls that resnets are fitted on, and that `forms.compensate` solves on."""

    @model_validator(mode="after")
    def _bounds_what_is_chosen(self) -> PlanSettings:
        if self.precision == "own" and self.int8_error != type(self).model_fields["int8_error"].default:
            raise ValueError("int8_error bounds what int8 changes: give precision int8 with it")
        return self
