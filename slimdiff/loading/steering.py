"""What steers a UNet beside its prompt, loaded from a folder of its own and held against the UNet that it steers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline, T2IAdapter
from torch import nn

from slimdiff.adapters import carry_fused
from slimdiff.denoising.steering import nets_of
from slimdiff.errors import InputError
from slimdiff.loading.components import load_component
from slimdiff.loading.ip_adapter import add_ip_adapter, check_ip_adapter
from slimdiff.loading.weights import find_weights
from slimdiff.settings import SteeringSettings
from slimdiff.storage import manifest

try:
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
except ImportError:  # diffusers before 0.33 had it there
    from diffusers.pipelines.controlnet import MultiControlNetModel

_STEERED = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint)?Pipeline")
_ALIKE = (
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""Settings that a ControlNet shares with its UNet: they decide what it is given, and the residuals' shapes."""


def check_steering(settings: SteeringSettings) -> None:
    """Refuse folders and files that hold no such model, by configurations and names of tensors.

    Raises:
        InputError: naming the folder and what it holds.
    """
    for folder, kind in _folders(settings):
        config = folder / "config.json"
        if not config.is_file():
            raise InputError(f"{folder} is no {kind.__name__}: there is no {config}; name a diffusers directory of one")
        content = manifest.read_json(config)
        name = content.get("_class_name") if isinstance(content, dict) else None
        if name != kind.__name__:
            raise InputError(f"{folder} holds a {name}, and a {kind.__name__} is asked for")
        find_weights(folder, kind)
    if settings.ip_adapter is not None:
        check_ip_adapter(settings.ip_adapter)


