"""Fidelity of slim against dense: noise prediction, images, and quality where there is an evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deploy.quality
from deploy.artifacts import build_folder
from deploy.artifacts.figures import denoiser_of, image_macs
from deploy.artifacts.hashes import content_hash, source_hash
from deploy.artifacts.kinds import graph_of
from deploy.build.stages import Stage
from deploy.build.workshop import Workshop, packages_of
from deploy.quality import intervals
from deploy.quality.measure import Measures
from deploy.recipe.recipe import HOW_WEIGHTS
from exporters.runtimes.denoiser import open_denoiser
from exporters.runtimes.scheduled import schedule_graphs
from slimdiff import embedded
from slimdiff.compression import with_denoiser
from slimdiff.denoising.scheduled import Scheduled, schedule_pipeline
from slimdiff.denoising.schedulers import calls_of, with_scheduler
from slimdiff.denoising.tasks import has_prompts, text_of
from slimdiff.denoising.trajectory import sample_images
from slimdiff.fidelity import compare_noise, image_fidelity
from slimdiff.schedule import Schedule


def run(shop: Workshop, folder: Path) -> dict[str, Any]:
    settings, sampling = shop.recipe.compare, shop.sampling
    captions = shop.captions[: settings.images]
    shown = min(settings.shown, len(captions))
    measures = measures_of(shop)
    noise = compare_noise(shop.dense, shop.slim, shop.captions[: settings.trajectories], sampling)
    schedule = shop.schedule
    slim: Any = shop.slim if schedule is None else schedule_pipeline(shop.slim, schedule)
    images = {
        name: sample_images(pipeline, captions, sampling, checked=False)
        for name, pipeline in (("dense", shop.dense), ("slim", slim))
    }
    if shown:  # the graph has the shapes of one image
        one = sampling.model_copy(update={"batch": 1})
        graph = graph_of(str(shop.folder / "export" / "slim"), verified=False)
        exported = with_denoiser(shop.slim, open_denoiser(graph))
        if schedule is not None:
            exported = schedule_graphs(exported, schedule, graph, "onnxruntime")
        images["slim_onnx"] = sample_images(exported, captions[:shown], one, checked=False)
    (folder / "images").mkdir()
    pictures = []
    for i, caption in enumerate(captions[:shown]):
        picture: dict[str, Any] = {"caption": text_of(caption), "seed": sampling.seed + i}
        for name, sampled in images.items():
            sampled[i].save(folder / "images" / f"{i:02d}-{name}.png")
            picture[name] = f"{build_folder.IMAGES}/{i:02d}-{name}.png"
        pictures.append(picture)
    scores = quality(images["dense"], images["slim"], settings.captions_seed) if shop.has_evaluator else {}
    measured = measures(images["dense"], images["slim"], list(map(text_of, captions)))
    return {
        "noise_error": noise,
        "images": {**image_fidelity(images["dense"], images["slim"]), "metrics": measured["images"]},
        "images_onnx": image_fidelity(images["slim"][:shown], images["slim_onnx"]) if shown else None,
        "quality": scores | measured["quality"],
        "sampling": sampling.model_dump(),
        "schedule": schedule and _saved(shop, schedule, slim.unet, -(-len(captions) // sampling.batch)),
        "pictures": pictures,
    }


def _saved(shop: Workshop, schedule: Schedule, scheduled: Scheduled, runs: int) -> dict[str, Any]:
    """The schedule that slim images are made by, as it holds for their steps, and the multiply-adds of an image."""
    own = schedule.at(calls_of(with_scheduler(shop.slim, shop.sampling), shop.sampling.steps))
    macs = image_macs(denoiser_of(shop.dense), denoiser_of(shop.slim), shop.trajectory[0], scheduled, runs)
    return {"says": str(own), **own.model_dump(exclude_none=True), "macs_per_image": macs}


def measures_of(shop: Workshop) -> Measures:
    """The recipe's metrics, opened.

    Raises:
        InputError: if one cannot be, or there are too few images for it.
    """
    settings = shop.recipe.compare
    weights = {name: metric.weights for name, metric in settings.metrics.items()}
    count = min(settings.images, len(shop.captions))
    sides = [side for side in (settings.sampling.height, settings.sampling.width) if side]
    about: dict[str, Any] = {
        "count": count,
        "pixels": min(sides, default=None),
        "captioned": has_prompts(shop.captions),
    }
    return Measures(weights, settings.reference, **about, how=HOW_WEIGHTS)


def _inputs(shop: Workshop) -> dict[str, str]:
    """What decides the comparison beside its settings: code, captions, and what weights and reference hold."""
    settings = shop.recipe.compare
    named = {name: metric.weights for name, metric in settings.metrics.items()} | {"reference": settings.reference}
    contents = {name: content_hash(Path(place)) for name, place in named.items() if place is not None}
    return {
        **shop.exporting,
        **shop.captions_hash,
        **contents,
        "quality": source_hash(Path(deploy.quality.__file__).parent),
    }


def _packages(shop: Workshop) -> tuple[tuple[str, str], ...]:
    """torchmetrics, too, where a metric is not of slimdiff's own."""
    theirs = shop.recipe.compare.metrics.keys() - {"psnr", "ssim"}
    return (*packages_of("onnxruntime"), *([("torchmetrics", "metrics")] if theirs else []))


def quality(dense: list[Any], slim: list[Any], seed: int) -> dict[str, Any]:
    """What the embedded model's evaluator says of both sets of images, with the intervals of `deploy.quality`."""
    sides = [embedded.look(images, seed) for images in (dense, slim)]
    metrics = (("caption_accuracy", "share", "higher"), ("frechet_distance", "", "lower"))

    def figures(rows: Any) -> list[float]:
        """By metric, of dense and of slim, and their difference."""
        one, other = (side.figures(rows) for side in sides)
        return [value for name, _, _ in metrics for value in (one[name], other[name], other[name] - one[name])]

    values = figures(slice(None))
    ends = intervals.of_distances(len(dense), figures, values)
    result = {}
    for place, (metric, unit, better) in enumerate(metrics):
        own = slice(3 * place, 3 * place + 3)
        (a, b, change), (of_a, of_b, of_change) = values[own], ends[own]
        difference = {"difference": change, "low": of_change[0], "high": of_change[1]}
        about = {"intervals": {"dense": of_a, "slim": of_b}, "unit": unit, "better": better, "count": len(dense)}
        result[metric] = {"dense": a, "slim": b, **difference, **about}
    return result


STAGE = Stage(
    "compare",
    run,
    needs=("slim", "export"),
    settings=lambda shop: {
        **shop.recipe.compare.model_dump(exclude={"metrics": {"__all__": {"weights"}}, "reference": True}),
        **shop.scheduled,
    },
    inputs=_inputs,
    kind="fidelity",
    figures=lambda result: {"macs_per_image": own["macs_per_image"]} if (own := result["schedule"]) else {},
    packages=_packages,
)
