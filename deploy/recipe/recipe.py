"""The recipe: every setting of a build, composed from the settings of its steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from deploy.quality.metrics import METRICS, check_names, check_weights
from deploy.recipe.errors import explain, nearest
from deploy.recipe.gates import Gates
from deploy.recipe.material import PICTURES, parse_classes
from deploy.recipe.matrix import MatrixStage, Settings
from deploy.recipe.prompts import EMBEDDED, GENERAL, all_prompts, default_source
from deploy.recipe.yaml import read_yaml
from exporters.settings import BenchSettings, EngineSettings, ExportSettings, TableRuntime
from slimdiff.budget import BUDGETS, Budget
from slimdiff.errors import InputError
from slimdiff.progress import working
from slimdiff.settings import (
    LAST_SEED,
    MOST,
    MOST_AT_ONCE,
    TRANSFORMER_GROUPS,
    CalibrationSettings,
    LoraSettings,
    PlanSettings,
    Sampling,
    WeightSettings,
)

HOW_WEIGHTS = "compare.metrics.{name}.weights"
"""Where a recipe names a metric's weights."""
POINTS = {"parameters": "4%,8%,12%,16%,20%,24%", "macs": "5%,10%,15%,20%,25%", "speedup": "1.05,1.1,1.15,1.2"}
"""Budgets of a sweep, by unit, if none are given."""


class BudgetSettings(Settings, extra="allow"):
    """How much smaller the denoiser must be: a value of exactly one kind of `slimdiff.budget.BUDGETS`, by its key;
    `reduce: 12%` if none is given."""

    runtime: TableRuntime = "onnxruntime"
    """Where `speedup` is measured."""

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        kinds = _kinds()
        values = dict.fromkeys(kinds) | content
        for key in [key for key in values if key != "runtime"]:
            try:
                if key not in kinds:
                    raise InputError(f"unknown key {key!r}{nearest(str(key), [*kinds, 'runtime'])}")
                values[key] = None if values[key] is None else parse_budget(kinds[key], values[key]).value
            except InputError as error:
                reason = PydanticCustomError("refused", "{reason}", {"reason": str(error)})
                fault = InitErrorDetails(type=reason, loc=(key,), input=values[key])
                raise ValidationError.from_exception_data("budget", [fault]) from error
        chosen = [key for key in kinds if values[key] is not None]
        if len(chosen) > 1:
            raise ValueError(f"a budget is exactly one of {', '.join(kinds)}; here are {' and '.join(chosen)}")
        if "runtime" in content and chosen != ["speedup"]:
            raise ValueError("runtime says where speedup is measured: give speedup with it")
        return values

    def budget(self) -> Budget:
        """The budget of the method."""
        values = self.model_extra or {}
        chosen = {kind: values[key] for key, kind in _kinds().items() if values.get(key) is not None}
        return Budget(**chosen) if chosen else Budget("12%")


def _kinds() -> dict[str, str]:
    """Names of the kinds of budgets by their keys in a recipe."""
    return {kind.key or name: name for name, kind in BUDGETS.items()}


def parse_budget(kind: str, value: Any) -> Budget:
    """A budget of a kind.

    Raises:
        InputError: if the value is none of this kind, or one that no model can meet.
    """
    budget = Budget(**{kind: value})
    if BUDGETS[kind].removed is not None:
        try:
            budget.removed(10**15)  # how much of the model it is shows when that is there
        except (InputError, OverflowError):
            raise InputError(
                f"{value!r} must lie between nothing and all: write a count such as 100M, or a share such as 25%"
            ) from None
    return budget


class EngineStage(EngineSettings):
    """The engine stage: how the engine is built, and whether."""

    enabled: bool = True
    """Whether to build an engine where a backend is installed; where none is, the stage says so and is skipped."""


class ValidateStage(Settings):
    """Parity of the exported slim model with the slim model in torch."""

    calls: int = Field(4, ge=1, le=MOST)
    """How many recorded calls of a trajectory are compared, spread over its timesteps."""


class MetricSettings(Settings):
    """A metric of `deploy.quality.metrics`."""

    weights: str | None = None
    """Of its network, which are never fetched: a file, or the folder of a CLIP model (relative to the recipe)."""


