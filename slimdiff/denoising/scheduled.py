"""A denoiser that runs by a schedule, in the place of a pipeline's own: fewer branches, and less of the network.

It asks the pipeline that calls it for the step: the place of the time in `pipeline.scheduler.timesteps`. That tensor is
another one for each picture, so what one picture leaves never reaches the next. Whatever is not as the schedule expects
(a first call, a batch of another size, a step that was left out, a call outside of a pipeline) runs the whole network.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from slimdiff.denoising.modules import plain
from slimdiff.denoising.trajectory import denoiser_name, map_tensors, time_of, with_denoiser
from slimdiff.errors import InputError
from slimdiff.schedule import FILE, Schedule

log = logging.getLogger("slimdiff")

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D")
"""Down blocks that a UNet can end with: one skip a layer, and one of the downsampler, which is left out."""
_PROMPT_FIRST = re.compile(r"StableDiffusion(XL)?InstructPix2PixPipeline")
_PROMPT_LAST = re.compile(
    r"StableDiffusion(XL)?(ControlNet(Union)?|Adapter)?(Img2Img|Inpaint)?Pipeline"
    r"|StableDiffusion(Upscale|LatentUpscale|Depth2Img|ImageVariation|GLIGEN|GLIGENTextImage)Pipeline"
    r"|StableUnCLIP(Img2Img)?Pipeline"
)
"""Pipelines by where the branch of the prompt stands in a guided batch."""
_GUIDES = "do_classifier_free_guidance"


class Passes(Protocol):
    """The two ways that a runtime runs a denoiser."""

    @property
    def denoiser(self) -> nn.Module:
        """What pipelines take for the denoiser: its configuration, dtype and device."""

    def whole(self, arguments: Mapping[str, Any], depth: str | None) -> tuple[Tensor, Tensor | None]:
        """The whole network: its output `[B, C, H, W]`, and what enters the up block of that path `[B, D, h, w]`."""

    def shallow(self, arguments: Mapping[str, Any], depth: str, kept: Tensor) -> Tensor:
        """The output by the parts from that up block on, with what entered it at another step."""


@dataclass(frozen=True)
class _Kept:
    """What a whole step left, and where the picture is since then."""

    times: Tensor
    """The scheduler's, by identity."""
    step: int
    """The last that ran, whole or not."""
    like: tuple[Any, ...]
    """Images, the shape of one sample, dtype and device."""
    state: Tensor | None
    """`[branches * images, D, h, w]`."""
    branches: int


