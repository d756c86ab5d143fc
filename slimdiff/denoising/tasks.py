"""Tasks: what a pipeline makes an image from besides a prompt, by what its call takes.

| its call takes | task | one image is made from |
| --- | --- | --- |
| `prompt` | text to image | a prompt |
| `prompt`, `image` | image to image, refining, InstructPix2Pix, upscaling | a prompt and an image |
| `prompt`, `image`, `mask_image` | inpainting | a prompt, an image and a mask |
| `control_image`, or has a ControlNet or a T2I-Adapter | steered | a picture that steers, and one of these |
| `class_labels` | class-conditional | a class |
| none of them | unconditional | nothing |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from slimdiff.adapters import carry_fused
from slimdiff.denoising.long_prompts import warn_of_cuts
from slimdiff.denoising.sizes import check_size, enlarges, pixels_per_latent
from slimdiff.denoising.steering import control_name, has_ip_adapter, nets_of
from slimdiff.denoising.strength import check_strength
from slimdiff.errors import InputError
from slimdiff.prompts import Inputs
from slimdiff.prompts.material import Material, open_picture
from slimdiff.settings import Sampling

_ONE_AT_A_TIME = ("Flux", "Chroma", "QwenImage", "CogView4", "Lumina2", "Wan", "HunyuanVideo")
"""Beginnings of the names of pipelines whose guidance takes no second sample in a call of their denoiser."""


def for_task(pipeline: DiffusionPipeline, material: Material) -> DiffusionPipeline:
    """The pipeline that takes what is there: this one, or diffusers' image-to-image or inpainting one of its parts.

    Raises:
        InputError: if it makes nothing from images, masks or classes, and diffusers has no such pipeline of its model.
    """
    takes = _takes(pipeline)
    if material.classes and not ("class_labels" in takes and _count_classes(pipeline)):
        raise InputError(f"{type(pipeline).__name__} makes no images of classes: leave out --classes")
    if material.masks and not material.images:
        raise InputError("masks say what of an image is painted: give images with them")
    control, who = control_name(pipeline), type(pipeline).__name__
    if material.controls and control is None:
        raise InputError(f"no picture steers {who}: leave the control image out, or add what it steers (--controlnet)")
    if control is not None and not material.controls:
        raise InputError(f"a picture steers {who}: say which (--control-image, or --control-images for a folder)")
    if has_ip_adapter(pipeline) != (material.ip_adapter_image is not None):
        odd = "takes a picture as a prompt: say which" if has_ip_adapter(pipeline) else "has no IP-Adapter: leave out"
        raise InputError(f"{who} {odd} (--ip-adapter-image)")
    needed = [name for name, files in (("image", material.images), ("mask_image", material.masks)) if files]
    if set(needed) <= takes - ({control} if material.images else set()):
        return pipeline
    kind: Any = AutoPipelineForInpainting if material.masks else AutoPipelineForImage2Image
    try:
        other = kind.from_pipe(pipeline)
    except (ValueError, TypeError, AttributeError) as error:
        what = "inpaints nothing" if material.masks else "makes no images from images"
        reason = str(error).splitlines()[0]
        raise InputError(f"{type(pipeline).__name__} {what}, and diffusers has no such pipeline ({reason})") from error
    carry_fused(pipeline, other)
    return other


def make_inputs(pipeline: DiffusionPipeline, material: Material, sampling: Sampling) -> tuple[list[Inputs], Sampling]:
    """One image's inputs each, for `sample_images` and `compress`, and the sampling that goes with them.

    Where `sampling` has a height and a width, pictures are cut to that shape and resized (`open_picture`). A pipeline
    whose call takes no size then gets none, for its images' is their pictures'.

    Raises:
        InputError: if the pipeline needs something that is not there, or takes no prompt and was given some; for
            pictures of different sizes, or of a size that the pipeline would round; see `check_strength` too.
    """
    takes = _takes(pipeline)
    check_strength(pipeline, sampling.steps, sampling.arguments)
    if material.prompts and "prompt" not in takes and not material.default_prompts:
        raise InputError(f"{type(pipeline).__name__} takes no prompt: leave it out")
    if "prompt" in takes and not material.prompts and not {"prompt_embeds", "image_embeds"} & sampling.arguments.keys():
        raise InputError(f"{type(pipeline).__name__} makes images of prompts: say what to show (--prompt)")
    if "class_labels" in takes and "prompt" not in takes and not material.classes and _count_classes(pipeline):
        raise InputError(f"{type(pipeline).__name__} makes images of classes: say which (--classes 0,1,2)")
    if "image" in takes and not (material.images or "image" in sampling.arguments or {"height", "width"} <= takes):
        raise InputError(f"{type(pipeline).__name__} makes images from images: say which (--image, or --images)")
    lists = (material.prompts, material.images, material.classes)
    count = material.count or max(map(len, lists), default=0)
    images, masks = list(material.images)[:count], list(material.masks)[:count]
    if masks and len(masks) != len(images):
        raise InputError(f"there are {len(masks)} masks for {len(images)} images: give one for each (`pair_masks`)")
    _check_classes(pipeline, material)
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in (("prompt", material.prompts), ("class_labels", material.classes)):
        if values and name in takes:
            for number, row in enumerate(rows):
                row[name] = values[number % len(values)]
    size = None
    if sampling.width and sampling.height:
        size = (sampling.width // enlarges(pipeline), sampling.height // enlarges(pipeline))
    controls = _controls(pipeline, material, count, size)
    if controls:
        _steer(pipeline, rows, controls)
        sampling = _sized(sampling, controls[0].size, takes)
    if material.ip_adapter_image is not None:
        shown = open_picture(material.ip_adapter_image)
        for row in rows:
            row["ip_adapter_image"] = shown
    if images:
        pictures = [open_picture(file, size) for file in images]
        _check_sizes(pipeline, [*images, *list(material.controls)[:1]], [*pictures, *controls[:1]])
        painted = [open_picture(mask, size, "L") for mask in masks]
        odd = next((i for i, mask in enumerate(painted) if mask.size != pictures[i].size), None)
        if odd is not None:
            two = (f"{n} x {m}" for n, m in (painted[odd].size, pictures[odd].size))
            raise InputError(f"the mask {masks[odd]} is {' and its image '.join(two)}: save it in its image's size")
        for number, row in enumerate(rows):
            row["image"] = _as_taken(pipeline, pictures[number % len(pictures)])
            if painted:
                row["mask_image"] = painted[number % len(painted)]
        sampling = _sized(sampling, pictures[0].size, takes)
    inputs: list[Inputs] = [row["prompt"] if row.keys() == {"prompt"} else row for row in rows]
    warn_of_cuts(pipeline, inputs, sampling)
    return inputs, sampling


def neutral_inputs(
    pipeline: DiffusionPipeline, count: int, sampling: Sampling, prompt: str = ""
) -> tuple[list[Inputs], Sampling]:
    """Inputs for shapes, or for parity, and the sampling that goes with them: a grey image, a white mask, class 0.

    Args:
        sampling: height and width are of the images that come out; the pipeline's default if it has none.
    """
    whole: Any = pipeline
    takes, config = _takes(pipeline), getattr(getattr(whole, "unet", None), "config", {})
    row: dict[str, Any] = {"prompt": prompt} if "prompt" in takes else {}
    if "class_labels" in takes and _count_classes(pipeline):
        row["class_labels"] = 0
    scale = pixels_per_latent(whole)
    own = config.get("sample_size")
    default = own if isinstance(own, list | tuple) else [own, own]
    whole_size = [(d or 64) * scale for d in default]
    size = [n or d for n, d in zip((sampling.height, sampling.width), whole_size, strict=True)]
    high, wide = (n // enlarges(pipeline) for n in size)
    pictures = {"image": "RGB", "control_image": "RGB", "mask_image": "L"}
    for name, mode in pictures.items():
        if name in takes:
            picture = Image.new(mode, (wide, high), "white" if mode == "L" else "grey")
            row[name] = _as_taken(pipeline, picture)
    if (control := control_name(pipeline)) is not None:
        _steer(pipeline, [row], [row[control].convert(_mode(pipeline))] * max(1, len(nets_of(pipeline))))
    if has_ip_adapter(pipeline):
        row["ip_adapter_image"] = Image.new("RGB", (wide, high), "grey")
    sized = pictures.keys() & row.keys() or size == whole_size
    if sized and not {"height", "width"} <= takes:
        sampling = sampling.model_copy(update={"height": None, "width": None})
    return [prompt if row == {"prompt": prompt} else row] * count, sampling


def samples_per_image(pipeline: Any, sampling: Sampling) -> int:
    """How many samples of a denoiser call one image takes: two with classifier-free guidance, one without.

    InstructPix2Pix takes three, for its guidance by the image. Models distilled with their guidance (LCM, Flux) take it
    as an input, and one sample; so do those whose pipelines call them twice, once for the negative prompt.
    """
    takes = _takes(pipeline)
    if type(pipeline).__name__.startswith(_ONE_AT_A_TIME):
        return 1
    config = getattr(getattr(pipeline, "unet", None), "config", {})
    # Upscalers of latents have such an input for other things, and guide.
    embedded = config.get("time_cond_proj_dim") and hasattr(type(pipeline), "do_classifier_free_guidance")
    if "guidance_scale" not in takes or sampling.guidance <= 1 or embedded:
        return 1
    by_image = inspect.signature(pipeline.__call__).parameters.get("image_guidance_scale")
    if by_image is not None and sampling.arguments.get("image_guidance_scale", by_image.default) >= 1:
        return 3
    return 2


def text_of(inputs: Inputs) -> str:
    """What one image is made from, for people: its prompt, its class, or nothing."""
    if isinstance(inputs, str):
        return inputs
    if "prompt" in inputs:
        return str(inputs["prompt"])
    return f"class {inputs['class_labels']}" if "class_labels" in inputs else ""


def has_prompts(inputs: Sequence[Inputs]) -> bool:
    """Whether all of them have a prompt."""
    return all(isinstance(one, str) or "prompt" in one for one in inputs)


def _takes(pipeline: DiffusionPipeline) -> set[str]:
    return set(inspect.signature(pipeline.__call__).parameters)


def _as_taken(pipeline: Any, picture: Image.Image) -> Any:
    """A picture as the pipeline takes several: `[3, H, W]` in [-1, 1] where it takes no list of them."""
    if type(pipeline).__name__ != "LDMSuperResolutionPipeline":
        return picture
    return VaeImageProcessor(do_resize=False).preprocess(picture)[0]


def _count_classes(pipeline: Any) -> int:
    """How many classes the denoiser knows; 0 if it knows none."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    config = getattr(denoiser, "config", {})
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0


