"""The denoiser apart from what wraps it: what is slimmed, watched and measured is a copy that shares its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from slimdiff.adapters import refuse_adapters
from slimdiff.denoising.offloading import shards_of
from slimdiff.errors import InputError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INSIDE = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_FUSED = ("to_qkv", "to_kv", "to_added_qkv")


def plain(module: Any) -> Any:
    """What `torch.compile`, `DataParallel` or `DistributedDataParallel` was put around; else the module itself."""
    while (inside := _INSIDE.get(type(module).__name__)) is not None:
        module = getattr(module, inside)
    return module


def twin(module: nn.Module, parameter: Callable[[nn.Parameter], nn.Parameter] = lambda p: p) -> nn.Module:
    """A copy of the tree of modules, not compiled, with the same tensors, hooks and attention processors.

    Args:
        parameter: what stands for each parameter in the copy.

    Raises:
        InputError: if a module holds something that cannot be copied.
    """
    shared: list[Any] = list(module.buffers())
    for part in module.modules():
        shared += [hook for name in _HOOKS for hook in getattr(part, name).values()]
        processor = getattr(part, "processor", None)
        shared += [] if processor is None or isinstance(processor, nn.Module) else [processor]
    memo = {id(thing): thing for thing in shared} | {id(p): parameter(p) for p in module.parameters()}
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"{type(module).__name__} holds something that cannot be copied ({error}): take it off"
        ) from error


def at_rest(module: Any) -> Any:
    """The plain module's `twin` in evaluation mode; what is no diffusers model, such as a runtime's, as it is."""
    module = plain(module)
    return twin(module).eval() if isinstance(module, ModelMixin) else module


def working_copy(denoiser: nn.Module) -> nn.Module:
    """What is calibrated, planned on and slimmed in the place of a denoiser; the denoiser itself is left as it is.

    Raises:
        InputError: listing what was done to it that slimming cannot carry over, and how to undo that.
    """
    denoiser = plain(denoiser)
    refuse_adapters(denoiser)
    if found := dict.fromkeys(_obstacles(denoiser)):
        raise InputError(f"{type(denoiser).__name__} cannot be slimmed as it is: {'; '.join(found)}")
    work = twin(denoiser).eval()
    for part in work.modules():  # diffusers' unfuse_qkv_projections leaves them behind, without a use
        if isinstance(getattr(part, "fused_projections", None), bool):
            cast(Any, part).fused_projections = False
            for name in _FUSED:
                part._modules.pop(name, None)
    if difference := _strays(work):
        raise InputError(
            f"{type(denoiser).__name__} cannot be slimmed as it is: {difference} is not what its configuration says, "
            "so that its slim model could not be opened again: undo what changed it, or load it again"
        )
    return work


def _obstacles(denoiser: nn.Module) -> Iterator[str]:
    """What was done to a denoiser that slimming cannot carry over, each with how to undo it."""
    parts, ours = list(denoiser.modules()), shards_of(denoiser) is not None
    if not ours and any(hasattr(part, "_hf_hook") for part in parts):
        yield "accelerate's hooks offload or dispatch it: pipe.remove_all_hooks() first"
    for part in parts:
        for name in getattr(getattr(part, "_diffusers_hook", None), "hooks", ()):
            yield f"diffusers' hook {name} is on it: load it again without that (a cache: disable_cache() first)"
        if type(getattr(part, "processor", None)).__name__.startswith("Fused"):
            yield "its projections are fused: unfuse_qkv_projections() first"
        if "IPAdapter" in f"{type(part).__name__} {type(getattr(part, 'processor', None)).__name__}":
            yield "an IP adapter is loaded: pipe.unload_ip_adapter() first"
        if is_parametrized(part):
            yield "it is parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
        for hook in part._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                yield f"{type(hook).__name__} recomputes its weights: torch.nn.utils' remove function of that first"
    if not any(hasattr(p, "_hf_hook") or hasattr(p, "_diffusers_hook") for p in parts):
        for path, part in denoiser.named_modules():
            if type(vars(part).get("forward")).__name__ in ("method", "function", "partial"):
                yield f"the forward of {path or 'the model'} was replaced: take off what did that"
                break
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if type(tensor) not in (nn.Parameter, Tensor):
            yield f"its weights are {type(tensor).__name__}s, quantised or sharded: load it again without that"
        elif tensor.is_meta and not ours:
            yield "its weights are on the device meta, which holds none: load them"
        elif isinstance(tensor, nn.Parameter) and tensor.dtype not in _DTYPES:
            yield f"its weights are {str(tensor.dtype).removeprefix('torch.')}: load it in float32, float16 or bfloat16"


def _strays(denoiser: nn.Module) -> str | None:
    """The first weight of a diffusers model that its configuration does not say, or says otherwise."""
    kind: Any = type(denoiser)
    if not isinstance(denoiser, ModelMixin) or not kind.__module__.startswith("diffusers."):
        return None
    with torch.device("meta"):
        expected = {name: t.shape for name, t in kind.from_config(denoiser.config).state_dict().items()}
    own = {name: t.shape for name, t in denoiser.state_dict().items()}
    return next((name for name in (*own, *expected) if own.get(name) != expected.get(name)), None)


def carry_modes(dense: nn.Module, slim: nn.Module) -> None:
    """Give a slim model the dense one's training mode, `requires_grad` and forward hooks, layer by layer."""
    dense = plain(dense)
    for path, part in dense.named_modules():
        if path.rpartition(".")[2] in _FUSED:
            continue
        other = slim.get_submodule(path)
        other.training = part.training
        for name in (*_HOOKS, *_FLAGS):
            getattr(other, name).update(getattr(part, name))
    for name, weight in slim.named_parameters():
        weight.requires_grad_(dense.get_parameter(name).requires_grad)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode for the length of a block, then each part in its own."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A module whose parameters want no gradients, for the length of a block."""
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_()


@contextmanager
def exchanged(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A module with other weights, smaller ones too (by parameter name), for the length of a block."""
    before = {name: module.get_parameter(name).data for name in weights}
    try:
        for name, tensor in weights.items():
            module.get_parameter(name).data = tensor.to(before[name])
        yield
    finally:
        for name, data in before.items():
            module.get_parameter(name).data = data
