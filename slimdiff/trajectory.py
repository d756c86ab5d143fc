"""Real denoising trajectories: what a pipeline's denoiser is called with while it makes an image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.errors import InputError


class Sampling(BaseModel):
    """How images are made wherever a trajectory is needed."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(20, ge=1, le=1000)
    """Scheduler steps per image."""
    guidance: float = Field(5.0, ge=0)
    """Classifier-free guidance scale; above 1 the denoiser runs on both branches."""
    batch: int = Field(8, ge=1)
    """Prompts per denoising batch (with guidance, twice as many samples go through the denoiser)."""
    seed: int = 0
    """Prompt i starts from the noise of seed + i, whatever the batch size."""
    height: int | None = None
    """Image height in pixels; the pipeline's own default if not given."""
    width: int | None = None
    """Image width in pixels; the pipeline's own default if not given."""


@dataclass
class Call:
    """One call of the denoiser, on the CPU.

    `arguments` holds what the denoiser was called with by parameter name: for a UNet `sample [B, C, H, W]`, `timestep`
    (int64 scalar), `encoder_hidden_states [B, L, D]` and, for SDXL, `added_cond_kwargs`. `step` counts calls from 0.
    """

    step: int
    timestep: int
    arguments: dict[str, Any]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments on a device, floating-point tensors cast to `dtype`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value

        return move(self.arguments)


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """`unet` or `transformer`, whichever the pipeline has.

    Raises:
        InputError: if it has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise InputError(f"{type(pipeline).__name__} has neither a unet nor a transformer: there is nothing to slim in it")


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    output_type: str = "pil",
    progress: str | None = None,
) -> list[Any]:
    """Run the pipeline on prompts; prompt i always starts from the noise of `sampling.seed + i`.

    Returns:
        one image per prompt in `output_type` (`pil`, or `latent` for tensors).
    """
    pipeline.set_progress_bar_config(disable=True)
    optional = {"height": sampling.height, "width": sampling.width}
    images: list[Any] = []
    with tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="image") as bar:
        for start in range(0, len(prompts), sampling.batch):
            batch = list(prompts[start : start + sampling.batch])
            noise = [torch.Generator().manual_seed(sampling.seed + start + i) for i in range(len(batch))]
            result = pipeline(
                prompt=batch,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                generator=noise,
                output_type=output_type,
                **{k: v for k, v in optional.items() if v is not None},
            )
            images += list(result.images)
            bar.update(len(batch))
    return images


@contextmanager
def watch_calls(denoiser: nn.Module, seen: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Tell `seen` the arguments of every call of the denoiser, by parameter name."""
    signature = inspect.signature(denoiser.forward)

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        seen({k: v for k, v in bound.items() if v is not None and k != "return_dict"})

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record_calls(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    every: int = 1,
    progress: str | None = None,
) -> list[Call]:
    """Record every `every`-th denoiser call of the trajectories of `prompts`, in order of time per batch."""
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    calls: list[Call] = []
    step, last = -1, -1

    def keep(arguments: dict[str, Any]) -> None:
        nonlocal step, last
        timestep = torch.as_tensor(arguments["timestep"]).flatten()[0]
        t = int(timestep)
        # Time only falls along one trajectory; some schedulers call more than once a step, so counting calls won't do.
        step, last = (0 if t > last else step + 1), t
        if step % every == 0:
            call = Call(step, t, {**arguments, "timestep": timestep.long()})
            calls.append(Call(step, t, _clone(call.to("cpu"))))

    with watch_calls(denoiser, keep):
        sample_images(pipeline, prompts, sampling, output_type="latent", progress=progress)
    return calls


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _clone(v) for k, v in value.items()}
    return value


@torch.no_grad()
def predict(denoiser: nn.Module, call: Call) -> Tensor:
    """The denoiser's output for a recorded call, float32 on the CPU, `[B, C, H, W]`."""
    parameter = next(denoiser.parameters())
    return denoiser(**call.to(parameter.device, parameter.dtype), return_dict=False)[0].float().cpu()
