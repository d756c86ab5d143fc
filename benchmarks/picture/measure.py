"""What the picture shows: a slim model at each budget, with its images, error and speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL.Image import Image

from benchmarks.baselines import magnitude_pruning
from exporters.latency.measure import bench
from exporters.latency.pair import write_job
from exporters.machine import machine_name
from exporters.settings import BenchSettings
from slimdiff import Budget, CalibrationSettings, PlanSettings, Sampling, embedded, load_pipeline
from slimdiff.compression import Compressor, with_denoiser
from slimdiff.denoising.trajectory import record_calls, sample_images
from slimdiff.planning.costs import count_parameters
from slimdiff.planning.planner import Planner
from slimdiff.settings import TRANSFORMER_GROUPS

GROUPS = (*TRANSFORMER_GROUPS, "resnet")
SCENES = 2
"""Seed of the scenes whose captions are shown."""


@dataclass(frozen=True)
class Amount:
    """How much is measured: the whole picture takes minutes, a test seconds."""

    samples: int = 24
    """Calibration prompts."""
    steps: int = 20
    """Of every image."""
    sensitivity_calls: int = 4
    fitting_calls: int = 24
    pairs: int = 4
    """Process pairs of each speedup."""

    def calibration(self) -> CalibrationSettings:
        return CalibrationSettings(samples=self.samples, sampling=Sampling(steps=self.steps, batch=4))

    def planning(self) -> PlanSettings:
        return PlanSettings(groups=GROUPS, sensitivity_calls=self.sensitivity_calls, fitting_calls=self.fitting_calls)


@dataclass(frozen=True)
class Slim:
    """One slim model.

    Attributes:
        percent: of the UNet's parameters that went.
        parameters: that are left.
        noise_error: relative mean squared change of the noise prediction.
        pruned_error: the same of magnitude pruning at that budget, the same share of every layer.
        speedup: over dense: `median`, `low` and `high`.
        images: one per caption.
    """

    percent: float
    parameters: int
    noise_error: float
    pruned_error: float
    speedup: dict[str, float]
    images: list[Image]


@dataclass(frozen=True)
class Measured:
    """All that is drawn."""

    captions: list[str]
    parameters: int
    images: list[Image]
    """Of the dense model."""
    slim: list[Slim]
    runtime: str
    machine: str


def measure(percents: Sequence[float], captions: int, amount: Amount) -> Measured:
    """Slim the embedded model at each budget, in percent of the UNet's parameters, and measure what that costs."""
    pipeline = load_pipeline("demo")
    calibration, planning = amount.calibration(), amount.planning()
    prompts = embedded.captions(amount.samples + calibration.sampling.batch, 1)
    work = Compressor(pipeline, prompts, calibration, planning)
    evenly = planning.model_copy(update={"allocation": "uniform"})
    uniform = Planner(work.denoiser, work.statistics, evenly, calls=work.calls)
    uniform.factors = work.planner.factors
    shown = embedded.captions(captions, SCENES, held_out=True)
    sampling = Sampling(steps=amount.steps, batch=captions, seed=1_000_000)
    # One image's call, both branches of guidance together.
    call = record_calls(pipeline, prompts[:1], Sampling(steps=1, batch=1))[0]
    slims, runtime = [], ""
    with TemporaryDirectory(prefix="slimdiff-picture-") as scratch:
        dense = write_job("dense", work.denoiser, call, "onnxruntime", Path(scratch) / "dense")
        for percent in percents:
            budget = Budget(f"{percent:g}%")
            unet = work.slim(work.plan(budget))
            pruned = magnitude_pruning(work.denoiser, uniform.plan(budget))
            job = write_job(f"-{percent:g} %", unet, call, "onnxruntime", Path(scratch) / f"{percent:g}")
            timing = bench(dense, job, BenchSettings(processes=amount.pairs))
            runtime = timing["runtime"]
            slims.append(
                Slim(
                    percent=percent,
                    parameters=count_parameters(unet),
                    noise_error=work.held_error.of(unet),
                    pruned_error=work.held_error.of(pruned),
                    speedup=timing["speedup"],
                    images=sample_images(with_denoiser(pipeline, unet), shown, sampling),
                )
            )
    images = sample_images(pipeline, shown, sampling)
    return Measured(shown, count_parameters(work.denoiser), images, slims, runtime, machine_name())
