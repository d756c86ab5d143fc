"""The metrics, one row each; their weights are files that somebody names and are never fetched.

This module is read with recipes and the command line: torch and torchmetrics are loaded when a metric is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from slimdiff.errors import InputError


@dataclass(frozen=True)
class Metric:
    """A metric of images. What it is of decides what opening it gives.

    | of | opened | its value |
    | --- | --- | --- |
    | `pair` | `(dense, slim) -> float` of PIL images | the mean over pairs, through `of_mean` |
    | `image` | `(image, caption) -> float` | the mean over the images of each side |
    | `set` | `(images) -> features [N, D]`, float64 | `distance` of the `summary` of two sets of features |
    """

    of: Literal["pair", "image", "set"]
    better: Literal["higher", "lower"]
    open: Callable[[Path | None], Callable[..., Any]]
    """Takes the place of the weights."""
    unit: str = ""
    weights: str = ""
    """What they are and where people get them; empty if it needs none."""
    of_mean: Callable[[float], float] = float
    summary: Callable[[Any], Any] = lambda features: features
    distance: Callable[[Any, Any], float] | None = None
    fewest: int = 1
    """Images."""
    pixels: int = 1
    """Of each side of an image, at least."""


def _psnr(_: Path | None) -> Callable[..., float]:
    import numpy as np

    def squared_error(a: Any, b: Any) -> float:
        return float(np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2))

    return squared_error


def _in_db(squared_error: float) -> float:
    """PSNR of 8-bit images from their mean squared error; infinite if they are equal."""
    from math import inf, log10

    return inf if squared_error == 0 else 10 * log10(255**2 / squared_error)


def _ssim(_: Path | None) -> Callable[..., float]:
    import numpy as np

    from slimdiff.fidelity import ssim

    return lambda a, b: ssim(np.asarray(a), np.asarray(b))


def _network(name: str) -> Callable[[Path | None], Callable[..., Any]]:
    """A function of `deploy.quality.networks`, which loads torch."""

    def open_network(weights: Path | None) -> Callable[..., Any]:
        from deploy.quality import networks

        return getattr(networks, name)(weights)

    return open_network


def _distance(name: str, *args: Any) -> Any:
    """A function of `deploy.quality.distances`."""
    from deploy.quality import distances

    return getattr(distances, name)(*args)


_FEATURES = (
    "inception-2015-12-05.pt, NVIDIA's TorchScript file that clean-fid uses (api.ngc.nvidia.com, stylegan3), or the "
    "folder of a CLIP model of transformers"
)
_BACKBONE = (
    "torchvision's alexnet-owt-7be5be79.pth, vgg16-397923af.pth or squeezenet1_1-b8a52dc0.pth (download.pytorch.org/"
    "models), or the same as safetensors"
)


def _of_features(summary: str, distance: str) -> Metric:
    """A distance of two sets of features, by two functions of `deploy.quality.distances`."""
    functions: dict[str, Any] = {"summary": partial(_distance, summary), "distance": partial(_distance, distance)}
    return Metric("set", "lower", _network("open_features"), weights=_FEATURES, fewest=2, **functions)


METRICS: Mapping[str, Metric] = {
    "psnr": Metric("pair", "higher", _psnr, unit="dB", of_mean=_in_db),
    "ssim": Metric("pair", "higher", _ssim),
    "ms_ssim": Metric("pair", "higher", _network("open_ms_ssim"), pixels=161),
    "lpips": Metric("pair", "lower", _network("open_lpips"), weights=_BACKBONE, pixels=32),
    "clip": Metric(
        "image",
        "higher",
        _network("open_clip_score"),
        weights="the folder of a CLIP model of transformers, such as a copy of openai/clip-vit-base-patch16",
    ),
    "fid": _of_features("moments", "frechet"),
    "kid": _of_features("kernel_sums", "kernel_distance"),
}


def check_names(names: Iterable[str]) -> None:
    """Refuse a metric that is not here.

    Raises:
        InputError: listing those that are.
    """
    for name in names:
        if name not in METRICS:
            raise InputError(f"there is no metric {name!r}: metrics are {', '.join(METRICS)}")


def check_weights(weights: Mapping[str, str | None], how: str = "--weights {name}=PATH") -> None:
    """Refuse metrics without the weights that they need, with weights that they do not, or with ones not there.

    Args:
        weights: by the name of the metric, all of `METRICS`.
        how: somebody gives them, with `{name}` for the metric's.
    """
    for name, path in weights.items():
        metric, flag = METRICS[name], how.format(name=name)
        if metric.weights and path is None:
            raise InputError(f"{name} needs weights, which are never fetched: give {flag} ({metric.weights})")
        if path is not None and not metric.weights:
            raise InputError(f"{name} needs no weights: leave out {flag}")
        if path is not None and not Path(path).exists():
            raise InputError(f"{flag}: there is no {path} ({metric.weights})")
