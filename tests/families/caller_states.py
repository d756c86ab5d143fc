"""States that the caller may have left torch and numpy in, by name: a context of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
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
def _cudnn() -> Iterator[None]:
    """All of its switches the other way round."""
    names = ("enabled", "benchmark", "deterministic", "allow_tf32")
    before = {name: getattr(torch.backends.cudnn, name) for name in names}
    try:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, not value)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)


def _tf32() -> AbstractContextManager[None]:
    matmul = torch.backends.cuda.matmul
    return _set(lambda value: setattr(matmul, "allow_tf32", value), True, matmul.allow_tf32)


def _rough(place: Any, value: str) -> AbstractContextManager[None]:
    """By the switches that torch has since 2.9."""
    if not hasattr(torch._C, "_set_fp32_precision_setter"):
        pytest.skip("this torch has no fp32_precision")
    return _set(lambda value: setattr(place, "fp32_precision", value), value, "none")


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
    "TF32 products": _tf32,
    "TF32 everywhere": lambda: _rough(torch.backends, "tf32"),
    "bfloat16 products in oneDNN": lambda: _rough(torch.backends.mkldnn, "bf16"),
    "cuDNN's switches": _cudnn,
    "deterministic algorithms": _deterministic,
    "another number of threads": _another_thread_count,
    "another seed": _other_noise,
    "attention by plain products": lambda: sdpa_kernel(SDPBackend.MATH),
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "warnings are errors": _warnings_are_errors,
    "numpy raises": lambda: np.errstate(all="raise"),
}


ASKED_FOR = ("deterministic algorithms", "cudnn.deterministic")
"""What stays the caller's: it asks for the same bits again."""


def seen_from_outside() -> dict[str, object]:
    """What of torch's state a caller would notice, by name."""
    backends = torch.backends
    places = {"": backends, "cuda.matmul": backends.cuda.matmul, "cudnn": backends.cudnn, "mkldnn": backends.mkldnn}
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "oneDNN": backends.mkldnn.enabled,
        **{f"cudnn.{name}": getattr(backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")},
        "products": _readable(torch.get_float32_matmul_precision),
        "cuda.matmul.allow_tf32": _readable(lambda: backends.cuda.matmul.allow_tf32),
        "cudnn.allow_tf32": _readable(lambda: backends.cudnn.allow_tf32),
        **{f"{name}.fp32_precision": getattr(place, "fp32_precision", None) for name, place in places.items()},
        "numpy": str(np.geterr()),
    }


def _readable(read: Callable[[], object]) -> object:
    """None where torch's older switch cannot be read, as only its newer one was set."""
    try:
        return read()
    except RuntimeError:
        return None
