"""Slim model classes: a stock diffusers model whose inner layers are as small as its plan says.

`DiffusionPipeline.from_pretrained` imports this module by name from `model_index.json`: its path belongs to the format.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
from diffusers import ModelMixin
from torch import nn

from slimdiff.adapters import refuse_adapters
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Site
from slimdiff.groups.values import is_filled_up
from slimdiff.plan import Plan

# diffusers finds the loading method by the base classes that the *defining module* shows: ModelMixin must be one.
__all__ = ["ModelMixin", "fitting_sites", "plan_of", "resize", "slim_class_of"]


def __getattr__(name: str) -> Any:
    """Make the slim class of a diffusers model, `Slim` and its name, when it is first asked for (PEP 562)."""
    dense = _dense_class(name.removeprefix("Slim")) if name.startswith("Slim") else None
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _slim_class(dense, name)
    return globals()[name]


def _dense_class(name: str) -> type[ModelMixin] | None:
    """The model of diffusers with this name, if there is one."""
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None


def resize(denoiser: nn.Module, plan: Plan) -> None:
    """Replace the inner layers by uninitialised ones of the plan's ranks, in place (on `meta`, too).

    Raises:
        InputError: if the plan is for another architecture.
    """
    ranks, modules = plan.ranks(), dict(denoiser.named_modules())
    for site in fitting_sites(denoiser, plan).values():
        if site.path in ranks:
            GROUPS[site.group].resize(modules[site.path], site, ranks[site.path])


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
    modules = dict(denoiser.named_modules())
    for path in plan.layers:
        if not isinstance(modules.get(path), nn.Linear | nn.Conv2d):
            raise InputError(
                f"the plan says a precision of {path}, which is no linear or convolution of {type(denoiser).__name__}: "
                "it is another model's"
            )
    return sites


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
    if hasattr(base, "fuse_qkv_projections"):
        members["fuse_qkv_projections"] = refusing_unequal(base.fuse_qkv_projections)
    doc = f"A slim `{base.__name__}`: the same code with the inner dimensions of `slim_plan` (a `Plan` as JSON)."
    return type(name, (base,), {**members, "__doc__": doc})


def refusing_misfits(original: Callable[..., Any]) -> Callable[..., Any]:
    """An adapter that was trained on the slim model fits it; one of the dense model is refused in one line."""

    @functools.wraps(original)
    def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_filled_up(self):
            raise InputError(
                f"{type(self).__name__} has values that are slimmed alone, which take no adapter: fuse it into the "
                "dense model and slim that, or slim other groups"
            )
        try:
            return original(self, *args, **kwargs)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise InputError(
                f"this adapter does not fit {type(self).__name__}, whose layers are smaller than the dense model's: "
                "convert it with slimdiff lora, or fuse it into the dense model and slim that"
            ) from error

    return load_lora_adapter


def refusing_unequal(original: Callable[..., Any]) -> Callable[..., Any]:
    """What fuses projections would cut them into three equal parts again, which slim values are not."""

    @functools.wraps(original)
    def fuse_qkv_projections(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_filled_up(self):
            raise InputError(f"{type(self).__name__} has fewer values than queries: its projections cannot be fused")
        return original(self, *args, **kwargs)

    return fuse_qkv_projections


def slim_class_of(denoiser: nn.Module) -> type[ModelMixin]:
    """The slim class for a dense model.

    Raises:
        InputError: if it is slim already, of a class that has none, or has adapters attached.
    """
    if plan_of(denoiser) is not None:
        raise InputError("this model is slim already: slim the dense model that it was made from")
    name = type(denoiser).__name__
    if type(denoiser) is not _dense_class(name):
        raise InputError(
            f"{name} is not a model of diffusers {diffusers.__version__}: models of its own are slimmed alone"
        )
    refuse_adapters(denoiser)
    slim_class: type[ModelMixin] = getattr(sys.modules[__name__], f"Slim{name}")
    return slim_class


def plan_of(denoiser: Any) -> Plan | None:
    """The plan in a slim model's configuration; None for a dense model."""
    content = getattr(denoiser, "config", {}).get("slim_plan")
    return Plan.parse(dict(content), "slim_plan") if content else None
