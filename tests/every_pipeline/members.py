"""A tiny random member of every pipeline of diffusers that can have one, found by what its constructor asks for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
from families.family import PICTURES, TEXT, noise, quiet

from every_pipeline.components import COMPONENTS, WIDTH, make_component
from slimdiff import Sampling

SIZE = 16  # pixels, along each side

# What a pipeline's UNet has beyond the common one: channels of an image, a mask or a depth map beside the latents.
_UNETS: dict[str, dict[str, Any]] = {
    "StableDiffusionInpaintPipeline": {"in_channels": 9},
    "StableDiffusionInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionXLInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionUpscalePipeline": {"in_channels": 7, "num_class_embeds": 1000},
    "PaintByExamplePipeline": {"in_channels": 9},
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 32},
    "LatentConsistencyModelImg2ImgPipeline": {"time_cond_proj_dim": 32},
    "MarigoldDepthPipeline": {"in_channels": 8},
    "MarigoldNormalsPipeline": {"in_channels": 8},
}
_XL = {
    "use_linear_projection": True,
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}
_SETTINGS = {
    "add_watermarker": False,
    "requires_safety_checker": False,
    "default_processing_resolution": SIZE,
    "default_denoising_steps": 2,
    "prediction_type": "depth",
    "scale_invariant": True,
    "shift_invariant": True,
}
_NOT_NEEDED = ("image_encoder", "feature_extractor", "safety_checker")
# What a pipeline's call may ask for beside the prompt, of one image.
_GIVEN: dict[str, list[Any]] = {
    "image": PICTURES,
    "mask_image": [picture.convert("L") for picture in PICTURES],
    "control_image": PICTURES,
    "example_image": PICTURES,
    "control_mask": [picture.convert("L") for picture in PICTURES],
    "class_labels": [3, 5],
    "source_prompt": TEXT,
    "conditioning_frames": [[picture] * 2 for picture in PICTURES],
    "video": [[picture] * 2 for picture in PICTURES],
    "image_embeds": [noise(WIDTH, seed=0), noise(WIDTH, seed=1)],
    "negative_image_embeds": [noise(WIDTH, seed=2)] * 2,
    "token_indices": [[1], [2]],
}


# Of the call, what a pipeline has otherwise than others.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "ConsistencyModelPipeline": {"output_type": "pt"},
    "MarigoldDepthPipeline": {"output_type": "pt"},
    "MarigoldNormalsPipeline": {"output_type": "pt"},
    "StableDiffusionLDM3DPipeline": {"output_type": "np"},
}


class CannotBeMadeError(Exception):
    """Why a pipeline has no tiny member here."""


@cache
def pipeline_names() -> tuple[str, ...]:
    """Every pipeline that this diffusers has; one that it gets tomorrow is among them."""
    found = (name for name in dir(diffusers) if "Pipeline" in name)
    return tuple(sorted(name for name in found if _is_pipeline(getattr(diffusers, name, None))))


def _is_pipeline(kind: Any) -> bool:
    base = diffusers.DiffusionPipeline
    return inspect.isclass(kind) and issubclass(kind, base) and kind is not base


def make_member(name: str) -> diffusers.DiffusionPipeline:
    """A pipeline of that class, of tiny components with random weights.

    Raises:
        CannotBeMadeError: naming the component that there is no tiny one of.
    """
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.__init__).parameters
    xl = "text_encoder_2" in parameters and "CLIPTokenizer" in _classes(kind, "tokenizer_2")
    unet = {**(_XL if xl else {}), **_UNETS.get(name, {})}
    wide = {"width": 2 * WIDTH} if "text_encoder_3" in parameters else {}
    changes = {"UNet2DConditionModel": unet, "ControlNetModel": unet, "T5EncoderModel": wide}
    parts: dict[str, Any] = {}
    for part, parameter in list(parameters.items())[1:]:
        if part in _SETTINGS:
            parts[part] = _SETTINGS[part]
        elif part in _NOT_NEEDED and part in kind._optional_components:
            parts[part] = None
        elif made := _first_of(kind, part, changes):
            parts[part] = made[0]
        elif part in kind._optional_components:
            parts[part] = None
        elif parameter.default is inspect.Parameter.empty:
            raise CannotBeMadeError(f"no tiny {part} of {' or '.join(_classes(kind, part)) or 'any class'}")
    try:
        return quiet(kind(**parts))
    except Exception as error:
        raise CannotBeMadeError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


def _classes(kind: Any, part: str) -> list[str]:
    """The names of the classes that a pipeline takes for a component."""
    found = kind._get_signature_types().get(part, ())
    return [getattr(one, "__name__", str(one)) for one in found]


def _first_of(kind: Any, part: str, changes: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """The component in a list of one, or nothing."""
    for one in kind._get_signature_types().get(part, ()):
        name = getattr(one, "__name__", "")
        if name in COMPONENTS:
            return [make_component(name, **changes.get(name, {}))]
        if inspect.isclass(one) and issubclass(one, diffusers.SchedulerMixin) and one is not diffusers.SchedulerMixin:
            return [one()]
        if name == "KarrasDiffusionSchedulers":
            return [diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)]
    return []


def parameters_of(pipeline: diffusers.DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """Of the pipeline's call; VersatileDiffusionPipeline has none."""
    call = getattr(type(pipeline), "__call__", None)  # noqa: B004
    return inspect.signature(call).parameters if call else {}


def inputs_of(pipeline: diffusers.DiffusionPipeline) -> list[dict[str, Any]]:
    """Two images' inputs: of what the call may take, what there is a tiny one of."""
    parameters = parameters_of(pipeline)
    given = {name: values for name, values in {"prompt": TEXT, **_GIVEN}.items() if name in parameters}
    return [{name: values[i] for name, values in given.items()} for i in range(2)]


def sampling_of(pipeline: diffusers.DiffusionPipeline) -> Sampling:
    """Two images at once in two steps, with what is the same for both."""
    parameters = parameters_of(pipeline)
    same = {"num_frames": 2, "strength": 1.0, "max_sequence_length": 32}
    same |= {"use_resolution_binning": False, "_auto_resize": False}  # no other size than that of the tiny model
    arguments = {name: value for name, value in same.items() if name in parameters}
    size = {name: SIZE for name in ("height", "width") if name in parameters}
    own = _ARGUMENTS.get(type(pipeline).__name__, {})
    return Sampling(steps=2, batch=2, guidance=3.0, seed=1, arguments={**arguments, **own}, **size)
