"""What a denoiser is called with, and the names that its graph has for it: the one table of both.

A kind of input is a row of `NAMES`. Export, runtimes, validation, latency and engines all read it from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.errors import InputError

_TRANSFORMERS = (
    *("pooled_projections", "guidance", "encoder_attention_mask", "encoder_hidden_states_mask"),
    *("attention_mask", "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"),
    *("image_meta_size", "style", "original_size", "target_size", "crop_coords"),
    *("txt_ids", "img_ids", "image_rotary_emb"),
)
"""Inputs that transformers alone have."""
NAMES: dict[tuple[str, ...], str] = {
    ("sample",): "sample",
    ("hidden_states",): "hidden_states",
    ("timestep",): "timestep",
    ("encoder_hidden_states",): "encoder_hidden_states",
    ("class_labels",): "class_labels",
    ("timestep_cond",): "timestep_cond",
    ("added_cond_kwargs", "text_embeds"): "text_embeds",
    ("added_cond_kwargs", "time_ids"): "time_ids",
    ("added_cond_kwargs", "image_embeds"): "image_embeds",
    ("added_cond_kwargs", "hint"): "hint",
    ("down_block_additional_residuals",): "down_block_additional_residuals",
    ("mid_block_additional_residual",): "mid_block_additional_residual",
    ("down_intrablock_additional_residuals",): "down_intrablock_additional_residuals",
    ("controlnet_cond",): "controlnet_cond",
    ("conditioning_scale",): "conditioning_scale",
    ("kept",): "kept",
    **{(name,): name for name in _TRANSFORMERS},
    ("added_cond_kwargs", "resolution"): "resolution",
    ("added_cond_kwargs", "aspect_ratio"): "aspect_ratio",
}
"""Place among the arguments of a denoiser's call -> name of the graph's input.

Where a place holds a list, there is an input per item, with its number: `down_block_additional_residuals_0`.
"""

PROMPT = ("encoder_hidden_states", "image_embeds")
"""Inputs that stay the same from an image's first step to its last, and that cross-attention takes."""
TIME = ("timestep", "class_labels", "timestep_cond", "text_embeds", "time_ids")
"""Inputs that the embedding of the time is made of: all but `timestep` stay the same, too."""
KEPT = "kept"
"""What enters an up block, given by a whole UNet's graph and taken by its shallow one: `exporters.graphs.scheduled`."""
SCALARS = ("timestep", "conditioning_scale")
"""Inputs that are one number for all samples; a transformer's `timestep` is one a sample."""
SAMPLES = ("sample", "hidden_states")
"""Inputs that are denoised: a UNet's, and a transformer's."""
PLACES = ("txt_ids", "img_ids", "image_rotary_emb")
"""Where tokens are: `[tokens, ...]`, the same for all samples, unless there is a dim more."""
BATCH = "batch"
"""Name of the open dim of samples."""
_FIRST = (*SAMPLES, "timestep", "encoder_hidden_states", *PLACES)
_PLACES = {name: place for place, name in NAMES.items()}

Path = tuple[str | int, ...]