def _check_classes(pipeline: Any, material: Material) -> None:
    classes, known = material.classes, _count_classes(pipeline)
    if classes and known and max(classes) >= known:
        raise InputError(f"{type(pipeline).__name__} has classes 0 to {known - 1}, and {max(classes)} is asked for")


def _check_sizes(pipeline: Any, files: Sequence[Path], pictures: Sequence[Any]) -> None:
    first = pictures[0].size
    for file, picture in zip(files, pictures, strict=True):
        if picture.size != first:
            raise InputError(
                f"{files[0]} is {first[0]} x {first[1]} pixels and {file} {picture.size[0]} x {picture.size[1]}: say "
                "with --height and --width which size they are cut and resized to"
            )
    try:
        check_size(pipeline, {"width": first[0], "height": first[1]})
    except InputError as error:
        raise InputError(f"{files[0]}: {error}, or say --height and --width") from error


def _controls(pipeline: Any, material: Material, count: int, size: tuple[int, int] | None) -> list[Any]:
    """The pictures that steer, all of one size."""
    nets = len(nets_of(pipeline))
    files, first = list(material.controls), material.first
    files = files if nets > 1 else (files[first:] + files[:first])[:count]
    if files and len(files) != nets > 1:
        raise InputError(f"{len(files)} control images are there for {nets} ControlNets: give one for each")
    pictures = [open_picture(file, size, _mode(pipeline)) for file in files]
    if pictures:
        _check_sizes(pipeline, files, pictures)
    return pictures


def _mode(pipeline: Any) -> str:
    """Of pictures that steer: some T2I-Adapters take one channel."""
    return "L" if getattr(next(iter(nets_of(pipeline)), None), "config", {}).get("in_channels") == 1 else "RGB"


def _steer(pipeline: Any, rows: list[dict[str, Any]], controls: Sequence[Any]) -> None:
    """Put the pictures that steer into the rows: all of them in each, where there are several ControlNets."""
    several = len(nets_of(pipeline)) > 1
    for number, row in enumerate(rows):
        row[str(control_name(pipeline))] = list(controls) if several else controls[number % len(controls)]


def _sized(sampling: Sampling, picture: tuple[int, int], takes: set[str]) -> Sampling:
    """Without a size for a pipeline that takes none; with the pictures' for one that would resize them to its own."""
    size: dict[str, int | None] = {"width": None, "height": None}
    if {"width", "height"} <= takes:
        size = {"width": picture[0], "height": picture[1]}
    return sampling.model_copy(update=size)
