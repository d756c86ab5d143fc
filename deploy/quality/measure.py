"""Measuring two sets of images of the same prompts and seeds by the metrics that somebody asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.artifacts.hashes import content_hash
from deploy.quality import intervals
from deploy.quality.folders import read_images
from deploy.quality.metrics import METRICS, Metric, check_names, check_weights
from slimdiff.errors import InputError
from slimdiff.progress import bar

log = logging.getLogger("slimdiff")


class Measures:
    """Metrics with their networks, opened before the long work, so that what is wrong with one shows then.

    Args:
        weights: the metrics, each with the place of its weights or None. PSNR and SSIM are always among them.
        reference: a folder of real images, for the metrics of sets.
        count, pixels: how many images there will be, and their shorter side, if it is known.
        captioned: whether they are made from prompts, which some metrics hold them against.

    Raises:
        InputError: naming what is missing, unknown, not readable or too few.
        MissingPackageError: if torchmetrics is not here and a metric needs it.
    """

    def __init__(
        self,
        weights: Mapping[str, str | None],
        reference: str | None = None,
        *,
        count: int,
        pixels: int | None = None,
        captioned: bool = True,
        how: str = "--weights {name}=PATH",
    ) -> None:
        weights = {**dict.fromkeys(("psnr", "ssim")), **weights}
        check_names(weights)
        check_weights(weights, how)
        sets = [name for name in weights if METRICS[name].of == "set"]
        if reference is not None and not sets:
            raise InputError("a reference folder is for fid and kid: ask for one of them, or leave it out")
        for name in weights:
            _check_size(name, METRICS[name], count, pixels)
            if METRICS[name].of == "image" and not captioned:
                raise InputError(
                    f"{name} holds images against their prompts, and these are made from none: leave it out"
                )
        real = read_images(Path(reference), at_least=2) if reference is not None else None
        self.weights = dict(weights)
        self.hashes = {name: content_hash(Path(path)) for name, path in weights.items() if path}
        self.reference_hash = content_hash(Path(reference)) if reference is not None else None
        self.opened = {name: METRICS[name].open(Path(path) if path else None) for name, path in weights.items()}
        self.real = {name: METRICS[name].summary(self.opened[name](real)) for name in sets} if real else {}
        self.real_count = len(real) if real else 0

    def __call__(self, dense: Sequence[Any], slim: Sequence[Any], captions: Sequence[Any]) -> dict[str, Any]:
        """What the metrics say of PIL images, pairwise of one caption and seed.

        Returns:
            `images`: by metric, how close slim is to dense: `value`, with `low` and `high` of its 95 % interval.
            `quality`: by metric that judges each side, `dense` and `slim`, their `difference` slim - dense with its
            `low` and `high`, and their own `intervals`. Both with `unit`, `better` and `count`; metrics of sets also
            with the `resamples` of the interval, the `features`, and the `reference` images where there are any, with
            the hash of their folder. `weights` has the `name` of the file or folder that a network is of, and its
            `sha256`: figures of other weights are no two of one metric.
        """
        images: dict[str, Any] = {}
        quality: dict[str, Any] = {}
        for name, function in bar(self.opened.items(), "metrics", "metric"):
            metric = METRICS[name]
            _check_size(name, metric, len(slim), min(min(image.size) for image in (*dense, *slim)))
            if metric.of == "pair":
                values = [function(a, b) for a, b in zip(dense, slim, strict=True)]
                found = _of_pairs(metric, values)
            elif metric.of == "image":
                sides = [[function(i, c) for i, c in zip(side, captions, strict=False)] for side in (dense, slim)]
                found = _of_sides(*sides)
            else:
                found = self._of_sets(name, metric, function(dense), function(slim))
            found |= {"unit": metric.unit, "better": metric.better, "count": len(slim)}
            if name in self.hashes:
                found["weights"] = {"name": Path(str(self.weights[name])).name, "sha256": self.hashes[name]}
            (images if "value" in found else quality)[name] = found
        return {"images": images, "quality": quality}

    def _of_sets(self, name: str, metric: Metric, dense: Any, slim: Any) -> dict[str, Any]:
        assert metric.distance is not None
        distance, real = metric.distance, self.real.get(name)

        def distances(rows: Any) -> list[float]:
            one, other = metric.summary(dense[rows]), metric.summary(slim[rows])
            return [distance(one, other)] if real is None else [distance(real, one), distance(real, other)]

        def with_difference(rows: Any) -> list[float]:
            values = distances(rows)
            return values if real is None else [*values, values[1] - values[0]]

        fewest = min(len(slim), self.real_count or len(slim))
        if name == "fid" and fewest <= dense.shape[1]:
            log.warning(
                "fid of %d images by %d features is biased upwards: hold it only against an fid of as many images",
                *(fewest, dense.shape[1]),
            )
        values = with_difference(slice(None))
        ends = intervals.of_distances(len(slim), with_difference, values)
        is_clip = Path(self.weights[name] or "").is_dir()
        how = {"resamples": intervals.SET_RESAMPLES, "features": "clip" if is_clip else "inception"}
        if real is None:
            return {**_interval("value", values[0], ends[0]), **how}
        about = {"reference": self.real_count, "reference_sha256": self.reference_hash}
        sides = {"dense": values[0], "slim": values[1]} | _interval("difference", values[2], ends[2])
        return {**sides, "intervals": {"dense": ends[0], "slim": ends[1]}, **how, **about}


def _check_size(name: str, metric: Metric, count: int, pixels: int | None) -> None:
    if count < metric.fewest:
        raise InputError(f"{name} needs at least {metric.fewest} images, and there are {count}: make more")
    if pixels is not None and pixels < metric.pixels:
        raise InputError(f"{name} needs images of at least {metric.pixels} pixels a side, and these have {pixels}")


def _interval(key: str, value: float, ends: intervals.Interval) -> dict[str, Any]:
    low, high = ends or (None, None)
    return {key: value, "low": low, "high": high}


def _of_pairs(metric: Metric, values: Sequence[float]) -> dict[str, Any]:
    value = metric.of_mean(sum(values) / len(values))
    return _interval("value", value, intervals.of_mean(values, metric.of_mean))


def _of_sides(dense: Sequence[float], slim: Sequence[float]) -> dict[str, Any]:
    means = {"dense": sum(dense) / len(dense), "slim": sum(slim) / len(slim)}
    difference = _interval("difference", means["slim"] - means["dense"], intervals.of_difference(dense, slim))
    return {**means, **difference, "intervals": {"dense": intervals.of_mean(dense), "slim": intervals.of_mean(slim)}}
