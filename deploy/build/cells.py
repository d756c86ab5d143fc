"""The cells of a recipe's matrix: the slim model for one target, with one shape, in one precision.

Statistics, plan and slim model are the build's own; a cell has its export, engine, parity and latency, in a folder that
is a small build by itself. So cells are built in any order, anywhere that sees the files, and resumed one by one.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from deploy.artifacts import build_folder
from deploy.build import cluster, gates, steps
from deploy.build.stages import Done, Stage, keys, run_stages
from deploy.build.workshop import Workshop
from deploy.recipe.prompts import EMBEDDED, GENERAL
from deploy.recipe.recipe import Gates, ImageShape, Recipe
from slimdiff.errors import SlimdiffError
from slimdiff.storage import manifest
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
    def stages(self) -> tuple[str, ...]:
        """An engine has nothing dense here to be timed against, a graph is not built any further."""
        return ("export", "engine", "validate") if is_gpu(self.target) else ("export", "validate", "bench")


def is_gpu(target: str) -> bool:
    """Whether a target is a compute capability, and not a runtime for graphs."""
    return re.fullmatch(r"sm\d+", target) is not None


def cells_of(recipe: Recipe) -> list[Cell]:
    """All of them; none if there is no matrix."""
    matrix = recipe.matrix
    if matrix is None:
        return []
    return [Cell(t, s, p) for t in matrix.targets for s in matrix.shapes for p in matrix.precision]


def recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    """The recipe as it holds for one cell."""
    sampling = recipe.compare.sampling.model_copy(update={"height": cell.shape.height, "width": cell.shape.width})
    engine: dict[str, Any] = {"enabled": is_gpu(cell.target), "batch": None, "shapes": {}, "profiles": []}
    if is_gpu(cell.target):
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
        self.cell, self.whole = cell, whole
        self.images = cell.shape.images
        self.engine_precision = cell.precision
        if is_gpu(cell.target):
            self.exported = ("slim",)
        else:
            self.runtime = cell.target

    @property
    def shared(self) -> Path:
        return self.whole.folder

    @cached_property
    def dense(self) -> DiffusionPipeline:
        return self.whole.dense

    @cached_property
    def slim(self) -> DiffusionPipeline:
        return self.whole.slim

    def stages(self, slim: str = "") -> list[Stage]:
        """The cell's stages, which begin where the slim model is there; `slim` is its key."""
        names = self.cell.stages
        return [
            dataclasses.replace(stage, needs=tuple(n for n in stage.needs or () if n in names)).also_decided_by(
                slim=slim, runtime=self.runtime, images=str(self.images)
            )
            for stage in steps.stages_of(self.recipe)
            if stage.name in names
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
    forced: tuple[str, ...] = ()
    timed: bool = True
    """Whether latency is measured, too."""


def build_cell(job: Job, whole: Workshop | None = None) -> list[Done]:
    """Build one cell, in this process or in one of Ray's.

    Args:
        job: which.
        whole: the build's workshop, with the models that are open in it; opened again if not given.
    """
    shop = CellWorkshop(job.cell, whole or Workshop(job.recipe, job.folder), job.forced)
    stages = [stage for stage in shop.stages(job.slim) if job.timed or stage.name != "bench"]
    with locked(shop.folder):
        done = list(run_stages(shop, stages, [name for name in job.forced if name in job.cell.stages]))
    return [dataclasses.replace(d, name=f"{build_folder.CELLS}/{job.cell.name}/{d.name}") for d in done]


class Cells:
    """The cells of a build."""

    def __init__(self, shop: Workshop, forced: Collection[str]) -> None:
        self.shop = shop
        self.forced = tuple(sorted(forced))
        self.shops = [CellWorkshop(cell, shop, self.forced) for cell in cells_of(shop.recipe)]

    def key(self, slim: str) -> str:
        """Changes when the inputs of any cell do; `slim` is the key of the slim model."""
        return manifest.fingerprint({shop.cell.name: keys(shop, shop.stages(slim)) for shop in self.shops})

    def build(self, slim: str, ray: str | None = None) -> Iterator[Done]:
        """Build those that are not there yet; see `deploy.build.chain.run_build`.

        Raises:
            SlimdiffError: if one cannot be built, once all others are.
        """
        jobs = [Job(self.shop.recipe, s.cell, self.shop.folder, slim, self.forced) for s in self.shops]
        here = partial(build_cell, whole=self.shop)
        built: Iterable[list[Done] | SlimdiffError] = cluster.run_here(here, jobs)
        if ray is not None and jobs:
            away = cluster.run_on_ray(build_cell, [_anywhere(job) for job in jobs], ray)
            built = map(self._timed, jobs, away)
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

    def _timed(self, job: Job, away: list[Done] | SlimdiffError) -> list[Done] | SlimdiffError:
        """A cell as Ray built it, with its latency, measured here, where nothing else runs."""
        if isinstance(away, SlimdiffError) or "bench" not in job.cell.stages:
            return away
        job = dataclasses.replace(job, forced=tuple(name for name in job.forced if name == "bench"))
        (here,) = cluster.run_here(partial(build_cell, whole=self.shop), [job])
        return here if isinstance(here, SlimdiffError) else [*away, here[-1]]


def _anywhere(job: Job) -> Job:
    """The same for a process that works in another folder, and beside others, so that its latencies mean nothing."""
    recipe = job.recipe
    paths = {"model": recipe.model, "prompts": recipe.prompts}
    own = {k: p for k, p in paths.items() if isinstance(p, str) and p not in ("demo", EMBEDDED, GENERAL)}
    here = {key: str(Path(path).resolve()) for key, path in own.items() if Path(path).exists()}
    return dataclasses.replace(job, recipe=recipe.model_copy(update=here), folder=job.folder.resolve(), timed=False)


def results(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """What came of every cell, for `build.json`."""
    rows = []
    for cell in cells_of(recipe):
        where = folder / build_folder.CELLS / cell.name
        validate = build_folder.read(where, "validate")
        row: dict[str, Any] = {
            "name": cell.name,
            "target": cell.target,
            "precision": cell.precision,
            **cell.shape.model_dump(),
            "parity": {k: validate[k] for k in ("passed", "precision", "checks")},
        }
        if "bench" in cell.stages:
            bench = build_folder.read(where, "bench")
            row |= {"speedup": bench.get("speedup"), "runtime": bench.get("runtime")}
        rows.append(row)
    return rows


def judge_cells(bounds: Gates, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A gate of parity for each cell, if the recipe has it."""
    return [gates.parity(cell["parity"], cell["name"]) for cell in cells] if bounds.parity else []
