"""Slim model classes: a stock diffusers model whose inner layers are as small as its plan says.

`DiffusionPipeline.from_pretrained` imports this module by name from `model_index.json`: its path belongs to the format.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn

from slimdiff.adapters import refuse_adapters
from slimdiff.errors import InputError
from slimdiff.groups.sites import Site, attention_linears, feed_forward_linears, find_sites, resnet_layers
from slimdiff.plan import Plan

# diffusers finds the loading method by the base classes that the *defining module* shows: ModelMixin must be one.
__all__ = [
    "ModelMixin",
    "SlimDiTTransformer2DModel",
    "SlimFluxTransformer2DModel",
    "SlimHunyuanDiT2DModel",
    "SlimPixArtTransformer2DModel",
    "SlimSD3Transformer2DModel",
    "SlimUNet2DConditionModel",
    "SlimUNet2DModel",
    "SlimUNet3DConditionModel",
    "SlimUNetMotionModel",
    "SlimUNetSpatioTemporalConditionModel",
    "fitting_sites",
    "plan_of",
    "resize",
    "resize_resnet",
    "slim_class_of",
]


def resize(denoiser: nn.Module, plan: Plan) -> None:
    """Replace the inner layers by uninitialised ones of the plan's ranks, in place (on `meta`, too).

    Attention keeps its stock processors: they divide by the root of the *new* head dimension, for which the weights
    are scaled when they are made (`slimming.py`).

    Raises:
        InputError: if the plan is for another architecture.
    """
    sites = fitting_sites(denoiser, plan)
    modules = dict(denoiser.named_modules())
    for path, rank in plan.ranks().items():
        module = modules[path]
        if f"{path}.feed_forward" in sites:
            up, down, gated = feed_forward_linears(module)
            module.net[0].proj = _linear_like(up, up.in_features, rank * (2 if gated else 1))  # type: ignore[union-attr,index]
            module.net[2] = _linear_like(down, rank, down.out_features)  # type: ignore[operator]
        elif f"{path}.resnet" in sites:
            resize_resnet(module, rank)
        else:
            query, key, value, output = attention_linears(module)
            inner = rank * sites[f"{path}.query_key"].heads
            module.to_q = _linear_like(query, query.in_features, inner)
            module.to_k = _linear_like(key, key.in_features, inner)
            module.to_v = _linear_like(value, value.in_features, inner)
            module.to_out[0] = _linear_like(output, inner, output.out_features)  # type: ignore[operator]
            module.inner_dim = module.inner_kv_dim = inner  # type: ignore[assignment]
            module.scale = rank**-0.5  # type: ignore[assignment]


def fitting_sites(denoiser: nn.Module, plan: Plan) -> dict[str, Site]:
    """The denoiser's sites by name, if the plan is for its architecture.

    Raises:
        InputError: if it is not.
    """
    sites = {s.name: s for s in find_sites(denoiser)[0]}
    for name, planned in plan.sites.items():
        site = sites.get(name)
        if site is None:
            raise InputError(
                f"the plan slims {name}, which {type(denoiser).__name__} does not have: it is another model's"
            )
        if (site.dense_rank, site.heads) != (planned.dense_rank, planned.heads):
            raise InputError(
                f"the plan says {name} has {planned.heads} x {planned.dense_rank} dense dimensions, "
                f"the model has {site.heads} x {site.dense_rank}: it is another model's plan"
            )
        if planned.rank % site.multiple:
            raise InputError(
                f"the plan keeps {planned.rank} channels at {name}, whose group norm has {site.multiple} groups: "
                f"make it a multiple of {site.multiple}"
            )
    return sites


def _linear_like(old: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    weight = old.weight
    return nn.utils.skip_init(
        nn.Linear, in_features, out_features, old.bias is not None, device=weight.device, dtype=weight.dtype
    )


def resize_resnet(block: nn.Module, channels: int) -> None:
    """Replace a `ResnetBlock2D`'s inner layers by uninitialised ones of so many inner channels, in place."""
    layers = resnet_layers(block)
    first, norm, second = layers.first, layers.norm, layers.second
    weight = first.weight
    kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    block.conv1 = nn.utils.skip_init(nn.Conv2d, first.in_channels, channels, 3, padding=1, **kind)
    if layers.time is not None:
        block.time_emb_proj = _linear_like(layers.time, layers.time.in_features, layers.parts * channels)
    block.norm2 = nn.GroupNorm(norm.num_groups, channels, norm.eps, **kind)
    block.conv2 = nn.utils.skip_init(nn.Conv2d, channels, second.out_channels, 3, padding=1, **kind)


