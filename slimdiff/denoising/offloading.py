"""A denoiser larger than memory: its weights stay in their files, and are read where and as long as they are needed.

accelerate's hooks give a layer its weights before it runs and take them away afterwards, as they do for diffusers'
`enable_sequential_cpu_offload`. Here they read from the checkpoint's own safetensors files, so that nothing is copied
to the disk. The parameters are on `meta`, in the dtype that is computed in: what is read is cast to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, align_module_device, has_offloaded_params
from safetensors import safe_open
from torch import Tensor, nn


class Shards(OffloadedWeightsLoader):
    """The weights of a denoiser by name, each read from its file when it is asked for.

    Attributes:
        runs_on: the device that layers run on.
        dtypes: by name, those that floating-point weights are given and saved in.
        digest: SHA-256 of all weights, if it was taken.
    """

    def __init__(self, files: Sequence[Path], runs_on: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
        index: dict[str, dict[str, str]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                index |= {name: {"safetensors_file": str(path)} for name in file.keys()}  # noqa: SIM118  (no mapping)
        for name, dtype in dtypes.items():
            index[name]["dtype"] = str(dtype).removeprefix("torch.")
        super().__init__(index=index)
        self.runs_on, self.dtypes = runs_on, dtypes
        self.digest: str | None = None

    def __deepcopy__(self, _memo: Any) -> Shards:
        return self


def offload(denoiser: nn.Module, shards: Shards) -> None:
    """Let a denoiser with parameters on `meta` run, each layer with weights from these files."""
    vars(denoiser)["shards"] = shards
    # Outputs are to be where inputs came from, for a pipeline's other parts may be elsewhere.
    add_hook_to_module(denoiser, AlignDevicesHook(io_same_device=True), append=True)
    attach_align_device_hook(denoiser, execution_device=shards.runs_on, offload=True, weights_map=shards)


def shards_of(denoiser: Any) -> Shards | None:
    """Where an offloaded denoiser's weights are; None if it holds them."""
    found = vars(denoiser).get("shards") if isinstance(denoiser, nn.Module) else None
    return found if isinstance(found, Shards) else None


def device_of(denoiser: nn.Module) -> torch.device:
    """The device that a denoiser runs on; the CPU for one that has no weights yet, which is counted with."""
    shards = shards_of(denoiser)
    held = next(denoiser.parameters())
    return shards.runs_on if shards is not None else torch.device("cpu") if held.is_meta else held.device


def each_weight(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The denoiser's parameters and buffers by name, sorted, with one in memory at a time if it is offloaded."""
    shards = shards_of(denoiser)
    for name, tensor in sorted(denoiser.state_dict().items()):
        yield name, shards[name] if shards is not None and tensor.is_meta else tensor


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """A module of a denoiser with its weights in memory, on the CPU where they were offloaded, for a block's length."""
    with ExitStack() as stack:
        for part in module.modules():
            if has_offloaded_params(part):
                stack.enter_context(align_module_device(part, torch.device("cpu")))
        yield


def hollow(denoiser: nn.Module) -> nn.Module:
    """Put tensors of the right shapes in the place of parameters on `meta`, in place: for what computes with shapes."""
    if not any(parameter.is_meta for parameter in denoiser.parameters()):
        return denoiser
    remove_hook_from_module(denoiser, recurse=True)
    for part in denoiser.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(part, name, nn.Parameter(empty, requires_grad=False))
    return denoiser
