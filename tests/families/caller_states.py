"""States that the caller may have left torch and numpy in, by name: a context of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def _set(change: Callable[[Any], object], value: Any, now: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(now)


def _default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return _set(torch.set_default_dtype, dtype, torch.get_default_dtype())


def _rough_products() -> AbstractContextManager[None]:
    return _set(torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision())


def _deterministic() -> AbstractContextManager[None]:
    return _set(torch.use_deterministic_algorithms, True, torch.are_deterministic_algorithms_enabled())


def _another_thread_count() -> AbstractContextManager[None]:
    now = torch.get_num_threads()
    return _set(torch.set_num_threads, 2 if now == 1 else 1, now)


@contextmanager
def _other_noise() -> Iterator[None]:
    torch.manual_seed(12345)
    yield


@contextmanager
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


CALLER_STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "rough products": _rough_products,
    "deterministic algorithms": _deterministic,
    "another number of threads": _another_thread_count,
    "another seed": _other_noise,
    "attention by plain products": lambda: sdpa_kernel(SDPBackend.MATH),
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "warnings are errors": _warnings_are_errors,
    "numpy raises": lambda: np.errstate(all="raise"),
}


def seen_from_outside() -> tuple[object, ...]:
    """What of torch's state a caller would notice."""
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    products = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    usual = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads())
    return (*modes, *products, *usual, str(np.geterr()))
