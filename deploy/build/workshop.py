"""What several stages of a build need, opened once and only when it is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.artifacts import build_folder
from deploy.recipe.prompts import EMBEDDED, calibration_prompts, comparison_prompts, default_source
from deploy.recipe.recipe import Recipe
from slimdiff import Plan, Statistics, embedded
from slimdiff.denoising.trajectory import Call, denoiser_name, record_calls
from slimdiff.errors import InputError
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.settings import Sampling
from slimdiff.slimming.slim import factorise
from slimdiff.storage import manifest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Workshop:
    """The recipe, the build folder, and what has been opened of the models and recorded of their trajectories."""

    images = 1
    """How many go through the exported denoisers together."""
    runtime = "onnxruntime"
    """What graphs are held against torch and timed in."""
    exported: tuple[str, ...] = ("dense", "slim")
    """The denoisers that become graphs."""
    engine_precision = "fp16"
    """Of the engine: fp32 never fuses attention, and hardly anybody runs it on such a GPU."""

    def __init__(self, recipe: Recipe, folder: Path, forced: Collection[str] = ()) -> None:
        self.recipe = recipe
        self.folder = folder
        self.forced = forced
        """Stages that are done again whatever is there."""

    @property
    def shared(self) -> Path:
        """The folder with what the cells of a matrix have in common: statistics, plan and slim model."""
        return self.folder

    @cached_property
    def dense(self) -> DiffusionPipeline:
        return load_pipeline(self.recipe.model)

    @cached_property
    def slim(self) -> DiffusionPipeline:
        return load_pipeline(self.shared / "slim")

    @cached_property
    def prompts(self) -> list[str]:
        """What calibration sees."""
        return calibration_prompts(self.prompts_from, self.recipe.calibration.samples)

    @cached_property
    def prompts_and_more(self) -> list[str]:
        """The same, and after them a batch that calibration does not see, as far as there are so many."""
        calibration = self.recipe.calibration
        return calibration_prompts(self.prompts_from, calibration.samples + calibration.sampling.batch)

    @cached_property
    def captions(self) -> list[str]:
        """What dense and slim are compared on."""
        compare = self.recipe.compare
        count = max(compare.images, compare.trajectories)
        return comparison_prompts(self.prompts_from, self.recipe.calibration.samples, count, compare.captions_seed)

    @property
    def prompts_from(self) -> str | list[str]:
        return self.recipe.prompts or default_source(self.recipe.model)

    @property
    def judged(self) -> bool:
        """Whether there is an evaluator for the images: there is one for the embedded model's world."""
        return self.recipe.model == "demo" and self.prompts_from == EMBEDDED

    @cached_property
    def trajectory(self) -> list[Call]:
        """The denoiser calls of the dense model for one image, or `images`, both branches of guidance together."""
        return record_calls(self.dense, *self.together)

    @property
    def together(self) -> tuple[list[str], Sampling]:
        """What is sampled through a graph: as many captions as go through it together, and how."""
        captions = (self.captions * self.images)[: self.images]
        return captions, self.recipe.compare.sampling.model_copy(update={"batch": self.images})

    @cached_property
    def statistics(self) -> Statistics:
        return Statistics.load(self.shared / build_folder.STATISTICS)

    @cached_property
    def plan(self) -> Plan:
        return Plan.load(self.shared / build_folder.PLAN)

    @cached_property
    def factors(self) -> Any:
        """Every site's basis or order, for planning and for slimming."""
        denoiser = denoiser_of(self.dense)
        wanted = [s for s in find_sites(denoiser)[0] if s.group in self.recipe.plan.groups]
        return factorise(denoiser, self.statistics, wanted, "plan: factorise", self.recipe.plan.forms)


def denoiser_of(pipeline: Any) -> Any:
    """The pipeline's unet or transformer."""
    return getattr(pipeline, denoiser_name(pipeline))


def spread(calls: Sequence[Call], count: int) -> list[Call]:
    """Up to `count` calls, evenly over the trajectory, its first and last among them."""
    if count >= len(calls):
        return list(calls)
    if count == 1:
        return [calls[len(calls) // 2]]
    return [calls[round(i * (len(calls) - 1) / (count - 1))] for i in range(count)]


def public_name(model: str) -> str:
    """A model as it may be told to others: no path of this machine."""
    return Path(model).name if Path(model).is_absolute() or model.startswith(".") else model


def model_hash(model: str) -> str:
    """What a model's files are, without loading it: it changes when any of them does.

    Raises:
        InputError: if there is no such model.
    """
    if model == "demo":
        return folder_hash(embedded.path())
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InputError(f"{path} is not a diffusers pipeline directory: it has no model_index.json")
        return folder_hash(path)
    # A hub id: what is in the cache is named by its commit. Loading it says what is wrong if there is none.
    pipeline = load_pipeline(model)
    return manifest.fingerprint({"hub": model, "weights": _weights(denoiser_of(pipeline))})


def _weights(denoiser: Any) -> str:
    from slimdiff.calibration.calibrate import weights_hash

    return weights_hash(denoiser)


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, hidden ones and the manifest aside."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and file.name != manifest.MANIFEST and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = manifest.sha256_of(file)
    return manifest.fingerprint(found)


def source_hash(package: Path, *patterns: str) -> str:
    """SHA-256 over a package's source: what it computes may change with it, also between two versions."""
    files = sorted({p for pattern in patterns or ("**/*.py",) for p in package.glob(pattern) if p.is_file()})
    return manifest.fingerprint({p.relative_to(package).as_posix(): manifest.sha256_of(p) for p in files})
