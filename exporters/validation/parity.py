"""Whether an artifact computes what its model computes: named metrics with bounds per precision, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from slimdiff.denoising.trajectory import Call, Inputs, denoiser_name, sample_images, time_name
from slimdiff.errors import InputError, require
from slimdiff.progress import bar
from slimdiff.settings import Sampling

Precision = Literal["fp32", "fp16", "bf16", "int8"]


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
    "int8": Bounds(cosine=0.97, relative_l2=0.2),
}
"""By the candidate's precision. A right UNet's relative L2 was 1e-6 in fp32, 9e-4 in fp16 and 1.3e-2 in bf16; in int8
it is some percent, and more at the end of a trajectory, where the prediction is small: `NOISE_ERROR` bounds the sum."""

NOISE_ERROR = {"int8": 5e-3}
"""Most that all calls together may differ, as `|candidate - reference|^2 / |reference|^2`, in a precision that is to
change something: five times what `ExportSettings.int8_error` allows by itself."""

IMAGE_PSNR_DB = 35.0
"""Least PSNR of two images that count as the same, dB."""
INT8_PSNR_DB = 25.0
"""Least PSNR of an image in int8 against the same model's in fp32, dB: the same image, in other pixels."""


def check_calls(
    calls: Sequence[Call],
    reference: Callable[[Call], Tensor],
    candidate: Callable[[Call], Tensor],
    precision: Precision,
    *,
    bounds: Bounds | None = None,
    explain: Callable[[Call], dict[str, Any] | None] | None = None,
    output: str = "out_sample",
) -> dict[str, Any]:
    """Hold a candidate against a reference on recorded calls of a trajectory.

    Args:
        calls: in order of time, so that the first that diverges tells most.
        reference: call -> output; the float32 model, whatever the candidate's precision.
        candidate: call -> output of the same shape.
        precision: the candidate's, which chooses the bounds.
        bounds: others than `BOUNDS[precision]`.
        explain: call -> the fault inside the candidate, with the name of its `tensor` if there is one; called for the
            first call that fails. `exporters.validation.graph` has one for graphs.
        output: what checks are called, with the time where the calls have one.

    Returns:
        `passed`, `precision`, `checks`, `first_diverging` (name of the first tensor that went wrong, or None) and
        `divergence` (the result of `explain`). A check has `tensor` (`out_sample@t=981`), `metric` (`finite`: count of
        values in candidate and reference that are NaN or infinite; `cosine`; `relative_l2`; in int8, of all calls,
        `noise_error`), `value` (None where it has none), `bound` and `passed`.

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
    failed: tuple[str, Call] | None = None
    changed = energy = 0.0
    for call in bar(calls, name="parity", unit="call"):
        name = at_time(output, call)
        names[name] += 1
        if names[name] > 1:  # another batch of prompts at the same time
            name += f"#{names[name]}"
        with torch.no_grad():
            arrays = _array(reference(call)), _array(candidate(call))
        of_call = compare(name, *arrays, bounds)
        energy += float((arrays[0] ** 2).sum())
        changed += float(((arrays[1] - arrays[0]) ** 2).sum()) if arrays[0].shape == arrays[1].shape else float("inf")
        checks += of_call
        if failed is None and not all(c["passed"] for c in of_call):
            failed = name, call
    if (most := NOISE_ERROR.get(precision)) is not None:
        whole = changed / (energy or 1.0)
        checks.append(check(output, "noise_error", whole if np.isfinite(whole) else None, most, whole <= most))
        failed = failed or (None if whole <= most else (output, calls[len(calls) // 2]))
    divergence = explain(failed[1]) if failed and explain else None
    return {
        "passed": failed is None,
        "precision": precision,
        "checks": checks,
        "first_diverging": (divergence or {}).get("tensor") or (failed and failed[0]),
        "divergence": divergence,
    }


def at_time(name: str, call: Call) -> str:
    """`out_sample@t=981`; the name alone for a call that has no time, as a VAE's."""
    return f"{name}@t={call.timestep}" if time_name(call.arguments) else name