class CompareStage(Settings):
    """Fidelity of the slim model against the dense one."""

    images: int = Field(16, ge=1, le=MOST)
    """How many images dense and slim make of the same captions and seeds."""
    shown: int = Field(8, ge=0, le=MOST)
    """How many of them are kept as files and shown in the report; slim in ONNX Runtime makes these too."""
    trajectories: int = Field(2, ge=1, le=MOST)
    """How many prompts' trajectories the noise-prediction error is taken over."""
    sampling: Sampling = Sampling(steps=25, seed=10_000)
    """How their images are made."""
    captions_seed: int = Field(1, ge=0, le=LAST_SEED)
    """Which captions the embedded model is judged on."""
    metrics: dict[str, MetricSettings] = {}
    """Metrics of the images beside PSNR and SSIM: `ms_ssim`, `lpips`, `clip`, `fid` or `kid`, each with its weights."""
    reference: str | None = None
    """A folder of real images that `fid` and `kid` hold both sides against (relative to the recipe)."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            check_names(map(str, value))
        except InputError as error:
            raise ValueError(str(error)) from None
        return {name: {} if asked is None else asked for name, asked in value.items()}

    @model_validator(mode="after")
    def _of_sets(self) -> CompareStage:
        if self.reference is not None and not any(METRICS[name].of == "set" for name in self.metrics):
            raise ValueError("reference is for fid and kid: ask for one of them in metrics, or leave it out")
        return self


class SweepStage(Settings, coerce_numbers_to_str=True):
    """The frontier: slim models at several budgets, each planned and measured like the one that is built."""

    by: Literal["parameters", "macs", "speedup"] = "parameters"
    """The unit of the points."""
    points: tuple[str, ...] = ()
    """Budgets such as `5%` or `100M`, or `1.2` for a speedup; a few of each unit if none is given."""
    runtime: TableRuntime = "onnxruntime"
    """Where their latency is measured, by the settings of `bench`."""
    threads: int | None = Field(None, ge=1, le=MOST_AT_ONCE)
    """Threads of that runtime; its own choice if not given."""
    images: int = Field(4, ge=0, le=MOST)
    """How many images of each point are compared with the dense model's."""

    @model_validator(mode="after")
    def _readable(self) -> SweepStage:
        try:
            self.budgets()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def texts(self) -> list[str]:
        """The points, as they are written."""
        return list(self.points) or POINTS[self.by].split(",")

    def budgets(self) -> list[Budget]:
        """The points as budgets."""
        return [parse_budget(self.by, text) for text in self.texts]


class Recipe(WeightSettings, LoraSettings, Settings, frozen=True):
    """A build, from a model to a report."""

    model: str
    """`demo`, a diffusers directory or safetensors file (relative to the recipe), or a hub id."""
    prompts: str | list[str] | None = None
    """A text file of one prompt a line (relative to the recipe), a list of prompts, `general`: the 500 built-in ones,
    the default, or `embedded`: the demo model's own, the default for it."""
    images: str | None = None
    """A folder of images (relative to the recipe) that images are made from: image to image, inpainting,
    InstructPix2Pix, upscaling. They go with the prompts by order, and the last of them serve the comparison."""
    masks: str | None = None
    """A folder of their masks, of the same names or in the same order; white is painted."""
    control_images: str | None = None
    """A folder of pictures that steer (relative to the recipe), for a model with a ControlNet or a T2I-Adapter: one an
    image or, of several ControlNets, one each."""
    classes: str | None = Field(None, coerce_numbers_to_str=True)
    """Of a class-conditional model, such as `207,360` or `0-999`."""
    schedule: str | None = None
    """That images are made by (relative to the recipe), in place of the model's own; `none`: all steps are whole."""
    calibration: CalibrationSettings = CalibrationSettings()
    """The runs in which the denoiser is watched."""
    budget: BudgetSettings = BudgetSettings()
    """How much smaller the denoiser must be."""
    plan: PlanSettings = PlanSettings()
    """How ranks are chosen under the budget."""
    export: ExportSettings = ExportSettings()
    """How the dense and the slim denoiser become ONNX."""
    engine: EngineStage = EngineStage()
    """The TensorRT engine."""
    validation: ValidateStage = Field(ValidateStage(), alias="validate")
    """Parity."""
    compare: CompareStage = CompareStage()
    """Fidelity."""
    bench: BenchSettings = BenchSettings()
    """Paired latency, in pairs of processes."""
    sweep: SweepStage | None = None
    """The frontier, as a stage of the build and a section of the report; without it there is none."""
    matrix: MatrixStage | None = None
    """Further exports for other targets, shapes and precisions, all of the same slim model."""
    gates: Gates = Gates()
    """What decides the exit code."""

    @model_validator(mode="after")
    def _used_as_calibrated(self) -> Recipe:
        """Graphs and comparisons have the steps, guidance and scheduler of the calibration, unless they say others: a
        distilled model is not right at any others. Graphs have the plan's precision, too.
        """
        calibrated, compared = self.calibration.sampling, self.compare.sampling
        said = self.compare.sampling.model_fields_set if "sampling" in self.compare.model_fields_set else set()
        same = {
            k: getattr(calibrated, k) for k in ({"steps", "guidance", "scheduler"} & calibrated.model_fields_set) - said
        }
        if same:
            compare = self.compare.model_copy(update={"sampling": compared.model_copy(update=same)})
            object.__setattr__(self, "compare", compare)
        if self.plan.precision == "int8" and "precision" not in self.export.model_fields_set:
            object.__setattr__(self, "export", self.export.model_copy(update={"precision": "int8"}))
        return self

    @field_validator("classes")
    @classmethod
    def _classes(cls, value: Any) -> Any:
        try:
            return value if value is None or parse_classes(value) else None
        except InputError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Recipe:
        for gate, metric in self.gates.metrics().items():
            if metric != "ssim" and metric not in self.compare.metrics:
                raise ValueError(f"gates.{gate} is of {metric}, which is not measured: ask for it in compare.metrics")
        return self

    @field_validator("prompts")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        try:
            return all_prompts(value) if isinstance(value, list) else value
        except InputError as error:
            raise ValueError(str(error)) from None