def steer(
    pipeline: DiffusionPipeline, settings: SteeringSettings, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """The pipeline of the same task, with the same components, that ControlNets or adapters steer.

    Args:
        pipeline: Stable Diffusion (XL), from text, from an image, or inpainting (an adapter: from text alone); dense or
            slim, for slimming leaves all that these meet as it is.
        settings: which; the pipeline itself is given back if they name none of the first two. An IP-Adapter is loaded
            into its UNet, as diffusers does.
        dtype: of their weights; that of their files if not given.

    Raises:
        InputError: for another pipeline, a folder without such a model, or a model of another UNet.
    """
    check_steering(settings)
    loaded = [_load(folder, kind, dtype) for folder, kind in _folders(settings)]
    made = pipeline
    if settings.adapter is not None:
        made = _sibling(pipeline, "Adapter", adapter=loaded[0])
    elif loaded:
        made = _sibling(
            pipeline, "ControlNet", controlnet=loaded[0] if len(loaded) == 1 else MultiControlNetModel(loaded)
        )
    if loaded:
        check_steered(made, [str(folder) for folder, _ in _folders(settings)])
    if settings.ip_adapter is not None:
        add_ip_adapter(made, settings.ip_adapter, dtype)
    return made


def load_controlnets(folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> nn.Module:
    """The ControlNets of a pipeline's directory: in `controlnet`, `controlnet_1` and on."""
    places = [folder]
    while (another := folder.with_name(f"{folder.name}_{len(places)}")).is_dir():
        places.append(another)
    kind = ControlNetModel
    return MultiControlNetModel(
        [load_component(place, kind, find_weights(place, kind), dtype, variant) for place in places]
    ).eval()


def check_steered(pipeline: Any, places: list[str] | None = None) -> None:
    """Refuse a pipeline whose ControlNets or T2I-Adapter are of another UNet than its own.

    Args:
        places: what an error calls them.

    Raises:
        InputError: naming what differs.
    """
    nets = nets_of(pipeline)
    for net, where in zip(nets, places or [type(pipeline).__name__] * len(nets), strict=True):
        if type(net) is ControlNetModel:
            _check_controlnet(pipeline, net, where)
        elif type(net) is T2IAdapter:
            _check_adapter(pipeline, net, where)
        else:
            raise InputError(f"{where} holds a {type(net).__name__}: only ControlNetModel and T2IAdapter are taken")


def _folders(settings: SteeringSettings) -> list[tuple[Path, Any]]:
    adapter = [(Path(settings.adapter), T2IAdapter)] if settings.adapter is not None else []
    return [(Path(folder), ControlNetModel) for folder in settings.controlnet] + adapter


def _sibling(pipeline: DiffusionPipeline, by: str, **parts: Any) -> DiffusionPipeline:
    """The pipeline of the same task, with the same components and settings, that is steered by a part more."""
    name = type(pipeline).__name__
    if nets_of(pipeline):
        raise InputError(f"{name} is steered already: name the model without that, or leave out what is to steer it")
    found = _STEERED.fullmatch(name)
    steered = f"StableDiffusion{found[1] or ''}{by}{found[2] or ''}Pipeline" if found else ""
    if (kind := getattr(diffusers, steered, None)) is None:
        raise InputError(f"diffusers has no {by} pipeline for the task of {name}")
    have: dict[str, Any] = {**pipeline.config, **pipeline.components, **parts}
    if hasattr(pipeline, "watermark"):  # which no setting says
        have["add_watermarker"] = pipeline.watermark is not None
    takes = inspect.signature(kind.__init__).parameters
    made = kind(**{name: value for name, value in have.items() if name in takes})
    made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
    carry_fused(pipeline, made)
    return made


def _check_controlnet(pipeline: Any, net: Any, where: str) -> None:
    """By both configurations: the first setting that differs is named, as it is in both."""
    unet = pipeline.unet.config
    layers = len(unet["block_out_channels"])
    for name in _ALIKE:
        own, its = (_plain(config.get(name), layers) for config in (net.config, unet))
        if own != its:
            raise InputError(_unlike("ControlNet", where, name, own, its))
    for name, its in (("in_channels", pipeline.vae.config.latent_channels), ("conditioning_channels", 3)):
        if net.config.get(name) != its:
            raise InputError(_unlike("ControlNet", where, name, net.config.get(name), its))
    if (own := pixels_of(net)) != pipeline.vae_scale_factor:
        raise InputError(
            f"the ControlNet in {where} takes {own} pixels a latent, and this model's VAE has "
            f"{pipeline.vae_scale_factor}: take one that was trained for it"
        )


def pixels_of(net: Any) -> int:
    """Pixels of the picture that steers, per latent along a side."""
    return 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)


def _check_adapter(pipeline: Any, adapter: Any, where: str) -> None:
    """By the shapes of its features and of the UNet's blocks, for images of the smallest size that both take."""
    unet, scale = pipeline.unet.config, pipeline.vae_scale_factor
    latents = 2 ** len(unet["block_out_channels"]) * max(1, adapter.total_downscale_factor // scale)
    features = features_of(adapter, 1, latents * scale, latents * scale)
    own, blocks = [tuple(one.shape[1:]) for one in features], _block_shapes(unet, latents)
    if own[: len(blocks)] != blocks or own[len(blocks) :] not in ([], blocks[-1:]):
        raise InputError(
            f"the adapter in {where} gives features {own} for {latents * scale} pixels, and the UNet's blocks are "
            f"{blocks}: take one that was trained for this model"
        )


@torch.no_grad()
def features_of(adapter: Any, batch: int, height: int, width: int) -> list[torch.Tensor]:
    """What a T2I-Adapter gives for black pictures of that size."""
    dtype = next(adapter.parameters()).dtype
    return list(adapter(torch.zeros(batch, adapter.config["in_channels"], height, width, dtype=dtype)))


def _block_shapes(unet: Mapping[str, Any], side: int) -> list[tuple[int, int, int]]:
    """Channels, height and width where a UNet's down blocks add an adapter's features to what they compute."""
    shapes = []
    for number, (kind, channels) in enumerate(zip(unet["down_block_types"], unet["block_out_channels"], strict=True)):
        last = number == len(unet["down_block_types"]) - 1
        halvings = number if last or "CrossAttn" in kind else number + 1  # the others add after they have downsampled
        shapes.append((channels, side >> halvings, side >> halvings))
    return shapes


def _plain(value: Any, layers: int) -> Any:
    """A setting as it is compared: one number for all blocks is that number for each."""
    value = list(value) if isinstance(value, list | tuple) else [value] * layers
    return value[0] if len(set(map(str, value))) == 1 else value


def _unlike(what: str, where: str, name: str, own: Any, its: Any) -> str:
    return (
        f"the {what} in {where} is of another UNet: its {name} is {own}, and this model's is {its}: take one that was "
        "trained for this model"
    )


def _load(folder: Path | str, kind: Any, dtype: torch.dtype | None) -> nn.Module:
    folder = Path(folder)
    try:
        return load_component(folder, kind, find_weights(folder, kind), dtype)
    except InputError:
        raise
    except Exception as error:  # diffusers raises anything for a broken configuration
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{folder} could not be loaded as a {kind.__name__}: {reason[0]}") from error
