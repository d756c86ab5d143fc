"""Real denoising trajectories: what a pipeline's denoiser is called with while it makes an image.

An image is asked for by a prompt or, where a pipeline takes something else or more, by a mapping of those arguments of
its call that differ from image to image. Arguments that are the same for all go into `Sampling.arguments`.

| pipeline | one image's inputs | `Sampling.arguments` |
| --- | --- | --- |
| text to image | `"a red barn"` | |
| inpainting | `{"prompt": "a barn", "image": photo, "mask_image": mask}` | `{"strength": 1.0}` |
| InstructPix2Pix, ControlNet | `{"prompt": "make it snow", "image": photo}` | |
| T2I adapter | `{"prompt": "a barn", "image": sketch}` | |
| several ControlNets | `{"prompt": "a barn", "image": [edges, depth]}` | |
| classes (DiT) | `{"class_labels": 207}` | |
| unconditional (DDPM, DDIM) | `{}` | |
| AnimateDiff | `"a barn in the wind"` | `{"num_frames": 16}` |
| Stable Video Diffusion | `{"image": photo}` | `{"num_frames": 14, "max_guidance_scale": 3.0}` |
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimdiff.denoising.long_prompts import by_length, encode_long_prompts
from slimdiff.denoising.modules import at_rest, evaluating, working_copy
from slimdiff.denoising.offloading import device_of
from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.schedulers import with_scheduler
from slimdiff.denoising.sizes import autoencoder_of, check_size
from slimdiff.denoising.steering import join_controls
from slimdiff.denoising.strength import check_strength
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.errors import InputError, SlimdiffError
from slimdiff.progress import bar
from slimdiff.prompts import Inputs as Inputs
from slimdiff.prompts import check_inputs
from slimdiff.settings import Sampling

DENOISERS = ("unet", "transformer")
"""What pipelines call the module that is slimmed."""
# Arguments of a pipeline's call that hold pictures, and are no choice beside the prompt.
_IMAGES = re.compile(r"(?!num_|ip_adapter|negative_|max_|.*(embeds|scale|attention)).*(image|mask|video|frames|hint)")


@dataclass
class Call:
    """One call of the denoiser, on the CPU.

    `arguments` holds what the denoiser received, to the bit, by parameter name: for a text-to-image UNet `sample
    [B, C, H, W]`, `timestep` (a scalar, or one per sample), `encoder_hidden_states [B, L, D]` and, for SDXL,
    `added_cond_kwargs`. `step` counts calls of a trajectory from 0: a step of the scheduler may take several.
    `timestep` is the time that it is called at, an int where it is whole. `dtype` is the denoiser's, if it is known.
    """

    step: int
    timestep: int | float
    arguments: dict[str, Any]
    dtype: torch.dtype | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments on a device, for a denoiser of this dtype.

        Tensors in the recorded denoiser's dtype are cast with it; where that is not known, all floating-point tensors.
        The time never is: bf16 takes 999 for 1000.
        """
        time = time_name(self.arguments)

        def move(tensor: Tensor) -> Tensor:
            cast = tensor.is_floating_point() and self.dtype in (None, tensor.dtype)
            return tensor.to(device, dtype if cast else None)

        moved = map_tensors(move, {name: value for name, value in self.arguments.items() if name != time})
        at = self.arguments.get(time)
        return {**moved, time: map_tensors(lambda t: t.to(device), at)} if time in self.arguments else moved


def time_name(arguments: Mapping[str, Any]) -> str:
    """Which of a denoiser's arguments is the time: `timestep` of nearly all, `timesteps` or `t` of a few.

    Empty where none is.
    """
    return next((name for name in arguments if re.fullmatch(r"(\w+_)?time(steps?)?|timestep_\w+|t", name)), "")


