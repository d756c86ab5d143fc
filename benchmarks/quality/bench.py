"""One dense model, what calibration saw of it, the slim models of it, and what they are measured on."""

from __future__ import annotations

import copy
import json
import time
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.quality.methods import ALL_GROUPS, Cut, Method
from benchmarks.quality.worlds import World
from slimdiff import CalibrationSettings, PlanSettings
from slimdiff.calibration.calibrate import calibrate, weights_hash
from slimdiff.compression import with_denoiser
from slimdiff.denoising.calls import Calls
from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.trajectory import record_calls, sample_images
from slimdiff.fidelity import HeldError, psnr_db
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.planning.costs import batch_of, count_macs, count_parameters
from slimdiff.planning.planner import Planner
from slimdiff.settings import Forms, Sampling
from slimdiff.slimming.slim import Factors, factorise
from slimdiff.statistics import Statistics
from slimdiff.storage import manifest

CALIBRATION = CalibrationSettings(samples=64, sampling=Sampling(steps=20, batch=16, seed=0), tokens_per_dimension=None)
ERROR_SAMPLING = Sampling(steps=20, batch=16, seed=50_000)
GPU_BATCH = 256
"""Pictures at once on a GPU."""


class Bench:
    """Everything is made when first asked for.

    Args:
        captions: how many pictures are judged.

    Attributes:
        work: a folder for what takes long: statistics, sensitivities, and the dense model's pictures.
    """

    work = Path("runs/bench")

    def __init__(
        self, world: World, captions: int, device: str = "cpu", calibration: CalibrationSettings = CALIBRATION
    ) -> None:
        self.world, self.device, self.count = world, device, captions
        guidance = {"guidance": world.guidance}
        sampling = calibration.sampling.model_copy(update=guidance)
        self.calibration = calibration.model_copy(update={"sampling": sampling})
        self.error_sampling = ERROR_SAMPLING.model_copy(update={"steps": sampling.steps, **guidance})
        batch = GPU_BATCH if device != "cpu" else world.evaluation.batch
        self.evaluation = world.evaluation.model_copy(update={"batch": batch})
        self.pipeline = in_float32(load_pipeline(world.model)).to(device)
        self.unet = self.pipeline.unet
        self.model_hash = weights_hash(self.unet)

    @cached_property
    def on_cpu(self) -> nn.Module:
        return copy.deepcopy(self.unet).cpu()

    @cached_property
    def prompts(self) -> list[str]:
        return self.world.captions(self.calibration.samples, 1)

    @cached_property
    def statistics(self) -> Statistics:
        file = self.work / "statistics.safetensors"
        if not file.is_file():
            self.work.mkdir(parents=True, exist_ok=True)
            calibrate(self.pipeline, self.prompts, self.calibration).save(file)
        statistics = Statistics.load(file)
        if self.measured.is_file():
            statistics.sensitivities = json.loads(self.measured.read_text())
        return statistics

    @property
    def measured(self) -> Path:
        """Where sensitivities are kept."""
        return self.work / "sensitivities.json"

    @cached_property
    def recorded(self) -> Calls:
        return Calls(self.pipeline, self.prompts, self.calibration)

    @cached_property
    def held_error(self) -> HeldError:
        """Noise-prediction errors on captions and noise of their own."""
        captions = self.world.captions(32, 2, held_out=True)
        return HeldError(self.unet, record_calls(self.pipeline, captions, self.error_sampling, every=2))

    @cached_property
    def one_call(self) -> Any:
        """One image's call, both branches together: latency is its time, MACs are of one of its samples."""
        return record_calls(self.pipeline, self.prompts[:1], Sampling(steps=1, batch=1, guidance=self.world.guidance))[
            0
        ]

    @cache  # noqa: B019 (there is one bench)
    def factors(self, forms: Forms) -> Factors:
        return factorise(self.unet, self.statistics, find_sites(self.unet)[0], forms)

    @cache  # noqa: B019
    def planner(self, method: Method) -> Planner:
        """One planner per way to plan; sensitivities of the usual forms are measured once, of all sites, and kept."""
        usual = method.allocation == "global" and method.forms.local() == Forms().local()
        if usual and not self.statistics.sensitivities:
            whole = Planner(self.unet, self.statistics, PlanSettings(groups=ALL_GROUPS), calls=self.recorded)
            whole.factors = self.factors(Forms().local())
            whole.remember(self.statistics)
            manifest.write_json(self.measured, self.statistics.sensitivities)
        planner = Planner(self.unet, self.statistics, method.settings(), calls=self.recorded)
        planner.factors = self.factors(method.forms.local())
        return planner

    def make(self, method: Method, cut: Cut) -> tuple[nn.Module, float | None]:
        """The slim model, or the baseline's of the same size; and the noise error that the plan predicts."""
        planner = self.planner(method)
        plan = planner.plan(cut.budget(self.unet))
        if method.baseline is not None:
            return method.baseline(self, plan), None
        predicted = [site.predicted_error for site in plan.sites.values()]
        known = [error for error in predicted if error is not None]
        return planner.slim(plan), sum(known) if known else None

    @cached_property
    def captions(self) -> list[str]:
        return self.world.choose(self.count, self.device)

    def images(self, unet: nn.Module) -> np.ndarray:
        """Pictures of all captions, uint8 `[N, H, W, 3]`."""
        images = sample_images(with_denoiser(self.pipeline, unet), self.captions, self.evaluation)
        return np.stack([np.asarray(image) for image in images])

    @cached_property
    def dense_images(self) -> np.ndarray:
        file = self.work / "dense.npy"
        if not file.is_file():
            images = self.images(self.unet)
            with manifest.replacing(file, is_file=True) as temporary, temporary.open("wb") as stream:
                np.save(stream, images)
        return np.load(file)

    @cached_property
    def dense_hits(self) -> dict[str, np.ndarray]:
        _ = self.captions
        return self.world.hits(self.dense_images)

    def dense(self) -> dict[str, Any]:
        """The dense model's figures."""
        return {**self._size(self.unet), **self._judged(self.dense_images, self.dense_hits)}

    def measure(self, method: Method, cut: Cut) -> dict[str, Any]:
        """Every figure of one slim model."""
        start = time.perf_counter()
        unet, predicted = self.make(method, cut)
        seconds = time.perf_counter() - start
        noise_error = self.held_error.of(unet)
        images = self.images(unet)
        hits = self.world.hits(images)
        lost = {
            "points_lost": points_lost(_total(self.dense_hits), _total(hits)),
            "sharpest_lost": points_lost(self.dense_hits[self.world.sharpest], hits[self.world.sharpest]),
        }
        return {
            **self._size(unet),
            "seconds": seconds,
            "noise_error": noise_error,
            "predicted_error": predicted,
            "psnr_db": psnr_db(self.dense_images, images),
            **self._judged(images, hits),
            **lost,
        }

    def _size(self, unet: nn.Module) -> dict[str, int]:
        # Operations are counted on the CPU, where they are known to be countable.
        macs = count_macs(copy.deepcopy(unet).cpu(), self.one_call) // batch_of(self.one_call)
        return {"parameters": count_parameters(unet), "macs": macs}

    def _judged(self, images: np.ndarray, hits: dict[str, np.ndarray]) -> dict[str, Any]:
        total = _total(hits)
        return {
            "caption_accuracy": float(total[:, 0].sum() / total[:, 1].sum()),
            "accuracy": {name: float(own[:, 0].sum() / own[:, 1].sum()) for name, own in hits.items()},
            "frechet_distance": self.world.frechet_distance(images),
        }


def _total(hits: dict[str, np.ndarray]) -> np.ndarray:
    return np.sum(list(hits.values()), axis=0)


def points_lost(dense: np.ndarray, slim: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Caption accuracy lost, in points, with a 95 % interval of a paired bootstrap over captions.

    Args:
        dense, slim: right and named attributes by caption, `[N, 2]`.
    """
    draw = np.random.default_rng(seed).integers(len(dense), size=(4000, len(dense)))
    named = dense[:, 1][draw].sum(1)
    lost = 100 * (dense[:, 0] - slim[:, 0])[draw].sum(1) / named
    total = 100 * float((dense[:, 0] - slim[:, 0]).sum() / dense[:, 1].sum())
    return {"points": total, "low": float(np.quantile(lost, 0.025)), "high": float(np.quantile(lost, 0.975))}
