"""torch's state is the caller's: what is computed here gives the same under any of it, and leaves it as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Whichever of these kernels the caller allows, attention chooses among all.
_KERNELS: list[Any] = [kernel for name, kernel in SDPBackend.__members__.items() if name != "ERROR"]
# Libraries that are used, none that tries algorithms by the clock, and no TF32; with what torch starts with.
_SWITCHES = {
    "mkldnn_enabled": (True, True),
    "cudnn_enabled": (True, True),
    "cudnn_benchmark": (False, False),
    "cudnn_allow_tf32": (False, True),
}
# Where torch since 2.9 keeps how float32 is multiplied; what is not said of an operator is said of all before it.
_PRECISIONS = [
    *(("generic", "all"), ("cuda", "all"), ("mkldnn", "all")),
    *((library, operator) for library in ("cuda", "mkldnn") for operator in ("matmul", "conv", "rnn")),
]
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

    Full precision of float32 products, all kernels of attention, oneDNN, cuDNN, numpy's handling of floating-point
    errors and a number of threads (see `own_threads`) belong to it too. Deterministic algorithms stay the caller's: on
    the CPU they give the same bits. A block inside such a block changes nothing: what is set between them is ours.
    """
    if _inside.get():
        yield
        return
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
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if (threads := torch.get_num_threads()) != own_threads():
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(own_threads())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        _set_full_precision(stack)
        yield


def _set_full_precision(stack: ExitStack) -> None:
    """Multiply float32 as float32, by torch's older switches and its newer ones, which are to say the same."""
    older: list[tuple[Callable[[], Any], Callable[[Any], Any], Any, Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "highest"),
        *((getattr(torch._C, f"_get_{n}"), getattr(torch._C, f"_set_{n}"), *v) for n, v in _SWITCHES.items()),
    ]
    before = []
    for read, write, _, first in older:
        try:
            before.append((write, read()))
        except RuntimeError:  # the caller has used the newer switches alone, and the older one is as torch starts
            before.append((write, first))
    if hasattr(torch._C, "_set_fp32_precision_setter"):
        for place in _PRECISIONS:  # from all to one, so that each says its own and not what it has from above
            stack.callback(torch._C._set_fp32_precision_setter, *place, torch._C._get_fp32_precision_getter(*place))
            torch._C._set_fp32_precision_setter(*place, "none")
    for write, value in before:  # which are put back before the newer ones, as they change those too
        stack.callback(write, value)
    for _, write, value, _ in older:
        write(value)
