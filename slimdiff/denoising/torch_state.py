"""torch's state is the caller's: what is computed here gives the same under any of it, and leaves it as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Whichever of these kernels the caller allows, attention chooses among all.
_KERNELS: list[Any] = [kernel for name, kernel in SDPBackend.__members__.items() if name != "ERROR"]
_asked: ContextVar[int | None] = ContextVar("threads", default=None)
_inside: ContextVar[bool] = ContextVar("inside", default=False)


def own_threads() -> int:
    """The threads that are computed on, whatever the caller has set since: of them depend the last bits of sums.

    `OMP_NUM_THREADS` says how many, as it does for torch; else there is one for each core that this process may use.
    """
    if asked := _asked.get():
        return asked
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if named.isdecimal() and int(named):
        return int(named)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, psutil.cpu_count(logical=False) or allowed or 1)


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Let `own_torch_state` compute on so many threads for the length of a block; on its own choice if None."""
    token = _asked.set(count)
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def own_torch_state() -> Iterator[None]:
    """A block, or as a decorator a function, without autocast, in float32 on the CPU by default, and without gradients.

    Full precision of float32 products, all kernels of attention, oneDNN, numpy's usual handling of floating-point
    errors and a number of threads (see `own_threads`) belong to it too. Deterministic algorithms stay the caller's: on
    the CPU they give the same bits. A block inside such a block changes nothing: what is set between them is ours.
    """
    if _inside.get():
        yield
        return
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(_inside.reset, _inside.set(True))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():  # what is made in it could not be used outside
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(_KERNELS))
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(True)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if (threads := torch.get_num_threads()) != own_threads():
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(own_threads())
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        yield
