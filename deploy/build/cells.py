"""The cells of a recipe's matrix: the slim model for one target, with one shape, in one precision.

Statistics, plan and slim model are the build's own; a cell has its export, engine, parity and latency, in a folder that
is a small build by itself. So cells are built in any order, anywhere that sees the files, and resumed one by one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.artifacts import build_folder
from deploy.build import cluster, gates
from deploy.build.stages import Done, Stage, keys, run_stages
from deploy.build.workshop import Workshop
from deploy.cli.console import log
from deploy.recipe.prompts import EMBEDDED, GENERAL
from deploy.recipe.recipe import ImageShape, Recipe
from slimdiff.errors import SlimdiffError
from slimdiff.storage import manifest
from slimdiff.storage.lock import locked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from deploy.recipe.recipe import Gates


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
    asked = recipe.matrix
    if asked is None:
        return []
    return [Cell(t, s, p) for t in asked.targets for s in asked.shapes for p in asked.precision]


def recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    """The recipe as it holds for one cell."""
    sampling = recipe.compare.sampling.model_copy(update={"height": cell.shape.height, "width": cell.shape.width})
    built: dict[str, Any] = {"enabled": is_gpu(cell.target), "batch": None, "shapes": {}, "profiles": []}
    if is_gpu(cell.target):
        built |= {"backend": "tensorrt-rtx", "targets": [cell.target]}
    return recipe.model_copy(
        update={
            "export": recipe.export.model_copy(update={"precision": cell.precision, "dynamic_batch": False}),
            "engine": recipe.engine.model_copy(update=built),
            "compare": recipe.compare.model_copy(update={"sampling": sampling}),
            "matrix": None,
            "sweep": None,
        }
    )


class CellWorkshop(Workshop):
    """A cell's own recipe and folder; models, statistics and plan are the build's."""

    def __init__(self, job: Job, whole: Workshop | None = None) -> None:
        super().__init__(recipe_of(job.recipe, job.cell), job.folder / build_folder.CELLS / job.cell.name, job.forced)
        self.whole = whole or Workshop(job.recipe, job.folder)
        self.images = job.cell.shape.images
        self.engine_precision = job.cell.precision
        if is_gpu(job.cell.target):
            self.exported = ("slim",)
        else:
            self.runtime = job.cell.target

    @property
    def shared(self) -> Path:
        return self.whole.folder

    @cached_property
    def dense(self) -> DiffusionPipeline:
        return self.whole.dense

    @cached_property
    def slim(self) -> DiffusionPipeline:
        return self.whole.slim


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


def stages_of(job: Job, shop: CellWorkshop) -> list[Stage]:
    """A cell's stages, which begin where the slim model is there."""
    from deploy.build.chain import artifact_stages

    shared = {"slim": job.slim, "runtime": shop.runtime, "images": str(shop.images)}
    return [
        dataclasses.replace(
            stage, needs=tuple(n for n in stage.needs if n in job.cell.stages), inputs={**stage.inputs, **shared}
        )
        for stage in artifact_stages(shop)
        if stage.name in job.cell.stages and (job.timed or stage.name != "bench")
    ]


def build_cell(job: Job, whole: Workshop | None = None) -> list[Done]:
    """Build one cell, in this process or in one of Ray's.

    Args:
        job: which.
        whole: the build's workshop, with the models that are open in it; opened again if not given.
    """
    shop = CellWorkshop(job, whole)
    with locked(shop.folder):
        done = list(run_stages(shop.folder, stages_of(job, shop), [s for s in job.forced if s in job.cell.stages]))
    return [dataclasses.replace(d, name=f"{build_folder.CELLS}/{job.cell.name}/{d.name}") for d in done]


class Cells:
    """The cells of a build."""

    def __init__(self, shop: Workshop, slim: str, forced: Collection[str]) -> None:
        self.shop = shop
        again = tuple(sorted(forced))
        self.jobs = [Job(shop.recipe, cell, shop.folder, slim, again) for cell in cells_of(shop.recipe)]

    @property
    def key(self) -> str:
        """Changes when what any cell is made from does."""
        found = {job.cell.name: keys(stages_of(job, CellWorkshop(job, self.shop))) for job in self.jobs}
        return manifest.fingerprint(found)

    def build(self, ray: str | None = None) -> Iterator[Done]:
        """Build those that are not there yet; see `deploy.build.chain.build`.

        Raises:
            SlimdiffError: if one cannot be built, once all others are.
        """
        if not self.jobs:
            return
        made: Iterator[list[Done] | SlimdiffError] = cluster.run_here(partial(build_cell, whole=self.shop), self.jobs)
        if ray is not None:
            away = [_anywhere(job) for job in self.jobs]
            made = map(self._timed, self.jobs, cluster.run_on_ray(build_cell, away, ray, build_folder.CELLS))
        failed: list[tuple[str, SlimdiffError]] = []
        for job, found in zip(self.jobs, made, strict=True):
            if isinstance(found, SlimdiffError):
                log.error("cell %s: %s", job.cell.name, found)
                failed.append((job.cell.name, found))
            else:
                yield from found
        if failed:
            name, error = failed[0]
            more = f" ({len(failed) - 1} more could not be built)" if len(failed) > 1 else ""
            raise type(error)(f"cell {name}: {error}{more}") from error

    def _timed(self, job: Job, found: list[Done] | SlimdiffError) -> list[Done] | SlimdiffError:
        """What Ray's tasks made of a cell, and its latency, measured here, where nothing else runs."""
        if isinstance(found, SlimdiffError) or "bench" not in job.cell.stages:
            return found
        forced = tuple(name for name in job.forced if name == "bench")
        (whole,) = cluster.run_here(partial(build_cell, whole=self.shop), [dataclasses.replace(job, forced=forced)])
        return whole if isinstance(whole, SlimdiffError) else [*found, whole[-1]]


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


def judge_cells(asked: Gates, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A gate of parity for each cell, if it is asked for."""
    return [gates.parity(cell["parity"], cell["name"]) for cell in cells] if asked.parity else []