def time_of(arguments: Mapping[str, Any]) -> int | float:
    """The time that a denoiser is called at: of the first sample, an int where it is whole.

    Raises:
        InputError: if no argument is one.
    """
    values = torch.as_tensor(arguments.get(time_name(arguments), [])).flatten()
    if not len(values):
        raise InputError(f"a denoiser is called at a time, and this one was given {', '.join(arguments)}")
    time = values[0].item()
    return int(time) if float(time).is_integer() else time


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
    for name in DENOISERS:
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


@own_torch_state()
def sample_images(
    pipeline: DiffusionPipeline, prompts: Sequence[Inputs], sampling: Sampling, *, checked: bool = True
) -> list[Any]:
    """Run the pipeline on prompts or mappings of its arguments; number i always starts from the noise of `seed + i`.

    Args:
        prompts: per image, a prompt or a mapping (see the table above). In a batch, tensors are stacked (so give them
            without a batch dimension) and anything else is handed over as a list.
        checked: whether the pipeline's safety checker and watermarker see them. Images that are held against others
            are not checked: of two blackened ones every measure would say that they are equal.

    Returns:
        one image (or one video: a list of frames) per prompt.

    Raises:
        InputError: if the pipeline needs or refuses an argument, saying which.
    """
    pipeline, prompts = in_float32(pipeline), check_inputs(prompts, blank=True)
    if not checked:
        pipeline = copy.copy(pipeline)
        after = {"safety_checker", "watermark", "watermarker"} & vars(pipeline).keys()
        vars(pipeline).update(dict.fromkeys(after))
    batches = bar(_batches(prompts, sampling), "images", "batch")
    return [image for numbers in batches for image in sample_batch(pipeline, prompts, numbers, sampling, "pil")]


def _batches(prompts: Sequence[Inputs], sampling: Sampling) -> list[range]:
    """The prompts' numbers by batch."""
    every = range(len(prompts))
    return [every[start : start + sampling.batch] for start in every[:: sampling.batch]]


