"""What several stages of a build need, opened once and only when it is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import exporters
import slimdiff
from deploy.artifacts import build_folder
from deploy.artifacts.figures import denoiser_of
from deploy.artifacts.figures import machine as describe_machine
from deploy.artifacts.hashes import model_hash, source_hash
from deploy.artifacts.schedules import find_schedule
from deploy.artifacts.usage import said_of
from deploy.recipe.material import PICTURES, calibration_material, comparison_material, hash_of
from deploy.recipe.prompts import EMBEDDED, GENERAL, default_source
from deploy.recipe.recipe import Recipe
from exporters.graphs.pipeline import example_call
from exporters.graphs.vae import settings_for_unet
from exporters.registry import runtime_of
from exporters.settings import ExportSettings
from slimdiff import Budget, Compressor, Plan, Statistics
from slimdiff.compression import with_denoiser
from slimdiff.denoising.precision import held_like, in_dtype
from slimdiff.denoising.tasks import for_task, make_inputs
from slimdiff.denoising.trajectory import Call, Inputs, record_calls
from slimdiff.loading.lora_files import describe
from slimdiff.loading.pipelines import load_pipeline, read_dtype
from slimdiff.prompts.material import Material
from slimdiff.schedule import Schedule
from slimdiff.settings import CalibrationSettings, Sampling, WeightSettings
from slimdiff.storage import manifest

_CORE = ("torch", "diffusers", "transformers")
_EXPORT = ("onnx", "onnxscript", "onnxruntime")


class Workshop:
    """The recipe, the build folder, and what has been opened of the models and recorded of their trajectories."""

    images = 1
    """How many go through the exported denoisers together."""
    runtime = "onnxruntime"
    """The runtime that graphs are compared with torch and timed in."""
    exported: tuple[str, ...] = ("dense", "slim")
    """The denoisers that become graphs."""
    engine_precision = "fp16"
    """Of the engine, unless graphs are in int8: fp32 never fuses attention, and hardly anybody runs it on a GPU."""

    def __init__(self, recipe: Recipe, folder: Path, forced: Collection[str] = ()) -> None:
        self.recipe = recipe
        self.folder = folder
        self.shared = folder
        """The folder with what the cells of a matrix have in common: statistics, plan and slim model."""
        self.forced = forced
        """Stages that are done again, whether they are finished or not."""

    @cached_property
    def dense(self) -> DiffusionPipeline:
        recipe = self.recipe
        dense = load_pipeline(recipe.model, "fp32", variant=recipe.variant, lora=recipe.lora)
        return for_task(dense, self.material)

    def load_held(self) -> DiffusionPipeline:
        """The dense pipeline in the dtypes of its files."""
        return load_pipeline(self.recipe.model, variant=self.recipe.variant, lora=self.recipe.lora)

    def finish(self, slim: Any, held: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline as it is `held` with a slim denoiser, in its dtypes or the recipe's."""
        whole = with_denoiser(held, held_like(slim, denoiser_of(held)))
        dtype = read_dtype(self.recipe.dtype)
        return whole if dtype is None else in_dtype(whole, dtype)

    @cached_property
    def slim(self) -> DiffusionPipeline:
        return for_task(load_pipeline(self.shared / "slim", "fp32", variant=self.recipe.variant), self.material)

    @cached_property
    def material(self) -> Material:
        """What the calibration's images are made from; after them a batch that it does not see, if there is more."""
        calibration = self.recipe.calibration
        return calibration_material(self.prompts_from, calibration.samples, calibration.sampling.batch, **self._folders)

    @cached_property
    def compared(self) -> Material:
        """What dense and slim are compared on."""
        compare = self.recipe.compare
        return self.unseen(max(compare.images, compare.trajectories), compare.captions_seed)

    def unseen(self, count: int, seed: int) -> Material:
        """What `count` images are made from, as far as possible unseen by calibration."""
        return comparison_material(self.prompts_from, self.recipe.calibration.samples, count, seed, **self._folders)

    @property
    def _folders(self) -> dict[str, Any]:
        recipe = self.recipe
        said = {name: getattr(recipe, name) for name in (*PICTURES, "classes")}
        return {**said, "default": self.prompts_from in (GENERAL, EMBEDDED)}

    @cached_property
    def _calibrated(self) -> tuple[list[Inputs], Sampling]:
        return make_inputs(self.dense, self.material, self.recipe.calibration.sampling)

    @cached_property
    def _captioned(self) -> tuple[list[Inputs], Sampling]:
        return make_inputs(self.dense, self.compared, self.recipe.compare.sampling)

    @property
    def calibration(self) -> CalibrationSettings:
        """The recipe's, with the size that its images have."""
        return self.recipe.calibration.model_copy(update={"sampling": self._calibrated[1]})

    @property
    def samples(self) -> int:
        """How many images the calibration makes."""
        return min(len(self._calibrated[0]), self.recipe.calibration.samples)

    @property
    def captions(self) -> list[Inputs]:
        """What dense and slim are compared on, as their pipeline takes it."""
        return self._captioned[0]

    @property
    def sampling(self) -> Sampling:
        """How the compared images are made."""
        return self._captioned[1]

    @property
    def prompts_from(self) -> str | list[str]:
        return self.recipe.prompts or default_source(self.recipe.model)

    @property
    def has_evaluator(self) -> bool:
        """Whether images can be scored by themselves: those of the embedded model's world can."""
        return self.recipe.model == "demo" and self.prompts_from == EMBEDDED

    @cached_property
    def trajectory(self) -> list[Call]:
        """The denoiser calls of the dense model for one image, or `images`; the branches of guidance go together."""
        return record_calls(self.dense, *self.together)

    @property
    def together(self) -> tuple[list[Inputs], Sampling]:
        """What is sampled through a graph: as many captions as go through it together, and how."""
        captions = (self.captions * self.images)[: self.images]
        return captions, self.sampling.model_copy(update={"batch": self.images})

    @cached_property
    def budgets(self) -> list[Budget]:
        """The recipe's, and those of its sweep's points."""
        sweep = self.recipe.sweep
        return [self.recipe.budget.budget(), *(sweep.budgets() if sweep else [])]

    @property
    def of_unet(self) -> ExportSettings:
        """How denoisers are exported. What `keep_fp32` names of the VAE is for the bundles of this build."""
        return settings_for_unet(denoiser_of(self.slim), getattr(self.slim, "vae", None), self.recipe.export)

    def refuse_impossible(self) -> None:
        """Refuse a budget that cannot be met, and modules to be kept in fp32 that are not there, before the long work.

        Raises:
            InputError: saying how much can go, or which.
        """
        settings_for_unet(denoiser_of(self.dense), getattr(self.dense, "vae", None), self.recipe.export)
        sampling = self.calibration.sampling
        size: dict[str, Any] = {"height": sampling.height, "width": sampling.width}
        call = partial(example_call, self.dense, **size, guidance=sampling.guidance)
        self.new_compressor().check(self.budgets, call=call)

    def exported_as(self, name: str) -> ExportSettings:
        """How the `dense` or the `slim` denoiser becomes a graph: a precision of the plan is the slim one's alone."""
        how, planned = self.of_unet, self.recipe.plan.precision == "int8"
        if self.schedule is not None and not self.schedule.guides_always():  # both, for they are timed side by side
            how = how.model_copy(update={"dynamic_batch": True})
        if name == "dense" and planned and how.precision == "int8":
            return how.model_copy(update={"precision": "fp32"})
        return how

    @property
    def weight_settings(self) -> dict[str, Any]:
        """How the slim model is written, where the recipe says so."""
        return self.recipe.model_dump(include=set(WeightSettings.model_fields), exclude_none=True)

    @property
    def trajectory_settings(self) -> dict[str, Any]:
        """For stages whose result depends on the trajectory."""
        return {"trajectory": self.recipe.compare.sampling.model_dump()}

    @property
    def usage(self) -> dict[str, Any]:
        """How the recipe says that the model is used, for the manifests of what is made of it."""
        return said_of(self.recipe.calibration.sampling, self.recipe.compare.sampling)

    @cached_property
    def plan(self) -> Plan:
        return Plan.load(self.shared / build_folder.PLAN)

    @cached_property
    def compressor(self) -> Compressor:
        """The dense model on its way, with the statistics of the calibrate stage."""
        compressor = self.new_compressor()
        compressor.statistics = Statistics.load(self.shared / build_folder.STATISTICS)
        return compressor

    def measured_compressor(self) -> Compressor:
        """The same, with what the stage `sensitivity` measured."""
        measured = build_folder.read(self.folder, "sensitivity")
        statistics = self.compressor.statistics
        statistics.sensitivities, statistics.macs = measured["sensitivities"], measured["macs"]
        statistics.int8_errors = measured["int8_errors"]
        return self.compressor

    def new_compressor(self) -> Compressor:
        """The same before calibration."""
        prompts = self._calibrated[0]
        return Compressor(self.dense, prompts, self.calibration, self.recipe.plan, schedule=self.schedule)

    @cached_property
    def schedule(self) -> Schedule | None:
        """Of the images: the recipe's, or the model's own."""
        return find_schedule(self.recipe.model, self.recipe.schedule)

    @property
    def scheduled(self) -> dict[str, Any]:
        """The schedule, for the keys of stages that follow it; nothing where there is none."""
        return {"schedule": self.schedule.model_dump(exclude_none=True)} if self.schedule else {}

    @cached_property
    def core(self) -> dict[str, str]:
        """What decides a slim model: slimdiff's code and the libraries below it."""
        return {"slimdiff": source_hash(Path(slimdiff.__file__).parent), **versions(_CORE)}

    @cached_property
    def exporting(self) -> dict[str, str]:
        """What decides a graph: the same, and the exporters' code and the libraries below it."""
        return {**self.core, "exporters": source_hash(Path(exporters.__file__).parent), **versions(_EXPORT)}

    @cached_property
    def machine(self) -> dict[str, str]:
        """What decides a latency beside the code."""
        return {"machine": manifest.fingerprint(describe_machine())}

    @cached_property
    def captions_hash(self) -> dict[str, str]:
        return {"captions": hash_of(self.compared)}

    @cached_property
    def model_inputs(self) -> dict[str, str]:
        """What decides statistics: the model with what is fused into it, and the prompts."""
        chosen = {"variant": self.recipe.variant} if self.recipe.variant else {}
        if self.recipe.lora:
            chosen["lora"] = manifest.fingerprint([describe(Path(one.file), one.scale) for one in self.recipe.lora])
        return {
            "model": model_hash(self.recipe.model),
            **chosen,
            "prompts": hash_of(self.material, self.recipe.calibration.samples),
        }

    @cached_property
    def held_hash(self) -> dict[str, str]:
        """What decides sensitivities and plans: the same, with what calibration does not see."""
        return {"held": hash_of(self.material)}


def packages_of(runtime: str) -> tuple[tuple[str, str], ...]:
    """The module of a runtime, with the extra that installs it; none for torch."""
    row = runtime_of(runtime)
    return ((row.module, row.extra),) if row.extra else ()


def versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of distributions, `none` for those that are not installed."""
    return dict.fromkeys(names, "none") | manifest.versions(names)


def spread(calls: Sequence[Call], count: int) -> list[Call]:
    """Up to `count` calls, evenly over the trajectory, its first and last among them."""
    if count >= len(calls):
        return list(calls)
    if count == 1:
        return [calls[len(calls) // 2]]
    return [calls[round(i * (len(calls) - 1) / (count - 1))] for i in range(count)]