def compare(name: str, reference: np.ndarray, candidate: np.ndarray, bounds: Bounds) -> list[dict[str, Any]]:
    """Checks of one tensor: `finite`, `cosine` and `relative_l2`, or `shape` alone where shapes differ."""
    if reference.shape != candidate.shape:
        return [check(name, "shape", list(candidate.shape), list(reference.shape), False)]
    broken = int((~np.isfinite(reference)).sum() + (~np.isfinite(candidate)).sum())
    finite = check(name, "finite", broken, 0, broken == 0)
    if broken:
        rest = (("cosine", bounds.cosine), ("relative_l2", bounds.relative_l2))
        return [finite, *(check(name, metric, None, bound, False) for metric, bound in rest)]
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
        check(name, "cosine", float(cosine.cosine_similarity), bounds.cosine, bool(cosine)),
        check(name, "relative_l2", float(distance.l2_norm), bounds.relative_l2, bool(distance)),
    ]


def image_psnr(reference: Any, candidate: Any) -> float:
    """PSNR of two images in dB, at most 100 (alike).

    Polygraphy's takes the brightest pixel of the reference as the peak, so that dark images would fail: not used here.

    Args:
        reference: a PIL image, `uint8` array (0-255) or float array (0-1), `[H, W, C]`.

    Raises:
        InputError: if the shapes differ.
    """
    arrays = (np.asarray(image) for image in (reference, candidate))
    a, b = (array.astype(np.float64) / (255 if array.dtype == np.uint8 else 1) for array in arrays)
    if a.shape != b.shape:
        raise InputError(f"images of different shape: {a.shape} and {b.shape}")
    error = float(((a - b) ** 2).mean())
    if not np.isfinite(error):
        return 0.0
    return min(100.0, -10 * np.log10(error)) if error > 0 else 100.0


def check_images(
    reference: Iterable[Any], candidate: Iterable[Any], minimum_db: float = IMAGE_PSNR_DB
) -> list[dict[str, Any]]:
    """Checks in `check_calls`'s form, metric `psnr_db`, one per pair of images (`image#0`, ...)."""
    pairs = enumerate(zip(reference, candidate, strict=True))
    values = [(f"image#{i}", float(image_psnr(a, b))) for i, (a, b) in pairs]
    return [check(name, "psnr_db", value, minimum_db, value >= minimum_db) for name, value in values]


def check_trajectory(
    result: dict[str, Any],
    reference: DiffusionPipeline,
    candidate: DiffusionPipeline,
    prompts: Sequence[Inputs],
    sampling: Sampling,
) -> dict[str, Any]:
    """Whether two pipelines make the same images, and the candidate's denoiser is finite at every step on the way.

    Args:
        result: `check_calls`'s of the two denoisers; `reference` is the pipeline with the float32 one.

    Returns:
        the result with more checks: `finite` of `out_sample` (count of calls with NaN or infinite values in the
        denoiser's output), then `psnr_db` of every image. One that fails is the first only if none before it did.
    """
    broken = 0

    def count(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal broken
        broken += not bool(torch.isfinite(output[0]).all())

    with getattr(candidate, denoiser_name(candidate)).register_forward_hook(count):
        images = [sample_images(p, prompts, sampling, checked=False) for p in (reference, candidate)]
    least = INT8_PSNR_DB if result["precision"] == "int8" else IMAGE_PSNR_DB
    rows = check_images(images[0], images[1], least)
    checks = [check("out_sample@trajectory", "finite", broken, 0, broken == 0), *rows]
    failed = next((c["tensor"] for c in checks if not c["passed"]), None)
    return result | {
        "passed": result["passed"] and failed is None,
        "checks": [*result["checks"], *checks],
        "first_diverging": result["first_diverging"] or failed,
    }


def _array(output: Tensor) -> np.ndarray:
    """Contiguous, as Polygraphy looks at it: a model answers to a picture `[B, H, W, C]` that was turned as it was."""
    return output.detach().cpu().double().contiguous().numpy()


def check(tensor: str, metric: str, value: Any, bound: Any, passed: bool) -> dict[str, Any]:
    """A check in the form of the contract."""
    return {"tensor": tensor, "metric": metric, "value": value, "bound": bound, "passed": passed}