@own_torch_state()
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

    Raises:
        InputError: if the pipeline needs or refuses an argument, or does not run: not every scheduler takes every
            number of steps, or every denoiser.
    """
    if sampling.whole_prompts and len(parts := by_length(pipeline, prompts, numbers, sampling)) > 1:
        found: dict[int, Any] = {}
        for part in parts:
            found |= zip(part, sample_batch(pipeline, prompts, part, sampling, output_type), strict=True)
        return [found[number] for number in numbers]
    pipeline = copy.copy(pipeline)  # its progress bar, scheduler and training mode stay the caller's
    pipeline.set_progress_bar_config(disable=True)
    vars(pipeline)["progress_bar"] = lambda over=None, total=None: bar(over, "steps", "step", total=total)
    if getattr(pipeline, "scheduler", None) is not None:
        pipeline.scheduler = copy.deepcopy(with_scheduler(pipeline, sampling).scheduler)
    noise = [torch.Generator().manual_seed(sampling.seed + number) for number in numbers]
    arguments = _arguments(pipeline, [prompts[number] for number in numbers], sampling, output_type)
    try:
        with evaluating(*(part for part in vars(pipeline).values() if isinstance(part, nn.Module))):
            takes = inspect.signature(pipeline.__call__).parameters
            if sampling.whole_prompts:
                arguments = encode_long_prompts(pipeline, arguments, takes)
            images: Sequence[Any] = pipeline(generator=noise, **arguments)[0]
    except (SlimdiffError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # diffusers' pipelines and schedulers raise anything for what they do not take
        inside = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)][1:]
        if any(name.split(".")[0] in ("slimdiff", "exporters", "deploy") for name in inside):  # ours failed
            raise
        raise InputError(_refusal(pipeline, arguments, error)) from error
    return images


def _refusal(pipeline: DiffusionPipeline, arguments: Mapping[str, Any], error: Exception) -> str:
    steps = f" in {arguments['num_inference_steps']} steps" if "num_inference_steps" in arguments else ""
    reason = str(error).strip().splitlines() or [""]
    names = inspect.signature(pipeline.__call__).parameters
    images = ", ".join(name for name in names if _IMAGES.match(name) and name not in arguments)
    advice = "another number of steps, scheduler or argument may do"
    if images:
        advice = f"it takes {images}: give some (--images; `slimdiff.compress` takes mappings of arguments)"
    absent = [
        name for name, part in vars(pipeline).items() if part is None and re.match("text_encoder|tokenizer", name)
    ]
    if absent and isinstance(error, AttributeError) and "'NoneType'" in str(error):
        advice = f"it has no {' and no '.join(absent)}, which prompts need: save the model with them"
    return f"{_title(pipeline)} does not run{steps}: {type(error).__name__}: {reason[0]} ({advice})"


def _title(pipeline: DiffusionPipeline) -> str:
    """`StableDiffusionPipeline with PNDMScheduler`."""
    scheduler = getattr(pipeline, "scheduler", None)
    return type(pipeline).__name__ + (f" with {type(scheduler).__name__}" if scheduler is not None else "")


def _arguments(
    pipeline: DiffusionPipeline, batch: Sequence[Inputs], sampling: Sampling, output_type: str
) -> dict[str, Any]:
    """What to call the pipeline with for one batch: the inputs, and of the usual settings those that it has."""
    if not hasattr(type(pipeline), "__call__"):  # noqa: B004  (an instance's own is not what Python calls)
        raise InputError(f"{type(pipeline).__name__} makes no images itself: name one of the pipelines that it gives")
    parameters = inspect.signature(pipeline.__call__).parameters
    # diffusers' pipelines take **kwargs for arguments that they had once, and drop what they do not know.
    some = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    takes_any = all(p.kind in some for name, p in parameters.items() if name != "self")
    check_inputs(sampling.arguments, where="the sampling's arguments")
    rows: list[dict[str, Any]] = [{"prompt": p} if isinstance(p, str) else dict(p) for p in batch]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise InputError("the inputs of one batch name different arguments: give all of them the same")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    join_controls(pipeline, columns)
    inputs = {n: torch.stack(c) if all(isinstance(v, Tensor) for v in c) else c for n, c in columns.items()}
    inputs |= sampling.model_dump(include={"height", "width"}, exclude_none=True) | sampling.arguments
    for name, value in inputs.items():  # diffusers wants a list of them where it is given a list of prompts
        if isinstance(value, str) and re.fullmatch(r"(negative_)?prompt(_\d)?", name):
            inputs[name] = [value] * len(batch)
    if "generator" in inputs or inputs.get("num_images_per_prompt") not in (None, 1):
        raise InputError(
            "each input makes one image from the noise of its own seed: give no generator (the sampling has a seed), "
            "and a prompt several times for several images of it (num_images_per_prompt)"
        )
    check_size(pipeline, inputs)
    unknown = [] if takes_any else sorted(inputs.keys() - parameters.keys())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind in named and n not in inputs]
    if unknown or missing:
        problem = [f"takes no {', '.join(unknown)}"] * bool(unknown) + [f"needs {', '.join(missing)}"] * bool(missing)
        raise InputError(
            f"{type(pipeline).__name__} {' and '.join(problem)}: give each image's inputs as a mapping of the "
            "pipeline's arguments, and what is the same for all in the sampling's arguments"
        )
    check_strength(pipeline, sampling.steps, inputs)
    if output_type == "latent" and hasattr(pipeline, "unet") and autoencoder_of(pipeline) is None:
        output_type = "pt"  # some that denoise images themselves know no latents
    usual = {"num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance, "output_type": output_type}
    offered = {name: value for name, value in usual.items() if takes_any or name in parameters}
    if "batch_size" in parameters:  # pipelines with no inputs of their own
        offered["batch_size"] = len(batch)
    if "max_area" in parameters and sampling.height and sampling.width:  # Flux Kontext's, which goes before both
        offered["max_area"] = sampling.height * sampling.width
    return {**offered, **inputs}


@contextmanager
def with_own_attention(denoiser: nn.Module) -> Iterator[None]:
    """Refuse a pipeline that swaps its denoiser's attention processors for the time of a call (`*PAGPipeline` does).

    What is measured outside of that call would be another model.
    """

    def processors() -> list[Any]:
        return [module.processor for module in denoiser.modules() if hasattr(module, "processor")]

    before = processors()

    def check(*_: Any) -> None:
        if any(now is not then for now, then in zip(processors(), before, strict=True)):
            raise InputError(
                "the pipeline changes its denoiser's attention while it makes images, so that what is measured would "
                "not be what runs: slim the model in its plain pipeline, and give that denoiser to this one"
            )

    with denoiser.register_forward_pre_hook(check):
        yield


@contextmanager
def watch_calls(denoiser: nn.Module, seen: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `seen` with the arguments of every call of the denoiser, by parameter name; defaults are left out."""
    signature = inspect.signature(denoiser.forward)
    rest = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        bound |= bound.pop(rest, {})
        seen({k: v for k, v in bound.items() if v is not defaults.get(k) and k != "return_dict"})

    with denoiser.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@own_torch_state()
