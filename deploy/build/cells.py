"""The cells of a recipe's matrix: the slim model for one target, with one shape, in one precision.

Statistics, plan and slim model are the build's own; a cell has its export, engine, parity and latency, in a folder that
is a small build by itself. So cells are built in any order, anywhere that sees the files, and resumed one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from deploy.artifacts import build_folder
from deploy.build import steps
from deploy.build.cluster import run_on_ray
from deploy.build.stages import Done, Stage, run_stages
from deploy.build.workshop import Workshop
from deploy.recipe.material import PICTURES
from deploy.recipe.matrix import ImageShape
from deploy.recipe.prompts import EMBEDDED, GENERAL
from deploy.recipe.recipe import Recipe
from exporters.registry import names
from slimdiff.errors import SlimdiffError
from slimdiff.storage.lock import locked

log = logging.getLogger("slimdiff")


@dataclass(frozen=True)
class Cell:
    """One combination."""

    target: str
    shape: ImageShape
    precision: str

    @property
    def name(self) -> str:
        """`sm89-1x512x512-fp16`: its folder."""
        return f"{self.target}-{self.shape}-{self.precision}"

    @property
    def on_gpu(self) -> bool:
        """Whether the target is a compute capability, and not a runtime for graphs."""
        return self.target not in names("graph")

    @property
    def stages(self) -> tuple[str, ...]:
        """An engine has nothing dense here to be timed against, a graph is not built any further."""
        return ("export", "engine", "validate") if self.on_gpu else ("export", "validate", "bench")


def cells_of(recipe: Recipe) -> list[Cell]:
    """All of them; none if there is no matrix."""
    matrix = recipe.matrix
    if matrix is None:
        return []
    return [Cell(t, s, p) for t in matrix.targets for s in matrix.shapes for p in matrix.precision]


def recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    """The recipe as it holds for one cell."""
    sampling = recipe.compare.sampling.model_copy(update={"height": cell.shape.height, "width": cell.shape.width})
    engine: dict[str, Any] = {"enabled": cell.on_gpu, "batch": None, "shapes": {}, "profiles": []}
    if cell.on_gpu:
        engine |= {"backend": "tensorrt-rtx", "targets": [cell.target]}
    return recipe.model_copy(
        update={
            "export": recipe.export.model_copy(update={"precision": cell.precision, "dynamic_batch": False}),
            "engine": recipe.engine.model_copy(update=engine),
            "compare": recipe.compare.model_copy(update={"sampling": sampling}),
            "matrix": None,
            "sweep": None,
        }
    )


class CellWorkshop(Workshop):
    """A cell's own recipe and folder; models, statistics and plan are the build's."""

    def __init__(self, cell: Cell, whole: Workshop, forced: Collection[str] = ()) -> None:
        super().__init__(recipe_of(whole.recipe, cell), whole.folder / build_folder.CELLS / cell.name, forced)
        self.cell, self.whole, self.shared = cell, whole, whole.folder
        self.images, self.engine_precision = cell.shape.images, cell.precision
        if cell.on_gpu:
            self.exported = ("slim",)
        else:
            self.runtime = cell.target

    @cached_property
    def dense(self) -> DiffusionPipeline:
        return self.whole.dense

    @cached_property
    def slim(self) -> DiffusionPipeline:
        return self.whole.slim

    def stages(self, slim: str = "") -> list[Stage]:
        """The cell's stages, which begin where the slim model is there; `slim` is its key."""
        return [
            replace(stage, needs=tuple(n for n in stage.needs or () if n in self.cell.stages)).also_decided_by(
                slim=slim, runtime=self.runtime, images=str(self.images)
            )
            for stage in steps.stages_of(self.recipe)
            if stage.name in self.cell.stages
        ]


