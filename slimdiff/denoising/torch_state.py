"""torch's state is the caller's: what is computed here gives the same under any of it, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Whichever of these kernels the caller allows, attention chooses among all.
_KERNELS: list[Any] = [kernel for name, kernel in SDPBackend.__members__.items() if name != "ERROR"]


@contextmanager
def own_torch_state() -> Iterator[None]:
    """A block, or as a decorator a function, without autocast, in float32 on the CPU by default, and without gradients.

    Full precision of float32 products, all kernels of attention, oneDNN and numpy's usual handling of floating-point
    errors belong to it too. Threads and deterministic algorithms stay the caller's: on the same number of threads the
    bits are the same.
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
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
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        yield