def _slim_class(base: type[ModelMixin], name: str) -> type[ModelMixin]:
    """A subclass of a diffusers model with one more configuration key, `slim_plan`."""

    def __init__(self: Any, slim_plan: Mapping[str, Any] | None = None, **config: Any) -> None:
        base.__init__(self, **config)
        self.register_to_config(slim_plan=dict(slim_plan) if slim_plan else None)
        if slim_plan:
            resize(self, Plan.parse(dict(slim_plan), "slim_plan in config.json"))

    # diffusers decides by the signature which keys of config.json are the model's own.
    own = inspect.Parameter("slim_plan", inspect.Parameter.KEYWORD_ONLY, default=None)
    original = inspect.signature(base.__init__)
    parameters = [p for p in original.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    __init__.__signature__ = original.replace(parameters=[*parameters, own])  # type: ignore[attr-defined]
    members: dict[str, Any] = {"__init__": __init__, "__module__": __name__}
    if hasattr(base, "load_lora_adapter"):
        members["load_lora_adapter"] = refusing_misfits(base.load_lora_adapter)
    doc = f"A slim `{base.__name__}`: the same code with the inner dimensions of `slim_plan` (a `Plan` as JSON)."
    return type(name, (base,), {**members, "__doc__": doc})


def refusing_misfits(original: Callable[..., Any]) -> Callable[..., Any]:
    """An adapter that was trained on the slim model fits it; one of the dense model is refused in one line."""

    @functools.wraps(original)
    def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise InputError(
                f"this adapter does not fit {type(self).__name__}, whose layers are smaller than the dense model's: "
                "fuse it into the dense model and slim that"
            ) from error

    return load_lora_adapter


SlimDiTTransformer2DModel = _slim_class(DiTTransformer2DModel, "SlimDiTTransformer2DModel")
SlimFluxTransformer2DModel = _slim_class(FluxTransformer2DModel, "SlimFluxTransformer2DModel")
SlimHunyuanDiT2DModel = _slim_class(HunyuanDiT2DModel, "SlimHunyuanDiT2DModel")
SlimPixArtTransformer2DModel = _slim_class(PixArtTransformer2DModel, "SlimPixArtTransformer2DModel")
SlimSD3Transformer2DModel = _slim_class(SD3Transformer2DModel, "SlimSD3Transformer2DModel")
SlimUNet2DConditionModel = _slim_class(UNet2DConditionModel, "SlimUNet2DConditionModel")
SlimUNet2DModel = _slim_class(UNet2DModel, "SlimUNet2DModel")
SlimUNet3DConditionModel = _slim_class(UNet3DConditionModel, "SlimUNet3DConditionModel")
SlimUNetMotionModel = _slim_class(UNetMotionModel, "SlimUNetMotionModel")
SlimUNetSpatioTemporalConditionModel = _slim_class(
    UNetSpatioTemporalConditionModel, "SlimUNetSpatioTemporalConditionModel"
)

# A slim class's only base is the dense one.
_SLIM_CLASSES: dict[type, type[ModelMixin]] = {
    slim.__bases__[0]: slim
    for slim in (
        SlimDiTTransformer2DModel,
        SlimFluxTransformer2DModel,
        SlimHunyuanDiT2DModel,
        SlimPixArtTransformer2DModel,
        SlimSD3Transformer2DModel,
        SlimUNet2DConditionModel,
        SlimUNet2DModel,
        SlimUNet3DConditionModel,
        SlimUNetMotionModel,
        SlimUNetSpatioTemporalConditionModel,
    )
}


def slim_class_of(denoiser: nn.Module) -> type[ModelMixin]:
    """The slim class for a dense model.

    Raises:
        InputError: if it is slim already, of a class that has none, or has adapters attached.
    """
    if plan_of(denoiser) is not None:
        raise InputError("this model is slim already: slim the dense model that it was made from")
    if type(denoiser) not in _SLIM_CLASSES:
        known = ", ".join(c.__name__ for c in _SLIM_CLASSES)
        raise InputError(f"{type(denoiser).__name__} cannot be slimmed yet: supported are {known}")
    refuse_adapters(denoiser)
    return _SLIM_CLASSES[type(denoiser)]


def plan_of(denoiser: Any) -> Plan | None:
    """The plan in a slim model's configuration; None for a dense model."""
    content = getattr(denoiser, "config", {}).get("slim_plan")
    return Plan.parse(dict(content), "slim_plan") if content else None