DEMO = Path(__file__).parent / "demo.yaml"


def load_recipe(path: Path, instead: Mapping[str, Mapping[str, Any]] | None = None) -> Recipe:
    """Read a recipe; a fault in it is said in one line.

    Args:
        instead: settings in the place of the file's, by section.

    Raises:
        InputError: naming the file, the place in it, and what would be right.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a recipe: it must be a YAML mapping with at least the key 'model'")
    for section, settings in (instead or {}).items():
        there = content.get(section) or {}
        if isinstance(there, dict):  # what else it may be, the recipe's own checks refuse
            content[section] = {**there, **settings}
    return make_recipe(content, str(path), path.parent)


def make_recipe(content: dict[str, Any], source: str, folder: Path) -> Recipe:
    """A recipe from its content; relative paths in it are taken from `folder`.

    Raises:
        InputError: naming `source`, the place in it, and what would be right.
    """
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {explain(error, Recipe)}") from error
    check_groups(recipe.plan, f"{source}: plan.groups")
    names = (*PICTURES, "schedule") if recipe.schedule != "none" else PICTURES
    named = {k: v for k in names if (v := getattr(recipe, k)) is not None}
    resolved: dict[str, Any] = {k: str(folder / _name_of_file(v)) for k, v in named.items()}
    model = _name_of_file(recipe.model)
    if recipe.prompts is None:
        resolved["prompts"] = default_source(recipe.model)
    if recipe.model != "demo" and (model.startswith(".") or os.path.exists(folder / model)):
        resolved["model"] = str(folder / model)
    if isinstance(recipe.prompts, str) and recipe.prompts not in (EMBEDDED, GENERAL):
        resolved["prompts"] = str(folder / _name_of_file(recipe.prompts))
    lora = [one.model_copy(update={"file": str(folder / _name_of_file(one.file))}) for one in recipe.lora]
    if recipe.compare.metrics:
        resolved["compare"] = _resolve_metrics(recipe.compare, source, folder)
    return recipe.model_copy(update={**resolved, "lora": tuple(lora)})


def _resolve_metrics(compare: CompareStage, source: str, folder: Path) -> CompareStage:
    """The same with the places of weights and reference taken from `folder`; those not there are refused."""

    def place(name: str | None) -> str | None:
        return None if name is None else str(folder / _name_of_file(name))

    metrics = {name: MetricSettings(weights=place(metric.weights)) for name, metric in compare.metrics.items()}
    try:
        check_weights({name: metric.weights for name, metric in metrics.items()}, HOW_WEIGHTS)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return compare.model_copy(update={"metrics": metrics, "reference": place(compare.reference)})


def _name_of_file(text: str) -> str:
    """A name as the operating system's functions take it: recipes are in UTF-8, whatever the locale."""
    return os.fsdecode(text.encode("utf-8", "surrogatepass"))


def check_groups(plan: PlanSettings, where: str) -> None:
    """Refuse groups that there are not, or that do not go together; `where` says what named them."""
    if plan.groups != TRANSFORMER_GROUPS:
        with working("load torch and diffusers"):  # which most recipes are read without
            from slimdiff.groups import fault_in

        if fault := fault_in(plan.groups):
            raise InputError(f"{where}: {fault}")
