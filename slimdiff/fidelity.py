"""How close a slim model is to its dense one: noise prediction on the dense trajectory, and finished images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from slimdiff.denoising.modules import at_rest
from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import (
    Call,
    Inputs,
    denoiser_name,
    predict,
    record_calls,
    sample_images,
    with_denoiser,
)
from slimdiff.errors import InputError, SlimdiffError
from slimdiff.progress import bar
from slimdiff.prompts import check_inputs
from slimdiff.settings import Sampling


def noise_error(
    dense: Callable[[Call], Tensor], slim: Callable[[Call], Tensor], calls: Iterable[Call]
) -> dict[str, Any]:
    """Relative mean squared change of the noise prediction, sum |slim - dense|^2 / sum |dense|^2, over recorded calls.

    Args:
        dense, slim: predict for one call, `[B, C, H, W]`.

    Returns:
        `relative_mse` over all calls, and `by_timestep` as `[[t, value], ...]`, falling in t.
    """
    sums: dict[float, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for call in calls:
        expected = dense(call).double()
        difference = slim(call).double() - expected
        sums[call.timestep][0] += float(difference.square().sum())
        sums[call.timestep][1] += float(expected.square().sum())
    total = [sum(s[0] for s in sums.values()), sum(s[1] for s in sums.values())]
    by_timestep = [[t, sums[t][0] / sums[t][1]] for t in sorted(sums, reverse=True)]
    return {"relative_mse": total[0] / total[1], "by_timestep": by_timestep}


class HeldError:
    """Noise-prediction errors of slim models against one dense model, on calls that calibration never saw."""

    @own_torch_state()
    def __init__(self, denoiser: nn.Module, calls: Sequence[Call]) -> None:
        self.calls = calls
        rested = at_rest(denoiser)
        self.reference: dict[int, Tensor] = {
            id(call): predict(rested, call) for call in bar(calls, "held calls", "call")
        }

    @own_torch_state()
    def of(self, slim: nn.Module) -> float:
        """Relative mean squared change of the noise prediction over all calls."""
        error = noise_error(
            lambda call: self.reference[id(call)],
            partial(predict, at_rest(slim)),
            bar(self.calls, "noise error", "call"),
        )
        return float(error["relative_mse"])


@own_torch_state()
def compare(
    dense: DiffusionPipeline,
    slim: DiffusionPipeline,
    prompts: Sequence[Inputs],
    sampling: Sampling | None = None,
    *,
    images: int | None = None,
    trajectories: int = 2,
    quality: Callable[[list[Any], list[Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Fidelity of a slim pipeline against its dense one: noise prediction, and images of the same prompts and noise.

    No safety checker sees these images.

    Args:
        prompts: that calibration has not seen, or the figures flatter.
        images: how many of them images are made of; all if not given.
        trajectories: how many of them the noise error is taken over.
        quality: measures of both sets of images, dense and slim.

    Returns:
        `noise_error` (`noise_error`), `images` (`image_fidelity`), `quality` and `sampling`.

    Raises:
        SlimdiffError: if the dense model does not reproduce its own record: the figures would mean nothing.
    """
    sampling, prompts = sampling or Sampling(steps=25, seed=10_000), check_inputs(prompts)
    if not prompts:
        raise InputError("there is no prompt to compare on: give at least one")
    dense, slim = in_float32(dense), in_float32(slim)
    noise = compare_noise(dense, slim, prompts[:trajectories], sampling)
    before, after = (sample_images(p, prompts[:images], sampling, checked=False) for p in (dense, slim))
    return {
        "noise_error": noise,
        "images": image_fidelity(before, after),
        "quality": quality(before, after) if quality else {},
        "sampling": sampling.model_dump(),
    }


@own_torch_state()
def compare_noise(
    dense: DiffusionPipeline, slim: DiffusionPipeline, prompts: Sequence[Inputs], sampling: Sampling
) -> dict[str, Any]:
    """`noise_error` of slim on the dense model's trajectories, which the dense model must reproduce itself.

    Raises:
        SlimdiffError: if it does not.
    """
    denoiser, other = (at_rest(getattr(p, denoiser_name(p))) for p in (dense, slim))
    first: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if not first:
            first.append(output if isinstance(output, Tensor) else output[0])
            first[0] = first[0].float().to("cpu", copy=True)

    with denoiser.register_forward_hook(keep):
        calls = record_calls(with_denoiser(dense, denoiser), prompts, sampling)
    reference, candidate = partial(predict, denoiser), partial(predict, other)
    itself = noise_error(lambda _: first[0], reference, calls[:1])["relative_mse"]
    # On a GPU the same sum may be rounded in another order.
    if not itself <= max(1e-12, torch.finfo(next(denoiser.parameters()).dtype).eps ** 2):
        raise SlimdiffError(
            f"the dense model does not reproduce itself on its first recorded call (relative error {itself}): its "
            "figures mean nothing; does its pipeline change it for the length of a call?"
        )
    return noise_error(reference, candidate, bar(calls, "noise error", "call"))


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, in dB; infinite if they are equal."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of uint8 images `[H, W, C]` (Wang et al. 2004: sigma 1.5, K 0.01 and 0.03)."""
    x, y = a.astype(np.float64), b.astype(np.float64)

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, sigma=(1.5, 1.5, 0), truncate=3.5)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score.mean())


def image_fidelity(reference: Sequence[Any], images: Sequence[Any]) -> dict[str, Any]:
    """PSNR over all pixels together (so that one equal pair does not make it infinite), mean SSIM, and the count.

    Args:
        reference, images: PIL images, pairwise of equal size.

    Raises:
        InputError: if the counts or sizes differ.
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(reference, images, strict=False)]
    if len(reference) != len(images) or any(a.shape != b.shape for a, b in pairs):
        raise InputError(
            "the two sets of images differ in number or size: make them from the same prompts and settings"
        )
    together = psnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))
    return {"psnr_db": together, "ssim": float(np.mean([ssim(a, b) for a, b in pairs])), "count": len(pairs)}
