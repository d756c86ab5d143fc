"""Whether an artifact computes what its model computes: named metrics with bounds per precision, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from tqdm import tqdm

from slimdiff.errors import InputError, require
from slimdiff.trajectory import Call

Precision = Literal["fp32", "fp16", "bf16"]


class Bounds(BaseModel):
    """What counts as the same output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cosine: float
    """Least cosine similarity."""
    relative_l2: float
    """Most `|candidate - reference| / |reference|`."""


BOUNDS: dict[str, Bounds] = {
    "fp32": Bounds(cosine=0.99999, relative_l2=1e-4),
    "fp16": Bounds(cosine=0.999, relative_l2=5e-3),
    "bf16": Bounds(cosine=0.999, relative_l2=3e-2),
}
"""By the candidate's precision. A right UNet was seen at 1e-6 in fp32, 9e-4 in fp16 and 1.3e-2 in bf16."""

IMAGE_PSNR_DB = 35.0
"""Least PSNR of images that are to be the same, dB."""


def check_parity(
    calls: Sequence[Call],
    reference: Callable[[Call], Tensor],
    candidate: Callable[[Call], Tensor],
    precision: Precision,
    *,
    bounds: Bounds | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Hold a candidate against a reference on recorded calls of a trajectory.

    Args:
        calls: in order of time, so that the first that diverges is where to look.
        reference: call -> output; the float32 model, whatever the candidate's precision.
        candidate: call -> output of the same shape.
        precision: the candidate's, which chooses the bounds.
        bounds: others than `BOUNDS[precision]`.
        progress: name of the progress bar on stderr; None: no bar.

    Returns:
        `passed`, `precision`, `checks` and `first_diverging` (name of the first tensor that failed, or None). A check
        has `tensor` (`out_sample@t=981`), `metric` (`finite`: count of values in candidate and reference that are NaN
        or infinite; `cosine`; `relative_l2`), `value` (None where it has none), `bound` and `passed`.

    Raises:
        InputError: without calls, or for a precision that has no bounds.
    """
    if not calls:
        raise InputError("parity needs at least one recorded call of the denoiser")
    if bounds is None and precision not in BOUNDS:
        raise InputError(f"there are no bounds for {precision!r}; there are for {', '.join(BOUNDS)}")
    bounds = bounds or BOUNDS[precision]
    names: Counter[str] = Counter()
    checks: list[dict[str, Any]] = []
    for call in tqdm(calls, desc=progress, disable=progress is None, unit="call"):
        name = f"out_sample@t={call.timestep}"
        names[name] += 1
        if names[name] > 1:  # another batch of prompts at the same time
            name += f"#{names[name]}"
        with torch.no_grad():
            checks += compare(name, _array(reference(call)), _array(candidate(call)), bounds)
    failed = [check["tensor"] for check in checks if not check["passed"]]
    return {
        "passed": not failed,
        "precision": precision,
        "checks": checks,
        "first_diverging": failed[0] if failed else None,
    }


def compare(name: str, reference: np.ndarray, candidate: np.ndarray, bounds: Bounds) -> list[dict[str, Any]]:
    """Checks of one tensor: `finite`, `cosine` and `relative_l2`, or `shape` alone where shapes differ."""
    if reference.shape != candidate.shape:
        return [_check(name, "shape", list(candidate.shape), list(reference.shape), False)]
    broken = int((~np.isfinite(reference)).sum() + (~np.isfinite(candidate)).sum())
    finite = _check(name, "finite", broken, 0, broken == 0)
    if broken:
        rest = (("cosine", bounds.cosine), ("relative_l2", bounds.relative_l2))
        return [finite, *(_check(name, metric, None, bound, False) for metric, bound in rest)]
    comparator = require("polygraphy.comparator", "onnx")
    logger = require("polygraphy.logger", "onnx").G_LOGGER
    # Polygraphy's L2 is absolute; of outputs in units of the reference's norm it is the relative one.
    norm = float(np.linalg.norm(reference)) or 1.0
    results = [comparator.IterationResult(outputs={name: array / norm}) for array in (reference, candidate)]
    with logger.verbosity(logger.CRITICAL):
        cosine = comparator.CosineSimilarityCompareFunc(bounds.cosine)(*results)[name]
        distance = comparator.L2CompareFunc(bounds.relative_l2)(*results)[name]
    return [
        finite,
        _check(name, "cosine", float(cosine.cosine_similarity), bounds.cosine, bool(cosine)),
        _check(name, "relative_l2", float(distance.l2_norm), bounds.relative_l2, bool(distance)),
    ]


def image_psnr(reference: Any, candidate: Any) -> float:
    """PSNR of two images in dB, at most 100 (alike).

    Polygraphy's takes the brightest pixel of the reference as the peak, so that dark images would fail: not used here.

    Args:
        reference: a PIL image, `uint8` array (0-255) or float array (0-1), `[H, W, C]`.
        candidate: the same kind and shape.

    Raises:
        InputError: if the shapes differ.
    """
    a, b = (_unit(np.asarray(image)) for image in (reference, candidate))
    if a.shape != b.shape:
        raise InputError(f"images of different shape: {a.shape} and {b.shape}")
    error = float(((a - b) ** 2).mean())
    if not np.isfinite(error):
        return 0.0
    return min(100.0, -10 * np.log10(error)) if error > 0 else 100.0


def check_images(
    reference: Iterable[Any], candidate: Iterable[Any], minimum_db: float = IMAGE_PSNR_DB
) -> list[dict[str, Any]]:
    """Checks in `check_parity`'s form, metric `psnr_db`, one per pair of images (`image#0`, ...)."""
    pairs = enumerate(zip(reference, candidate, strict=True))
    values = [(f"image#{i}", float(image_psnr(a, b))) for i, (a, b) in pairs]
    return [_check(name, "psnr_db", value, minimum_db, value >= minimum_db) for name, value in values]


def _array(output: Tensor) -> np.ndarray:
    return output.detach().cpu().double().numpy()


def _unit(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) / (255 if image.dtype == np.uint8 else 1)


def _check(tensor: str, metric: str, value: Any, bound: Any, passed: bool) -> dict[str, Any]:
    return {"tensor": tensor, "metric": metric, "value": value, "bound": bound, "passed": passed}
