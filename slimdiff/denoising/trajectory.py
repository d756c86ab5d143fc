"""Real denoising trajectories: what a pipeline's denoiser is called with while it makes an image.

An image is asked for by a prompt or, where a pipeline takes something else or more, by a mapping of those arguments of
its call that differ from image to image. Arguments that are the same for all go into `Sampling.arguments`.

| pipeline | one image's inputs | `Sampling.arguments` |
| --- | --- | --- |
| text to image | `"a red barn"` | |
| inpainting | `{"prompt": "a barn", "image": photo, "mask_image": mask}` | `{"strength": 1.0}` |
| InstructPix2Pix, ControlNet | `{"prompt": "make it snow", "image": photo}` | |
| T2I adapter | `{"prompt": "a barn", "image": sketch}` | |
| classes (DiT) | `{"class_labels": 207}` | |
| unconditional (DDPM, DDIM) | `{}` | |
| AnimateDiff | `"a barn in the wind"` | `{"num_frames": 16}` |
| Stable Video Diffusion | `{"image": photo}` | `{"num_frames": 14, "max_guidance_scale": 3.0}` |
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimdiff.denoising.modules import at_rest, evaluating, working_copy
from slimdiff.errors import InputError
from slimdiff.progress import bar
from slimdiff.settings import Sampling

# One image's inputs: a prompt, or arguments of the pipeline's call by name.
Inputs = str | Mapping[str, Any]


@dataclass
class Call:
    """One call of the denoiser, on the CPU.

    `arguments` holds what the denoiser was called with by parameter name: for a text-to-image UNet `sample
    [B, C, H, W]`, `timestep` (int64 scalar), `encoder_hidden_states [B, L, D]` and, for SDXL, `added_cond_kwargs`.
    `step` counts calls from 0. `timestep` is an int, or a float where the model takes a continuous time.
    """

    step: int
    timestep: int | float
    arguments: dict[str, Any]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments on a device, floating-point tensors cast to `dtype`."""
        return map_tensors(lambda t: t.to(device, dtype if t.is_floating_point() else None), self.arguments)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest of dictionaries, lists and tuples with every tensor replaced by `function` of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(function, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(function, v) for v in value])
    return value


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """`unet` or `transformer`, whichever the pipeline has.

    Raises:
        InputError: if it has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise InputError(f"{type(pipeline).__name__} has neither a unet nor a transformer: there is nothing to slim in it")


def with_denoiser(pipeline: DiffusionPipeline, denoiser: object) -> DiffusionPipeline:
    """A pipeline like this one with another denoiser; the original is untouched, its other components are shared."""
    other = copy.copy(pipeline)
    other.register_modules(**{denoiser_name(pipeline): denoiser})
    return other


def working_pipeline(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with the denoiser's `working_copy`."""
    return with_denoiser(pipeline, working_copy(getattr(pipeline, denoiser_name(pipeline))))


def usable_inputs(prompts: Sequence[Inputs]) -> list[Inputs]:
    """All but blank prompts."""
    return [p for p in prompts if not isinstance(p, str) or p.strip()]


def sample_images(pipeline: DiffusionPipeline, prompts: Sequence[Inputs], sampling: Sampling) -> list[Any]:
    """Run the pipeline on prompts or mappings of its arguments; number i always starts from the noise of `seed + i`.

    Args:
        prompts: per image, a prompt or a mapping (see the table above). In a batch, tensors are stacked (so give them
            without a batch dimension) and anything else is handed over as a list.

    Returns:
        one image (or one video: a list of frames) per prompt.

    Raises:
        InputError: if the pipeline needs or refuses an argument, saying which.
    """
    batches = bar(_batches(prompts, sampling), "images", "batch")
    return [image for numbers in batches for image in sample_batch(pipeline, prompts, numbers, sampling, "pil")]


def _batches(prompts: Sequence[Inputs], sampling: Sampling) -> list[range]:
    """The prompts' numbers by batch."""
    every = range(len(prompts))
    return [every[start : start + sampling.batch] for start in every[:: sampling.batch]]


def sample_batch(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    numbers: Sequence[int],
    sampling: Sampling,
    output_type: str = "latent",
) -> Sequence[Any]:
    """Run the pipeline once, on the prompts of these numbers; see `sample_images`.

    Args:
        output_type: `pil`, or `latent` for tensors where the pipeline has that.
    """
    pipeline = copy.copy(pipeline)  # its progress bar, scheduler and training mode stay the caller's
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "scheduler", None) is not None:
        pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    noise = [torch.Generator().manual_seed(sampling.seed + number) for number in numbers]
    arguments = _arguments(pipeline, [prompts[number] for number in numbers], sampling, output_type)
    with evaluating(*(part for part in vars(pipeline).values() if isinstance(part, nn.Module))):
        images: Sequence[Any] = pipeline(generator=noise, **arguments)[0]
    return images