def record_calls(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    sampling: Sampling,
    *,
    every: int = 1,
    staggered: bool = False,
) -> list[Call]:
    """Record every `every`-th denoiser call of the trajectories of `prompts`, in their order per batch.

    Args:
        staggered: begin each batch's trajectory one call later than the one before (or at its first call again), so
            that few calls of each are of all times together.

    Raises:
        InputError: if the pipeline does not run so, makes images without a call, or calls on what is not finite.
    """
    pipeline, prompts = in_float32(pipeline), check_inputs(prompts, blank=True)
    denoiser = at_rest(getattr(pipeline, denoiser_name(pipeline)))
    pipeline = with_denoiser(pipeline, denoiser)  # hooks on a compiled one would not run
    calls: list[Call] = []
    batch = step = -1

    def keep(arguments: dict[str, Any]) -> None:
        nonlocal step
        step += 1
        sample = next(iter(arguments.values()))
        if isinstance(sample, Tensor) and not bool(sample.isfinite().all()):
            raise InputError(
                f"{_title(pipeline)} calls its denoiser on values that are not finite, at t={time_of(arguments)}: the "
                "scheduler does not go with this model, or the model overflows (use it in float32)"
            )
        if step % every == (batch % every if staggered else 0):
            before[:], copies[:] = copies, []
            dtype = next(denoiser.parameters()).dtype
            calls.append(Call(step, time_of(arguments), map_tensors(copied, arguments), dtype))

    before: list[Tensor] = []
    copies: list[Tensor] = []

    def copied(tensor: Tensor) -> Tensor:
        """On the CPU; what was the same at the call before (text embeddings are large) is held once."""
        found = tensor.detach().to("cpu", copy=True)
        same = (t for t in before if t.dtype == found.dtype and torch.equal(t, found))
        copies.append(next(same, found))
        return copies[-1]

    with with_own_attention(denoiser), watch_calls(denoiser, keep):
        for numbers in bar(_batches(prompts, sampling), "record calls", "batch"):
            batch, step = batch + 1, -1
            sample_batch(pipeline, prompts, numbers, sampling)
    if not calls:
        raise InputError(f"{_title(pipeline)} does not call its denoiser in {sampling.steps} steps: take more")
    return calls


@own_torch_state()
def predict(denoiser: nn.Module, call: Call) -> Tensor:
    """The denoiser's output for a recorded call, float32 on the CPU, `[B, C, H, W]` (or as the model has it)."""
    return output_of(denoiser, call)


def output_of(denoiser: nn.Module, call: Call) -> Tensor:
    """The same in torch's state as it is, gradients too."""
    output = denoiser(**call.to(device_of(denoiser), next(denoiser.parameters()).dtype), return_dict=False)[0]
    output = torch.stack(output) if isinstance(output, list) else output  # Z-Image's, of one image each
    return output.float().cpu()