@dataclass(frozen=True)
class Job:
    """Building one cell: all that another process needs to know."""

    recipe: Recipe
    """The whole build's."""
    cell: Cell
    folder: Path
    """The whole build's."""
    slim: str
    """The key of the slim model."""
    forced: Collection[str] = ()
    timed: bool = True
    """Whether latency is measured, too."""

    def for_elsewhere(self) -> Job:
        """The same for a process that works in another folder, and beside others: its latencies would mean nothing."""
        paths = {name: getattr(self.recipe, name) for name in ("model", "prompts", *PICTURES)}
        own = {k: p for k, p in paths.items() if isinstance(p, str) and p not in ("demo", EMBEDDED, GENERAL)}
        here: dict[str, Any] = {key: str(Path(path).resolve()) for key, path in own.items() if Path(path).exists()}
        here["lora"] = tuple(one.model_copy(update={"file": str(Path(one.file).resolve())}) for one in self.recipe.lora)
        return replace(self, recipe=self.recipe.model_copy(update=here), folder=self.folder.resolve(), timed=False)


def build_cell(job: Job, whole: Workshop | None = None) -> list[Done] | SlimdiffError:
    """Build one cell, in this process or in one of Ray's; an error is returned, for other cells go on.

    Args:
        whole: the build's workshop, with the models that are open in it; opened again if not given.
    """
    shop = CellWorkshop(job.cell, whole or Workshop(job.recipe, job.folder), job.forced)
    stages = [stage for stage in shop.stages(job.slim) if job.timed or stage.name != "bench"]
    try:
        with locked(shop.folder):
            done = list(run_stages(shop, stages, [stage.name for stage in stages if stage.name in job.forced]))
    except SlimdiffError as error:
        return error
    return [replace(d, name=f"{build_folder.CELLS}/{job.cell.name}/{d.name}") for d in done]


def build_cells(whole: Workshop, shops: Sequence[CellWorkshop], slim: str, ray: str | None = None) -> Iterator[Done]:
    """Build the cells that are not there yet; `slim` is the key of the slim model. See `deploy.build.chain.run_build`.

    Raises:
        SlimdiffError: if one cannot be built, once all others are.
    """
    jobs = [Job(whole.recipe, shop.cell, whole.folder, slim, shop.forced) for shop in shops]
    built: Iterable[list[Done] | SlimdiffError] = (build_cell(job, whole) for job in jobs)
    if ray is not None and jobs:
        away = run_on_ray(build_cell, [job.for_elsewhere() for job in jobs], ray)
        built = (_timed(job, done, whole) for job, done in zip(jobs, away, strict=True))
    failed: list[tuple[str, SlimdiffError]] = []
    for job, done in zip(jobs, built, strict=True):
        if isinstance(done, SlimdiffError):
            log.error("cell %s: %s", job.cell.name, done)
            failed.append((job.cell.name, done))
        else:
            yield from done
    if failed:
        name, error = failed[0]
        more = f" ({len(failed) - 1} more could not be built)" if len(failed) > 1 else ""
        raise type(error)(f"cell {name}: {error}{more}") from error


def _timed(job: Job, away: list[Done] | SlimdiffError, whole: Workshop) -> list[Done] | SlimdiffError:
    """A cell as Ray built it, with its latency, measured here, where nothing else runs."""
    if isinstance(away, SlimdiffError) or "bench" not in job.cell.stages:
        return away
    here = build_cell(replace(job, forced={"bench"}.intersection(job.forced)), whole)
    return here if isinstance(here, SlimdiffError) else [*away, here[-1]]


def results_of_cells(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """What came of every cell, for `build.json`."""
    rows = []
    for cell in cells_of(recipe):
        where = folder / build_folder.CELLS / cell.name
        validate = build_folder.read(where, "validate")
        row = {"name": cell.name, "target": cell.target, "precision": cell.precision, **cell.shape.model_dump()}
        row["parity"] = {key: validate[key] for key in ("passed", "precision", "checks")}
        if "bench" in cell.stages:
            bench = build_folder.read(where, "bench")
            row |= {key: bench.get(key) for key in ("speedup", "runtime")}
        rows.append(row)
    return rows