def _arguments(
    pipeline: DiffusionPipeline, batch: Sequence[Inputs], sampling: Sampling, output_type: str
) -> dict[str, Any]:
    """What to call the pipeline with for one batch: the inputs, and of the usual settings those that it has."""
    parameters = inspect.signature(pipeline.__call__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    rows: list[dict[str, Any]] = [{"prompt": p} if isinstance(p, str) else dict(p) for p in batch]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise InputError("the inputs of one batch name different arguments: give all of them the same")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    inputs = {n: torch.stack(c) if all(isinstance(v, Tensor) for v in c) else c for n, c in columns.items()}
    inputs |= sampling.model_dump(include={"height", "width"}, exclude_none=True) | sampling.arguments
    unknown = [] if takes_any else sorted(inputs.keys() - parameters.keys())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind in named and n not in inputs]
    if unknown or missing:
        problem = [f"takes no {', '.join(unknown)}"] * bool(unknown) + [f"needs {', '.join(missing)}"] * bool(missing)
        raise InputError(
            f"{type(pipeline).__name__} {' and '.join(problem)}: give each image's inputs as a mapping of the "
            "pipeline's arguments, and what is the same for all in the sampling's arguments"
        )
    usual = {"num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance, "output_type": output_type}
    offered = {name: value for name, value in usual.items() if takes_any or name in parameters}
    if "batch_size" in parameters:  # pipelines with no inputs of their own
        offered["batch_size"] = len(batch)
    return {**offered, **inputs}


@contextmanager
def watch_calls(denoiser: nn.Module, seen: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `seen` with the arguments of every call of the denoiser, by parameter name."""
    signature = inspect.signature(denoiser.forward)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        seen({k: v for k, v in bound.items() if v is not None and k != "return_dict"})

    with denoiser.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@torch.no_grad()
def record_calls(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    sampling: Sampling,
    *,
    every: int = 1,
    staggered: bool = False,
) -> list[Call]:
    """Record every `every`-th denoiser call of the trajectories of `prompts`, in order of time per batch.

    Args:
        staggered: begin each batch's trajectory one step later than the one before (or at its first step again), so
            that few calls of each are of all times together.
    """
    denoiser = at_rest(getattr(pipeline, denoiser_name(pipeline)))
    pipeline = with_denoiser(pipeline, denoiser)  # hooks on a compiled one would not run
    calls: list[Call] = []
    batch, step, last = -1, -1, -math.inf

    def keep(arguments: dict[str, Any]) -> None:
        nonlocal batch, step, last
        time = torch.as_tensor(arguments["timestep"]).flatten()[0]
        # A text-to-image UNet's graph takes the time as a whole scalar, so that is what is recorded for it. Others keep
        # what they were called with: DiT wants one time per sample, a video UNet's may be the log of a noise level.
        if "encoder_hidden_states" in arguments and getattr(arguments.get("sample"), "ndim", 0) == 4:
            time = time.long()
            arguments = {**arguments, "timestep": time}
        t = time.item()
        t = int(t) if t == int(t) else t
        # Time only falls along one trajectory; some schedulers call more than once a step, so counting calls won't do.
        batch, step, last = (batch + 1, 0, t) if t > last else (batch, step + 1, t)
        if step % every == (batch % every if staggered else 0):
            before[:], copies[:] = copies, []
            calls.append(Call(step, t, map_tensors(copied, arguments)))

    before: list[Tensor] = []
    copies: list[Tensor] = []

    def copied(tensor: Tensor) -> Tensor:
        """On the CPU; what was the same at the call before (text embeddings are large) is held once."""
        found = tensor.detach().to("cpu", copy=True)
        same = (t for t in before if t.dtype == found.dtype and torch.equal(t, found))
        copies.append(next(same, found))
        return copies[-1]

    with watch_calls(denoiser, keep):
        for numbers in bar(_batches(prompts, sampling), "record calls", "batch"):
            sample_batch(pipeline, prompts, numbers, sampling)
    return calls


@torch.no_grad()
def predict(denoiser: nn.Module, call: Call) -> Tensor:
    """The denoiser's output for a recorded call, float32 on the CPU, `[B, C, H, W]` (or as the model has it)."""
    parameter = next(denoiser.parameters())
    return denoiser(**call.to(parameter.device, parameter.dtype), return_dict=False)[0].float().cpu()
