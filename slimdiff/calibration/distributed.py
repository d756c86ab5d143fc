"""More than one process, as `torchrun` and `accelerate launch` start them: who we are, and sums over all of us."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slimdiff.errors import InputError
from slimdiff.statistics import Lazy, Statistics, Stored, added

T = TypeVar("T")


def world() -> tuple[int, int]:
    """This process's number, and how many processes there are: `(0, 1)` unless a launcher started several.

    Joins the others first if a launcher's environment variables are there and nobody has yet: by NCCL where each
    process has a GPU, else by gloo.
    """
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return 0, 1
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available() and torch.cuda.device_count() > local:
            torch.cuda.set_device(local)
            dist.init_process_group("nccl")
        else:
            dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def agree(work: Callable[[], T]) -> list[T]:
    """What `work` gives in every process, by number. If it fails in one, it fails in all: none waits for the dead.

    Raises:
        InputError: if it raised one in a process.
    """
    _, size = world()
    if size == 1:
        return [work()]
    own: tuple[str | None, Any] = (None, None)
    try:
        own = (None, work())
    except InputError as error:
        own = (str(error), None)
    everyone: list[Any] = [own] * size
    dist.all_gather_object(everyone, own)
    for process, (failure, _) in enumerate(everyone):
        if failure is not None:
            raise InputError(f"process {process} of {size}: {failure}")
    return [value for _, value in everyone]


def sum_statistics(own: Statistics) -> Statistics:
    """Sums over all processes, each tensor's taken when it is read (`_all_reduced`): all must read the same ones."""
    shapes = (_shapes(own.moments), _shapes(own.firsts))
    everyone = agree(lambda: (*shapes, own.tokens, own.weights, own.population))
    moments, firsts, tokens, weights, population = zip(*everyone, strict=True)
    return Statistics(
        own.model_hash,
        _all_reduced(own.moments, ChainMap(*moments), torch.float32),
        _all_reduced(own.firsts, ChainMap(*firsts), torch.float64),
        tokens=added(tokens),
        weights=added(weights),
        population=added(population),
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    if isinstance(tensors, Stored):
        return {name: tensors.shape(name) for name in tensors}
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _all_reduced(own: Mapping[str, Tensor], shapes: Mapping[str, list[int]], dtype: torch.dtype) -> Lazy:
    """Sums over all processes of each one's tensors by name, taken when asked for: all must ask in the same order.

    Args:
        own: this process's tensors; one that it lacks counts as zeros.
        shapes: name -> shape, over all processes.
    """

    def total(name: str) -> Tensor:
        mine = own[name] if name in own else torch.zeros(shapes[name], dtype=dtype)
        device = "cuda" if "nccl" in dist.get_backend() else "cpu"
        summed = mine.detach().to(device, copy=True)
        dist.all_reduce(summed)
        return summed.cpu()

    return Lazy(sorted(shapes), total)