class Scheduled(nn.Module):
    """Drop-in for a pipeline's unet: `pipeline.unet = Scheduled(TorchPasses(pipeline.unet), schedule)`.

    What it has no attribute for is asked of the denoiser within: configuration, adapters, FreeU.

    Raises:
        InputError: if the schedule is of another UNet.
    """

    def __init__(self, passes: Passes, schedule: Schedule):
        schedule.check(getattr(passes.denoiser, "config", {}), "the schedule")
        super().__init__()
        self.unet = passes.denoiser
        self.passes = passes
        self.schedule = schedule
        self._kept: _Kept | None = None
        self._listed: tuple[Tensor, list[float]] | None = None
        self._carried: dict[int, Schedule] = {}
        self.ran: Counter[tuple[bool, bool]] = Counter()
        """Calls by pipelines so far: whether all branches ran, and whether the whole network did."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" in self.__dict__ and "unet" in self._modules:
                return getattr(self._modules["unet"], name)
            raise

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise; see the denoiser within.

        Raises:
            InputError: if the pipeline calls it at times that its scheduler does not list, or arranges its branches in
                a way that is not known.
        """
        named = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels}
        named = {name: value for name, value in named.items() if value is not None}
        arguments = {"sample": sample, "timestep": timestep, **named, **others}
        pipeline = None if torch.is_grad_enabled() else _calling(self)
        if pipeline is None:
            noise = self.passes.whole(arguments, None)[0]
        elif self.schedule.is_full():
            noise = self._whole(arguments)
        else:
            noise = self._at_step(pipeline, arguments)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _at_step(self, pipeline: Any, arguments: dict[str, Any]) -> Tensor:
        sample: Tensor = arguments["sample"]
        times, listed = self._times(pipeline)
        kept = self._kept if self._kept is not None and self._kept.times is times else None
        step = _find(pipeline, arguments, listed, kept)
        if kept is not None and step == kept.step:  # a further call of a step: what the first one left stays
            return self._whole(arguments)
        schedule = self._for(len(listed))
        guided, whole = schedule.kinds()[step]
        branches = 1 if schedule.guides_always() else _branches(pipeline, len(sample))
        like = (len(sample) // branches, sample.shape[1:], sample.dtype, sample.device)
        state = None
        runs = branches if guided else 1
        if kept is not None and kept.step == step - 1 and kept.like == like:
            state = _state(kept, runs, pipeline)
        if runs < branches:
            arguments = {name: _prompts(pipeline, value, branches, len(sample)) for name, value in arguments.items()}
        if whole or state is None:
            noise, state = self.passes.whole(arguments, schedule.depth)
            self._kept = _Kept(times, step, like, state, runs)
            self.ran[runs == branches, True] += 1
        else:
            assert kept is not None and schedule.depth is not None
            noise = self.passes.shallow(arguments, schedule.depth, state)
            self._kept = replace(kept, step=step)
            self.ran[runs == branches, False] += 1
        if step == len(listed) - 1:
            self._kept = None  # the picture is finished: nothing of it stays in memory
        return noise.repeat(branches, *[1] * (noise.ndim - 1)) if runs < branches else noise

    def _whole(self, arguments: dict[str, Any]) -> Tensor:
        """A step of which nothing is kept."""
        self.ran[True, True] += 1
        return self.passes.whole(arguments, None)[0]

    def _times(self, pipeline: Any) -> tuple[Tensor, list[float]]:
        """The times of the pipeline's scheduler, and the same as numbers."""
        times = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(times, Tensor) or times.ndim != 1:
            raise InputError(f"{_title(pipeline)} lists no times of its steps, which a schedule counts: run it without")
        if self._listed is None or self._listed[0] is not times:
            self._listed = (times, times.tolist())
        return self._listed

    def _for(self, calls: int) -> Schedule:
        """The schedule for this number of calls a picture."""
        if calls not in self._carried:
            self._carried[calls] = self.schedule.at(calls)
            if calls != self.schedule.steps:
                log.warning("the schedule %s", self.schedule.how_carried(calls))
        return self._carried[calls]


def _find(pipeline: Any, arguments: Mapping[str, Any], listed: list[float], kept: _Kept | None) -> int:
    """Which of the scheduler's times it is called at: the next one where it may be, for some are listed twice."""
    at = torch.as_tensor(arguments["timestep"]).flatten()
    time = at[0].item()
    if time not in listed or bool((at != at[0]).any()):
        raise InputError(
            f"{_title(pipeline)} calls its denoiser at t={time_of(arguments)}, which its scheduler does not list: no "
            "schedule can follow it, so run it without"
        )
    near = (kept.step + 1, kept.step) if kept is not None else ()
    return next((step for step in near if step < len(listed) and listed[step] == time), listed.index(time))


class TorchPasses:
    """Both passes of a UNet2DConditionModel in torch: the shallow one is diffusers' own forward on fewer blocks.

    Args:
        unet: dense or slim, compiled or not.
        depth: that will be asked for, to be checked now.

    Raises:
        InputError: if it has no such depth.
    """

    def __init__(self, unet: nn.Module, depth: str | None = None):
        self.denoiser = unet
        if depth is not None:
            shallow_unet(plain(unet), depth)

    def whole(self, arguments: Mapping[str, Any], depth: str | None) -> tuple[Tensor, Tensor | None]:
        if depth is None:
            return self.denoiser(**arguments, return_dict=False)[0], None
        unet = plain(self.denoiser)  # hooks on a compiled one would not run
        kept: list[Tensor] = []

        def keep(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone())  # FreeU writes it

        with unet.get_submodule(depth).register_forward_pre_hook(keep, with_kwargs=True):
            noise = unet(**arguments, return_dict=False)[0]
        return noise, kept[0]

    def shallow(self, arguments: Mapping[str, Any], depth: str, kept: Tensor) -> Tensor:
        unet = shallow_unet(plain(self.denoiser), depth)
        unet.mid_block.state = kept
        return unet(**_shallow_arguments(unet, arguments), return_dict=False)[0]


class _Remembered(nn.Module):
    """In the place of the middle block: what entered an up block at another step, `[B, D, h, w]`."""

    state: Tensor

    def forward(self, _sample: Tensor, _time: Tensor, **_others: Any) -> Tensor:
        return self.state.clone()


def shallow_unet(unet: Any, depth: str) -> Any:
    """A UNet of the blocks at and beyond an up block, which shares the modules; `mid_block.state` is what enters it.

    Raises:
        InputError: if the UNet has no such depth, or its blocks leave their skips in another way.
    """
    ups = len(getattr(unet, "up_blocks", ()))
    first = int(depth.rpartition(".")[2])
    if not isinstance(unet, UNet2DConditionModel) or not first < ups:
        raise InputError(f"{type(unet).__name__} has no {depth} to reuse: make a schedule that runs the whole network")
    if "forward" in vars(unet):
        raise InputError(
            "the UNet's forward was replaced, so that no part of it can run alone: take off hooks and caches first"
        )
    downs = list(unet.down_blocks)[: ups - first]
    if kind := next((type(block).__name__ for block in downs if type(block).__name__ not in _BLOCKS), None):
        raise InputError(f"{kind} leaves its skips in a way of its own: make a schedule that runs the whole network")
    downs[-1] = _with(downs[-1], downsamplers=None)
    kept = list(unet.up_blocks)[first:]
    return _with(unet, down_blocks=nn.ModuleList(downs), mid_block=_Remembered(), up_blocks=nn.ModuleList(kept))


def _with(module: nn.Module, **parts: nn.Module | None) -> Any:
    """A module like this one with other parts; everything else is shared."""
    other = copy.copy(module)
    other.__dict__["_modules"] = {**module._modules, **parts}
    for name in parts.keys() & vars(other).keys():  # where there was none
        del other.__dict__[name]
    return other


def _shallow_arguments(unet: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A whole call's arguments for a `shallow_unet`: residuals of ControlNets and adapters for its blocks alone."""
    found = dict(arguments)
    downs = unet.down_blocks
    if (residuals := found.get("down_block_additional_residuals")) is not None:
        skips = 1 + sum(len(block.resnets) + (block.downsamplers is not None) for block in downs)
        found["down_block_additional_residuals"] = list(residuals)[:skips]
    if (middle := found.get("mid_block_additional_residual")) is not None:  # which the state has had
        found["mid_block_additional_residual"] = middle.new_zeros(())
    if (features := found.get("down_intrablock_additional_residuals")) is not None:
        attends = getattr(downs[-1], "has_cross_attention", False)  # else they are added behind the downsampler
        found["down_intrablock_additional_residuals"] = list(features)[: len(downs) - (not attends)]
    return found


def schedule_pipeline(pipeline: DiffusionPipeline, schedule: Schedule) -> DiffusionPipeline:
    """A pipeline like this one that makes its images by a schedule; the original is untouched, its parts are shared.

    `save_pretrained` writes the model with the schedule beside it.

    Raises:
        InputError: if the schedule is of another UNet, or does not go with the pipeline.
    """
    name = denoiser_name(pipeline)
    unet = getattr(pipeline, name)
    if isinstance(unet, Scheduled):
        raise InputError("the pipeline has a schedule already: give this one to the pipeline that it was made of")
    if name != "unet":
        raise InputError(f"{type(pipeline).__name__} has a {name}, and schedules are of UNets: run it without one")
    if not schedule.guides_always():
        check_guides(pipeline)
    schedule.check(unet.config, "the schedule")
    other = with_denoiser(pipeline, Scheduled(TorchPasses(unet, schedule.depth), schedule))

    def save_pretrained(_self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        pipeline.save_pretrained(folder, *args, **kwargs)
        schedule.save(f"{folder}/{FILE}")

    other.save_pretrained = MethodType(save_pretrained, other)
    return other


def _calling(denoiser: nn.Module) -> Any:
    """The pipeline that calls this denoiser now; None if no pipeline does.

    Its frame says which: pipelines are copied, made of others' parts and given other schedulers, and no reference that
    is held here would follow that.
    """
    frame = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, DiffusionPipeline) and plain(getattr(caller, "unet", None)) is denoiser:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _title(pipeline: Any) -> str:
    return f"{type(pipeline).__name__} with {type(getattr(pipeline, 'scheduler', None)).__name__}"


def _prompt_first(pipeline: Any) -> bool:
    """Whether the branch of the prompt is the first of a guided batch, and not the last.

    Raises:
        InputError: for a pipeline of which that is not known.
    """
    kind = type(pipeline).__name__
    if _PROMPT_FIRST.fullmatch(kind):
        return True
    if not _PROMPT_LAST.fullmatch(kind):
        raise InputError(
            f"how {kind} arranges its branches of guidance is not known: make a schedule that guides every step"
        )
    return False


def check_guides(pipeline: Any) -> None:
    """Refuse a pipeline whose steps cannot go without guidance.

    Raises:
        InputError: for one that does not say whether it guides, or of which the order of its branches is not known.
    """
    _prompt_first(pipeline)
    if not hasattr(type(pipeline), _GUIDES):
        raise InputError(f"{type(pipeline).__name__} does not say whether it guides: make a schedule that always does")


def guides_as_known(pipeline: Any) -> bool:
    """Whether steps of this pipeline can go without guidance."""
    kind = type(pipeline)
    known = _PROMPT_FIRST.fullmatch(kind.__name__) or _PROMPT_LAST.fullmatch(kind.__name__)
    return known is not None and hasattr(kind, _GUIDES)


def guided_branches(kind: str) -> int:
    """How many branches a guided call has, of a pipeline of a class of that name that `guides_as_known`."""
    return 3 if _PROMPT_FIRST.fullmatch(kind) else 2


def _branches(pipeline: Any, batch: int) -> int:
    """Of guidance, in a call of that many samples."""
    check_guides(pipeline)
    count = guided_branches(type(pipeline).__name__) if getattr(pipeline, _GUIDES) else 1
    if batch % count:
        kind, part = type(pipeline).__name__, f"{count} branches of guidance"
        raise InputError(f"{kind} calls with {batch} samples, which are no {part}: make a schedule that always guides")
    return count


def _prompts(pipeline: Any, value: Any, branches: int, batch: int) -> Any:
    """Of an argument of a guided call, the branch of the prompt."""
    images = batch // branches
    start = 0 if _prompt_first(pipeline) else batch - images

    def part(tensor: Tensor) -> Tensor:
        return tensor[start : start + images] if tensor.ndim and len(tensor) == batch else tensor

    return map_tensors(part, value)


def _state(kept: _Kept, branches: int, pipeline: Any) -> Tensor | None:
    """What was kept, for this many branches; None if it has them not."""
    if kept.state is None or kept.branches == branches:
        return kept.state
    return _prompts(pipeline, kept.state, kept.branches, len(kept.state)) if branches == 1 else None
