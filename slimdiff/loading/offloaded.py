"""A denoiser opened without its weights, which are read from its files as they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from slimdiff.denoising.offloading import Shards, offload
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.errors import InputError
from slimdiff.loading.components import choose_dtypes, fault
from slimdiff.loading.single_file import listed
from slimdiff.loading.weights import Weights


@own_torch_state()
def load_offloaded(
    folder: Path, kind: Any, weights: Weights, dtype: torch.dtype | None = None, variant: str | None = None
) -> nn.Module:
    """What `load_component` gives, of a denoiser of diffusers, without its weights in memory.

    It runs on a GPU if there is one: there is one layer at a time.

    Raises:
        InputError: as `load_component` does, but for weights that `dtype` is too narrow for.
    """
    chosen = weights.choose(variant)
    headers, own, kept, loaded_as = choose_dtypes(folder, kind, weights.files[chosen], dtype)
    model = _without_weights(folder, kind, loaded_as)
    state = model.state_dict()
    unknown = [name for name in headers if name not in state]
    shapes = ((name, headers.get(name, ("", ()))[1], tuple(tensor.shape)) for name, tensor in state.items())
    other = [
        f"{name} ({list(there)} in the files)" for name, there, here in shapes if name in headers and there != here
    ]
    missing = [name for name in state if name not in headers]
    for names, what in ((missing, "lack"), (other, "have another shape of"), (unknown, "also have")):
        if names:
            raise InputError(fault(folder, kind, f"its files {what} {listed(names)}"))
    wide = {name for name in state if not kept.isdisjoint(name.split("."))}
    floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
    dtypes = own if dtype is None else {name: torch.float32 if name in wide else dtype for name in floating}
    shards = Shards(weights.files[chosen], _device(), dtypes)
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = model.get_submodule(name.rpartition(".")[0])
        as_held = torch.float32 if name in wide else dtypes.get(name, tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(tensor.detach().to(as_held), requires_grad=False)
            setattr(place, name.rpartition(".")[2], empty)
        else:
            place._buffers[name.rpartition(".")[2]] = shards[name].to(as_held, copy=True)
    offload(model, shards)
    return model.eval()


def _without_weights(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters on `meta`, as diffusers makes it before it reads weights in that dtype."""
    config = kind.load_config(folder, local_files_only=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), init_empty_weights():
            model = kind.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