def named_inputs(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a call by the names of graph inputs, in the graph's order; and those that none is for.

    What is None, False or empty is no input. A value for all samples at once, of batch 1, is spread over sample's batch
    where torch would spread it.
    """
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for path, value in _leaves(arguments, ()):
        place = tuple(key for key in path if isinstance(key, str))
        numbers = [str(key) for key in path if isinstance(key, int)]
        known = place in NAMES and not ("sample" in arguments and NAMES[place] in _TRANSFORMERS)
        if not known or len(numbers) > 1 or not (isinstance(value, Tensor) or NAMES[place] in SCALARS):
            unknown.append(path_text(path))
        else:
            found["_".join([NAMES[place], *numbers])] = value
    batch = next((len(found[name]) for name in SAMPLES if name in found), 1)
    for name, value in found.items():
        if kind_of_input(name) not in (*_FIRST, *SCALARS) and value.ndim and len(value) == 1 < batch:
            found[name] = value.expand(batch, *value.shape[1:])
    return {name: found[name] for name in in_order(found)}, unknown


def in_order(inputs: Iterable[str]) -> list[str]:
    """Names of a graph's inputs, in the graph's order."""
    ranks = {name: rank for rank, name in enumerate(NAMES.values())}
    return sorted(inputs, key=lambda name: (ranks[kind_of_input(name)], _number(name)))


def arguments_from(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round: a call's arguments, lists being lists, from what `named_inputs` gave, in its order."""
    arguments: dict[str, Any] = {}
    for name, value in inputs.items():
        kind = kind_of_input(name)
        *around, last = _PLACES[kind]
        within = arguments
        for key in around:
            within = within.setdefault(key, {})
        if kind == name:
            within[last] = value
        else:
            within.setdefault(last, []).append(value)
    return arguments


def in_graph_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """An input as a graph of that dtype has it: whole numbers as int64, and single numbers and places as float32.

    Half precision has not the digits for a time, nor for a class that is one, nor for the place of a token.
    """
    if not value.is_floating_point():
        return value if value.dtype == torch.bool else value.long()
    if name == "timestep":
        return value
    if kind_of_input(name) in PLACES:
        return value.float()
    return value.to(torch.float32 if value.ndim <= 1 else dtype)


def open_inputs(
    examples: Mapping[str, Tensor], *, batch: bool, step: int | None
) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Examples for a graph that is open in the batch, or in the size, and its open dims by input and axis.

    torch.export takes a batch of 1, and a side of one step, for constants: such examples are made larger.

    Args:
        step: what height and width of `sample` are multiples of, if they are open. Pictures `[B, C, H, W]` whose sides
            are sample's halved some times, or a multiple, follow them. Of `hidden_states [B, tokens, C]` the number
            of tokens is open, whatever it is.
    """
    values, dims = dict(examples), {name: {} for name in examples}  # type: dict[str, Tensor], dict[str, dict[int, Any]]
    main = sample_name(examples)
    if batch:
        each = [name for name, value in values.items() if value.ndim and not _of_all_samples(name, value)]
        if len(values[main]) == 1:
            values |= {name: torch.cat([values[name]] * 2) for name in each}
        dims |= {name: {0: BATCH} for name in each}
    if step and values[main].ndim == 3:
        for name in (main, "img_ids"):
            if name in values:
                dims[name] |= {values[name].ndim - 2: torch.export.Dim("tokens", min=2)}
    elif step:
        sample = tuple(values[main].shape)
        for name, value in values.items():
            if own := _own_step(name, tuple(value.shape), sample, step):
                values[name] = in_steps(value, own)
                dims[name] |= open_size(own)
    return values, {name: opened for name, opened in dims.items() if opened}


def open_size(step: int) -> dict[int, Any]:
    """Open height and width of a tensor `[B, C, H, W]`, as multiples of `step`."""
    return {axis: step * torch.export.Dim(name, min=2) for axis, name in ((2, "height"), (3, "width"))}


def in_steps(example: Tensor, step: int) -> Tensor:
    """An example `[B, C, H, W]` for open sizes: two steps high and wide or more, for torch takes one for a constant."""
    height, width = (max(2, -(-size // step)) * step for size in example.shape[-2:])
    if (height, width) == tuple(example.shape[-2:]):
        return example
    return nn.functional.interpolate(example, (height, width))


def sample_name(names: Iterable[str]) -> str:
    """Which of a denoiser's inputs is denoised.

    Raises:
        InputError: if none is.
    """
    there = list(names)
    if (found := next((name for name in SAMPLES if name in there), None)) is None:
        raise InputError(f"a denoiser takes {' or '.join(SAMPLES)}, and this one takes {', '.join(there)}")
    return found


def latent_size(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents that a call denoises, which a VAE decodes.

    Tokens of a transformer that are two by two latents each say by their places how many rows there are.

    Raises:
        InputError: if they are tokens without places, of which no height and width is known.
    """
    if isinstance(places := arguments.get("img_ids"), Tensor):
        rows, columns = (2 * (int(places[..., axis].max()) + 1) for axis in (1, 2))
        return rows, columns
    name = sample_name(arguments)
    shape = tuple(arguments[name].shape)
    if len(shape) != 4:
        raise InputError(f"{name} {list(shape)} does not say its height and width: latents are [B, C, H, W]")
    return shape[2], shape[3]


def is_denoiser_input(name: str) -> bool:
    """Whether a graph's input is one that the table knows."""
    return kind_of_input(name) in _PLACES


def _own_step(name: str, shape: tuple[int, ...], sample: tuple[int, ...], step: int) -> int | None:
    """What the sides of an input are multiples of where sample's are of `step`; None if they do not follow."""
    if len(shape) != 4 or kind_of_input(name) == "image_embeds":  # `[B, images, tokens, D]`
        return None
    (height, width), (whole_height, whole_width) = shape[-2:], sample[-2:]
    if height > whole_height:
        times = height // whole_height
        return step * times if (times * whole_height, times * whole_width) == (height, width) else None
    halved = (n for n in range(step.bit_length()) if (-(-whole_height // 2**n), -(-whole_width // 2**n)) == shape[-2:])
    return next((step // 2**n for n in halved), None)


def _of_all_samples(name: str, value: Tensor) -> bool:
    """Whether an input is the same for all samples, and has no batch."""
    return name == "conditioning_scale" or (kind_of_input(name) in PLACES and value.ndim == 2)


def path_text(path: Path) -> str:
    """`added_cond_kwargs['hint']`."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def kind_of_input(name: str) -> str:
    """`down_block_additional_residuals` of the name of one of them."""
    kind, _, number = name.rpartition("_")
    return kind if number.isdigit() and kind in _PLACES else name


def _number(name: str) -> int:
    return 0 if kind_of_input(name) == name else int(name.rpartition("_")[2])


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    elif value is not None and value is not False:
        yield path, value
